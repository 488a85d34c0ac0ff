"""The open_clip embedder's own promises: where captions come from, rows without one, resuming, weights, errors."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nemo_image.backend import to_matrix
from nemo_image.classifiers import ImageClassifier
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import OpenClipImageEmbedder, TimmImageEmbedder, open_clip_models
from nemo_image.embedders import autocast as autocast_module
from nemo_image.embedders.open_clip import PreparedOpenClipEmbedder
from nemo_image.embedders.open_clip_models import OpenClipModel
from nemo_image.errors import (
    ArgumentError,
    ImageError,
    MissingColumnError,
    ModelError,
    UnknownModelError,
    WeightsError,
)
from nemo_image.shards import parquet
from tests.embedders.open_clip_models import TINY, TINY_COCA, write_model
from tests.makers import TINY_MODEL, encoded, make_dataset, picture, sample, write_rows, write_tar

open_clip = pytest.importorskip("open_clip")

TEXT_COLUMNS = ["text_embedding", "clip_score", "clip_caption"]


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a small model with seeded weights."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing go to the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def load(path: Path, **options: Any) -> ImageTextPairDataset:
    return ImageTextPairDataset.from_webdataset(str(path), **options)


def embed(name: str, folder: Path, **options: Any) -> Any:
    """Return the computed frame of a dataset."""
    return OpenClipImageEmbedder(name, **{"autocast": False, **options})(load(folder)).metadata.compute()


def write_pairs(folder: Path, texts: list[Any], *, rows: bool = True) -> Path:
    """Write a shard of samples whose JSON has no caption: `texts` are their .txt, as bytes, or None."""
    samples = []
    for number, text in enumerate(texts):
        key, members = sample(number, f"{number:03d}")
        samples.append((key, {**members, **({} if text is None else {"txt": text})}))
    write_tar(folder / "a.tar", samples)
    if rows:
        write_rows(folder / "a.parquet", {"key": [key for key, _ in samples]})
    return folder


# ------------------------------------------------------------------------------------------------ where captions lie


def test_captions_come_from_the_column_the_text_or_the_json(tmp_path: Path, name: str) -> None:
    key, members = sample(0, "000", caption="in the text")
    members["json"] = json.dumps({"key": key, "caption": "in the JSON", "alt": ["", "second in the JSON"]}).encode()
    write_tar(tmp_path / "a.tar", [(key, members)])
    write_rows(tmp_path / "a.parquet", {"key": [key], "caption": ["in the column"], "other": ["in another"]})
    texts = {
        None: "in the column",
        "txt": "in the text",
        "json:caption": "in the JSON",
        "json:alt": "second in the JSON",
        "column:other": "in another",
        ("json:nothing", "txt"): "in the text",
    }
    embedder = OpenClipImageEmbedder(name)
    wanted = embedder.embed_text(list(texts.values()))
    for (captions, text), vector in zip(texts.items(), wanted, strict=True):
        frame = embed(name, tmp_path, captions=captions)
        assert np.allclose(to_matrix(frame["text_embedding"])[0][0], vector, atol=1e-6), text
    assert np.abs(wanted - wanted[0]).max(axis=1)[1:4].min() > 1e-3  # so that agreeing says something


def test_a_blank_caption_is_none_and_the_next_place_is_looked_at(tmp_path: Path, name: str) -> None:
    key, members = sample(0, "000", caption=" \n\t&nbsp; ")
    members["json"] = json.dumps({"key": key, "caption": "in the JSON"}).encode()
    write_tar(tmp_path / "a.tar", [(key, members)])
    write_rows(tmp_path / "a.parquet", pa.table({"key": [key], "caption": pa.array([None], pa.string())}))
    frame = embed(name, tmp_path)
    wanted = OpenClipImageEmbedder(name).embed_text(["in the JSON"])
    assert np.allclose(to_matrix(frame["text_embedding"])[0], wanted, atol=1e-6)


def test_of_several_captions_the_best_counts(tmp_path: Path, name: str) -> None:
    lists = [["a dog", "", "a cat on a mat", "blue"], ["one", "one"], [], ["only"]]
    write_pairs(tmp_path, [None] * 4)
    write_rows(tmp_path / "a.parquet", {"key": [f"{n:03d}" for n in range(4)], "captions": lists})
    frame = embed(name, tmp_path, captions="column:captions")
    embedder = OpenClipImageEmbedder(name)
    pictures = embedder.embed_pictures([encoded(picture(n), quality=90) for n in range(4)])
    for row in (0, 1, 3):
        scores = [float(embedder.embed_text([text])[0] @ pictures[row]) if text else -2.0 for text in lists[row]]
        assert frame["clip_caption"].iloc[row] == int(np.argmax(scores))
        assert frame["clip_score"].iloc[row] == pytest.approx(max(scores), abs=1e-5)
        best = embedder.embed_text([lists[row][int(np.argmax(scores))]])[0]
        assert np.allclose(frame["text_embedding"].iloc[row], best, atol=1e-6)
    assert frame[TEXT_COLUMNS].iloc[2].isna().all()
    assert frame["image_embedding"].notna().all()


def test_captions_that_the_user_assigned_belong_to_what_made_the_score(tmp_path: Path, name: str) -> None:
    make_dataset(tmp_path, {"a": 3})
    embedder = OpenClipImageEmbedder(name, autocast=False)
    first = embedder(load(tmp_path)).save_metadata().metadata.compute()
    dataset = load(tmp_path)
    dataset.metadata["caption"] = dataset.metadata["caption"] + " in the snow"
    second = embedder(dataset).save_metadata().metadata.compute()
    wanted = OpenClipImageEmbedder(name).embed_text([f"picture number {n} in the snow" for n in range(3)])
    assert np.allclose(to_matrix(second["text_embedding"])[0], wanted, atol=1e-6)
    assert (first["clip_score"] - second["clip_score"]).abs().min() > 1e-6


@pytest.mark.parametrize("captions", ["alt", "json:", "column:", "TXT", [], ["txt", 3]])
def test_captions_must_say_a_place(captions: Any, name: str, tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 1})
    with pytest.raises(ArgumentError, match="captions="):
        OpenClipImageEmbedder(name, captions=captions)(load(tmp_path))


def test_columns_that_hold_no_captions_are_refused(name: str, tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 1})
    with pytest.raises(MissingColumnError, match=r"'column:nosuch'.*it has key"):
        OpenClipImageEmbedder(name, captions="column:nosuch")(load(tmp_path))
    with pytest.raises(ArgumentError, match=r"column:seed.*int64"):
        OpenClipImageEmbedder(name, captions="column:seed")(load(tmp_path))


# --------------------------------------------------------------------------------------- rows without text or picture

ODD = {
    "none": None,
    "empty": b"",
    "blank": b" \r\n\t ",
    "entity": b"&nbsp;",
    "bad UTF-8": b"caf\xe9 \xff\xfe on a table",
    "NUL": b"a\0b\0",
    "only NUL": b"\0\0",
    "BOM": "\ufeffa house".encode(),
    "scripts": "кот 猫 بيت ไทย हिन्दी 🐈‍⬛".encode(),
    "long": b"word " * 20_000,
    "one word": b"x" * 100_000,
    "special token": b"<end_of_text> <start_of_text>",
}


def test_odd_captions(tmp_path: Path, name: str) -> None:
    write_pairs(tmp_path, list(ODD.values()))
    frame = embed(name, tmp_path)
    assert frame["image_embedding"].notna().all()
    assert frame["image_error"].isna().all()
    assert frame["clip_score"].dropna().between(-1, 1).all()
    without = [what for what, missing in zip(ODD, frame["clip_score"].isna(), strict=True) if missing]
    assert without == ["none", "empty", "blank", "entity", "only NUL"]
    for column in TEXT_COLUMNS:
        assert (frame[column].isna() == frame["clip_score"].isna()).all()


def test_rows_without_caption_count_as_computed(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pairs(tmp_path / "in", [b"a", None, b"b"])
    write_tar(tmp_path / "in" / "b.tar", [sample(9, "000")])
    write_rows(tmp_path / "in" / "b.parquet", {"key": ["000"]})
    embedder = OpenClipImageEmbedder(name, autocast=False)
    targets: list[dict[str, Any]] = [
        {},
        {"path": tmp_path / "out"},
        {"path": tmp_path / "scores", "columns": ["clip_score"]},
    ]
    for target in targets:
        first = embedder(load(tmp_path / "in")).save_metadata(**target)
        assert first.run_totals is not None
        assert first.run_totals["results"]["clip_score"] == 2
        again = embedder(load(tmp_path / "in")).save_metadata(**target)
        assert again.run_totals is not None
        assert again.run_totals["shards"] == {"done": 0, "skipped": 2, "failed": 0}, target


def test_rows_that_were_left_out_are_still_to_compute(tmp_path: Path, name: str) -> None:
    write_pairs(tmp_path, [b"a", None, b"b", None])
    embedder = OpenClipImageEmbedder(name, autocast=False)
    some = load(tmp_path)
    some.metadata = some.metadata[some.metadata["key"] < "002"]
    embedder(some).save_metadata()
    footer = parquet.read_summary(str(tmp_path / "a.parquet")).footer
    assert footer is not None
    assert {footer.pending[column] for column in ("image_embedding", *TEXT_COLUMNS)} == {2}
    saved = embedder(load(tmp_path)).save_metadata()
    assert saved.metadata.compute()["clip_score"].notna().tolist() == [True, False, True, False]
    footer = parquet.read_summary(str(tmp_path / "a.parquet")).footer
    assert footer is not None
    assert not any(footer.pending.values())


def test_a_bad_picture_has_no_result_at_all(tmp_path: Path, name: str) -> None:
    good, bad = sample(0, "000", caption="good"), sample(1, "001", caption="bad")
    bad[1]["jpg"] = bad[1]["jpg"][:200]
    write_tar(tmp_path / "a.tar", [good, bad])
    write_rows(tmp_path / "a.parquet", {"key": ["000", "001", "gone"], "caption": ["good", "bad", "gone"]})
    frame = embed(name, tmp_path)
    assert frame["image_error"].isna().tolist() == [True, False, False]
    for column in ("image_embedding", *TEXT_COLUMNS):
        assert frame[column].notna().tolist() == [True, False, False]


@pytest.mark.in_process("watches or changes this process")
def test_a_picture_that_the_model_makes_nothing_of_has_no_result(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(tmp_path, {"a": 3})
    original = PreparedOpenClipEmbedder.embed

    def embed_all_but_one(self: Any, pixels: torch.Tensor) -> Any:
        made = original(self, pixels)
        made[1] = 0
        return made

    monkeypatch.setattr(PreparedOpenClipEmbedder, "embed", embed_all_but_one)
    frame = embed(name, tmp_path)
    assert frame["image_error"].notna().tolist() == [False, True, False]
    for column in ("image_embedding", *TEXT_COLUMNS):
        assert frame[column].notna().tolist() == [True, False, True]


# ----------------------------------------------------------------------------------------------------- like timm's


def test_results_repeat_to_the_last_bit_on_any_scheduler(tmp_path: Path, name: str, scheduler: Any) -> None:
    make_dataset(tmp_path / "in", {"a": 7, "b": 4})
    embedder = OpenClipImageEmbedder(name, autocast=False, batch_size=3)
    hashes = []
    for run in range(2):
        embedder(load(tmp_path / "in")).save_metadata(tmp_path / f"out{run}")
        files = sorted((tmp_path / f"out{run}").glob("*.parquet"))
        hashes.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
    assert hashes[0] == hashes[1]


def test_rows_keep_their_pair_however_the_frame_is_partitioned(tmp_path: Path, name: str) -> None:
    make_dataset(tmp_path, {"a": 5, "b": 4})
    whole = embed(name, tmp_path).set_index("key")
    dataset = load(tmp_path)
    dataset.metadata = dataset.metadata.repartition(npartitions=1).sort_values("score", ascending=False)
    other = OpenClipImageEmbedder(name, autocast=False)(dataset).metadata.compute().set_index("key").loc[whole.index]
    assert np.allclose(whole["clip_score"], other["clip_score"], atol=1e-6)
    assert np.allclose(to_matrix(whole["text_embedding"])[0], to_matrix(other["text_embedding"])[0], atol=1e-6)


class Sum(ImageClassifier):
    """Adds up an embedding."""

    def __init__(self) -> None:
        super().__init__("sum", "image_embedding", "total", "float32", -1, 32)

    def load_model(self, device: str):  # type: ignore[no-untyped-def]
        return lambda vectors: vectors.sum(1)

    def postprocess(self, series):  # type: ignore[no-untyped-def]
        return series


def test_a_probe_settles_the_type_and_a_later_run_goes_on_with_it(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(tmp_path, {"a": 3, "b": 2})
    monkeypatch.setattr(autocast_module, "candidate_dtype", lambda device: "bfloat16")
    monkeypatch.setattr(autocast_module, "probe_dtype", lambda *_: "bfloat16")
    monkeypatch.setattr(autocast_module, "MIN_COSINE", 0.9)
    embedder = OpenClipImageEmbedder(name, classifiers=[Sum()])
    out = tmp_path / "out"
    first = embedder(load(tmp_path)).save_metadata(out)
    assert {first.provenance[column]["dtype"] for column in ("image_embedding", *TEXT_COLUMNS)} == {"bfloat16"}
    assert first.provenance["total"]["parents"]["image_embedding"] == first.provenance["image_embedding"]
    monkeypatch.setattr(autocast_module, "probe_dtype", lambda *_: "float32")
    (out / "b.parquet").unlink()
    again = embedder(load(tmp_path)).save_metadata(out)
    assert again.run_totals is not None
    assert again.run_totals["shards"] == {"done": 1, "skipped": 1, "failed": 0}
    assert again.provenance == first.provenance


def test_reduced_precision_must_keep_texts_too(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path, {"a": 2})
    monkeypatch.setattr(autocast_module, "candidate_dtype", lambda device: "bfloat16")
    monkeypatch.setattr(autocast_module, "probe_dtype", lambda *_: "bfloat16")
    monkeypatch.setattr(autocast_module, "MIN_COSINE", 1.1)
    assert OpenClipImageEmbedder(name).prepare(load(tmp_path)).dtype == "float32"


def test_towers_that_return_tuples(tmp_path: Path) -> None:
    coca = write_model(tmp_path / "coca", TINY_COCA)
    make_dataset(tmp_path / "in", {"a": 2})
    frame = embed(coca, tmp_path / "in", normalize_embeddings=False)
    theirs, _, transform = open_clip.create_model_and_transforms(coca)
    theirs.eval()
    with torch.inference_mode():
        text = theirs.encode_text(open_clip.get_tokenizer(coca)(frame["caption"].tolist()), normalize=True)
        image = theirs.encode_image(torch.stack([transform(picture(n)) for n in range(2)]), normalize=True)
    vectors = to_matrix(frame["text_embedding"])[0]
    assert (np.abs(np.linalg.norm(vectors, axis=1) - 1) > 1e-3).all()
    assert np.allclose(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), text, atol=1e-5)
    # The picture was a JPEG, so only nearly the same.
    assert np.allclose(frame["clip_score"], (text * image).sum(1), atol=0.02)


# ----------------------------------------------------------------------------------------------- texts and pictures


def test_texts_and_pictures_in_this_process(tmp_path: Path, name: str) -> None:
    embedder = OpenClipImageEmbedder(name, normalize_embeddings=False)
    texts = embedder.embed_text(["a cat", "", "x" * 1000])
    assert texts.shape == (3, 32)
    assert texts.dtype == np.float32
    assert np.allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-6)
    assert embedder.embed_text([]).shape == (0, 32)
    one = picture(1)
    path = tmp_path / "one.png"
    path.write_bytes(encoded(one, "PNG"))
    made = embedder.embed_pictures([path, str(path), path.read_bytes(), one, one.convert("RGBA")])
    assert made.shape == (5, 32)
    assert np.allclose(made, made[0], atol=1e-6)
    assert np.allclose(np.linalg.norm(made, axis=1), 1, atol=1e-6)
    assert embedder.embed_pictures([]).shape == (0, 32)


def test_pictures_with_timm() -> None:
    blobs = [encoded(picture(n), quality=90) for n in range(11)]
    made = TimmImageEmbedder(TINY_MODEL, batch_size=4).embed_pictures([*blobs[:5], picture(5), *blobs[6:]])
    alone = [TimmImageEmbedder(TINY_MODEL).embed_pictures([blob])[0] for blob in blobs]
    assert made.shape == (11, 256)
    assert np.allclose(np.delete(made, 5, 0), np.delete(alone, 5, 0), atol=1e-5)


def test_pictures_and_texts_that_are_none(tmp_path: Path, name: str) -> None:
    embedder = OpenClipImageEmbedder(name)
    with pytest.raises(ImageError, match=r"pictures\[1\]"):
        embedder.embed_pictures([encoded(picture(0)), b"no picture"])
    with pytest.raises(ArgumentError, match=r"pictures\[0\]: there is no file"):
        embedder.embed_pictures([tmp_path / "nosuch.jpg"])
    with pytest.raises(ArgumentError, match=r"pictures\[0\] is of type int"):
        embedder.embed_pictures([3])  # type: ignore[list-item]
    with pytest.raises(ArgumentError, match="in brackets"):
        embedder.embed_pictures("one.jpg")
    for wrong in ("a cat", ["a cat", None]):
        with pytest.raises(ArgumentError, match="list of str"):
            embedder.embed_text(wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ models and weights


def test_names_and_tags_that_are_not_there() -> None:
    with pytest.raises(UnknownModelError, match="did you mean ViT-B-32"):
        OpenClipImageEmbedder("ViT-B-3").load()
    with pytest.raises(UnknownModelError, match="but timm has: TimmImageEmbedder"):
        OpenClipImageEmbedder("tf_efficientnet_lite0").load()
    with pytest.raises(UnknownModelError, match=r"no tag 'openay'.*openai"):
        OpenClipImageEmbedder("ViT-B-32", "openay").load()
    with pytest.raises(ArgumentError, match="which weights of ViT-B-32, as 'openai'"):
        OpenClipImageEmbedder("ViT-B-32", True).load()  # type: ignore[arg-type]


def test_weights_that_cannot_be_had(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsError, match=r"cannot be had.*weights=<a local file>.*cache to .*hub"):
        OpenClipImageEmbedder("ViT-B-32", "openai").load()
    with pytest.raises(WeightsError, match=r"hf-hub:nobody/nothing gives no open_clip_config.json.*cache"):
        OpenClipImageEmbedder("hf-hub:nobody/nothing").load()
    with pytest.raises(WeightsError, match="no such file"):
        OpenClipImageEmbedder("ViT-S-32-alt", weights=tmp_path / "nosuch.pt").load()
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"other.pt does not hold weights of ViT-S-32-alt"):
        OpenClipImageEmbedder("ViT-S-32-alt", weights=tmp_path / "other.pt").load()
    with pytest.raises(ArgumentError, match="brings its own weights"):
        OpenClipImageEmbedder(name, weights=tmp_path / "other.pt").load()


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("pwned").touch, ())


def test_a_pickle_is_no_weights_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match="could run any code"):
        OpenClipImageEmbedder("ViT-S-32-alt", weights=tmp_path / "evil.pt").load()
    assert not (tmp_path / "pwned").exists()


def test_a_model_without_a_text_tower(tmp_path: Path) -> None:
    tmp_path.joinpath("open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": {}, "embed_dim": 3}}))
    with pytest.raises(ModelError, match="no text tower: TimmImageEmbedder"):
        OpenClipImageEmbedder(f"local-dir:{tmp_path}").load()


def test_a_tokenizer_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"tokenizer of ViT-B-16-SigLIP.*tokenizer=<a local folder.*cache to"):
        OpenClipImageEmbedder("ViT-B-16-SigLIP").load()


def test_other_pictures_for_a_tag_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = OpenClipModel("ViT-B-16-SigLIP", weights="x")
    open_clip_models.warn_of_other_preprocessing(model)
    assert "weights of webli want something else: say pretrained=" in caplog.text
    caplog.clear()
    open_clip_models.warn_of_other_preprocessing(OpenClipModel("ViT-B-16-SigLIP", "webli", "x"))
    assert not caplog.text


def test_pictures_are_prepared_as_the_tag_was_trained() -> None:
    siglip = OpenClipImageEmbedder("ViT-B-16-SigLIP", "webli").preprocessor("cpu", 1).spec
    assert siglip is not None
    assert (siglip.resize, siglip.mean, siglip.std) == ("exact", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    padded = OpenClipImageEmbedder("ViT-B-32", image_resize_mode="longest", image_mean=(0.1, 0.2, 0.3))
    spec = padded.preprocessor("cpu", 1).spec
    assert spec is not None
    assert (spec.resize, spec.longest, spec.mean) == ("ratio", 1.0, (0.1, 0.2, 0.3))


def test_openai_weights_are_run_with_quickgelu() -> None:
    assert open_clip_models.quick_gelu(OpenClipModel("ViT-B-32", "openai"))
    assert not open_clip_models.quick_gelu(OpenClipModel("ViT-B-32", "laion2b_s34b_b79k"))
    assert open_clip_models.quick_gelu(OpenClipModel("ViT-B-32-quickgelu"))
    assert open_clip_models.quick_gelu(OpenClipModel("ViT-B-32", force_quick_gelu=True))


def test_what_is_said_of_a_model_is_what_open_clip_builds(tmp_path: Path) -> None:
    said = {"resize_mode": "longest", "mean": [0.5, 0.4, 0.3], "interpolation": "bilinear", "fill_color": 7}
    name = write_model(tmp_path, {**TINY, "vision_cfg": {**TINY["vision_cfg"], "image_size": [32, 48]}}, said)  # type: ignore[dict-item]
    theirs, _, transform = open_clip.create_model_and_transforms(name)
    model = OpenClipModel(name)
    described = open_clip_models.describe(model)
    assert repr(described.transform) == repr(transform)
    assert described.input_size == (3, 32, 48)
    assert described.size == theirs.encode_text(torch.zeros(1, 24, dtype=torch.long)).shape[1]


def test_random_weights_are_said_and_seeded(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        OpenClipImageEmbedder("ViT-S-32-alt").load()
    assert "random network" in caplog.text


def test_fingerprints_tell_weights_preprocessing_and_captions(tmp_path: Path, name: str) -> None:
    make_dataset(tmp_path / "in", {"a": 1})
    other = write_model(tmp_path / "other", seed=4)
    makers = [
        {"model_name": name},
        {"model_name": other},
        {"model_name": name, "image_mean": (0.5, 0.5, 0.5)},
        {"model_name": name, "force_quick_gelu": True},
    ]
    dataset = load(tmp_path / "in")
    made = [OpenClipImageEmbedder(**one, autocast=False).prepare(dataset).fingerprint() for one in makers]  # type: ignore[arg-type]
    assert len({json.dumps({**one, "model": ""}, sort_keys=True) for one in made}) == 4
    lazy = [OpenClipImageEmbedder(name, autocast=False, captions=one)(dataset) for one in ("txt", "json:x")]
    assert lazy[0].provenance["image_embedding"] == lazy[1].provenance["image_embedding"]
    assert lazy[0].provenance["clip_score"] != lazy[1].provenance["clip_score"]


def test_columns_of_their_own_names(tmp_path: Path, name: str) -> None:
    make_dataset(tmp_path, {"a": 2})
    table = pq.read_table(tmp_path / "a.parquet").append_column("clip_caption", [["mine", "too"]])
    pq.write_table(table, tmp_path / "a.parquet")
    frame = embed(
        name,
        tmp_path,
        image_embedding_column="i",
        text_embedding_column="t",
        clip_score_column="s",
        embedding_dtype="float16",
    )
    assert frame["clip_caption"].tolist() == ["mine", "too"]
    assert frame["t"].dtype.pyarrow_dtype == pa.list_(pa.float16())
    cosines = (to_matrix(frame["i"])[0].astype(float) * to_matrix(frame["t"])[0].astype(float)).sum(1)
    assert np.allclose(frame["s"], cosines, atol=2e-3)
    with pytest.raises(ArgumentError, match="different names"):
        embed(name, tmp_path, clip_score_column="text_embedding")
