"""The embedding stage: the operator's embeddings, whatever way the pixels come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import TimmImageEmbedder
from nemo_image.embedders.preprocess import normalize, spec_from_transform
from nemo_image.embedders.timm_models import describe
from nemo_image.engine import threads
from nemo_image.errors import ArgumentError, UnknownModelError, WeightsError
from nemo_image.stages.base import RunContext
from nemo_image.stages.embedder import ImageEmbeddingStage
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.models import find_weights
from nemo_image.stages.tasks import FileGroup, ImageBatch
from tests.makers import TINY_MODEL, encoded, picture, sample, write_tar

COUNT = 23
FEW = 5  # images the model sees at once: 23 are no multiple


def blobs() -> list[bytes]:
    return [encoded(picture(seed, 64 + seed, 48 + 2 * seed), quality=90) for seed in range(COUNT)]


def images() -> list[ImageObject]:
    return [ImageObject(image_id=str(number), image_bytes=data) for number, data in enumerate(blobs())]


def stage(**options: Any) -> ImageEmbeddingStage:
    made = ImageEmbeddingStage(
        **{
            "model_name": TINY_MODEL,
            "random_weights": True,
            "autocast": False,
            "model_inference_batch_size": FEW,
            **options,
        }
    )
    return made.prepare(RunContext("test"))


def batches(sizes: list[int], some: list[ImageObject]) -> list[ImageBatch]:
    rest = iter(some)
    return [ImageBatch([next(rest) for _ in range(size)]) for size in sizes]


def embedded(one: ImageEmbeddingStage, tasks: list[ImageBatch]) -> np.ndarray:
    out = list(one.stream(iter(tasks), FileGroup()))
    assert [len(task.data) for task in out] == [len(task.data) for task in tasks]
    return np.stack([image.embedding for task in out for image in task.data])


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """What the operator makes of the same pictures."""
    folder = tmp_path_factory.mktemp("dataset")
    write_tar(folder / "00000.tar", [(f"{number:03d}", {"jpg": data}) for number, data in enumerate(blobs())])
    dataset = ImageTextPairDataset.from_webdataset(str(folder))
    made = TimmImageEmbedder(TINY_MODEL, autocast=False, batch_size=FEW)(dataset).metadata.compute(
        scheduler="synchronous"
    )
    return np.stack(made["image_embedding"].tolist()).astype(np.float32)


@pytest.mark.parametrize("sizes", [[23], [5, 5, 5, 5, 3], [1] * 23, [7, 0, 16], [0, 2, 21, 0]])
@pytest.mark.parametrize("share", [1, 3])
def test_the_operators_embeddings_to_the_last_bit(sizes: list[int], share: int, reference: np.ndarray) -> None:
    with threads.local_share(share):
        assert np.array_equal(embedded(stage(), batches(sizes, images())), reference)


def test_from_inputs_that_the_reader_made(reference: np.ndarray) -> None:
    one = stage()
    model_input = one.model_input()
    assert model_input is not None
    prepared = model_input.preprocessor(2)(blobs())
    some = images()
    for image, pixels in zip(some, prepared.pixels, strict=True):
        image.prepared[model_input.key] = pixels
        image.files = {}  # nothing is read again
    assert np.array_equal(embedded(one, batches([10, 13], some)), reference)
    assert all(not image.prepared for image in some)


def test_from_pixels_that_a_stage_has_looked_at(reference: np.ndarray) -> None:
    some = images()
    assert all(image.image_data is not None for image in some)
    assert np.array_equal(embedded(stage(), batches([23], some)), reference)


def test_pixels_that_a_stage_changed_are_what_is_embedded(reference: np.ndarray) -> None:
    some = images()
    one = stage()
    model_input = one.model_input()
    assert model_input is not None
    some[0].prepared[model_input.key] = model_input.preprocessor(1)([blobs()[0]]).pixels[0]
    some[0].image_data = some[1].image_data
    made = embedded(one, batches([23], some))
    assert not np.allclose(made[0], reference[0])
    assert np.allclose(made[0], reference[1], atol=1e-6)


def test_images_without_pixels_have_no_embedding(reference: np.ndarray) -> None:
    some = images()
    some[3].image_error = "truncated: told by the reader"
    some[4].image_bytes = b"no picture"
    some[5] = ImageObject(image_id="empty")
    out = list(stage().stream(iter(batches([23], some)), FileGroup()))
    made = [image.embedding for task in out for image in task.data]
    assert [row for row, vector in enumerate(made) if vector is None] == [3, 4, 5]
    assert some[3].image_error == "truncated: told by the reader"
    assert str(some[4].image_error).startswith("unknown:")
    assert str(some[5].image_error).startswith("missing:")
    assert np.allclose(
        np.stack([vector for vector in made if vector is not None]), np.delete(reference, [3, 4, 5], 0), atol=1e-6
    )


def test_remove_image_data_frees_pixels_and_keeps_the_file() -> None:
    some = images()
    assert some[0].image_data is not None
    list(stage(remove_image_data=True).stream(iter(batches([23], some)), FileGroup()))
    assert not some[0].holds_pixels
    assert some[0].image_bytes == blobs()[0]


def test_process_is_one_batch(reference: np.ndarray) -> None:
    made = stage().process(ImageBatch(images()))
    assert np.array_equal(np.stack([image.embedding for image in made.data]), reference)  # type: ignore[arg-type]


def test_fingerprint_is_the_operators(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", [sample(0, "0")])
    dataset = ImageTextPairDataset.from_webdataset(str(tmp_path))
    operator = TimmImageEmbedder(TINY_MODEL, autocast=False, batch_size=FEW)(dataset)
    assert stage().column_fingerprints()["image_embedding"] == operator.provenance["image_embedding"]


def test_weights_from_the_model_folder(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(7)
    model = timm.create_model(TINY_MODEL)
    save_file(model.state_dict(), tmp_path / f"{TINY_MODEL}.safetensors")
    one = stage(model_dir=str(tmp_path), random_weights=False)
    pixels = one.model_input().preprocessor(1)(blobs()[:2]).pixels  # type: ignore[union-attr]
    spec = spec_from_transform(describe(TINY_MODEL)[1])
    assert spec is not None
    with torch.inference_mode():
        features = model.eval().forward_features(normalize(pixels, spec))
        expected = model.forward_head(features, pre_logits=True).numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    made = embedded(one, batches([2], images()))
    assert np.allclose(made, expected, atol=1e-5)
    assert one.column_fingerprints()["image_embedding"]["weights_sha256"] != "random weights, seed 0"


def test_two_files_of_the_same_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / f"{TINY_MODEL}.pt").touch()
    assert find_weights(str(tmp_path), TINY_MODEL) == str(tmp_path / f"{TINY_MODEL}.pt")
    (tmp_path / f"{TINY_MODEL}.pth").touch()
    with pytest.raises(WeightsError, match="keep one of them"):
        stage(model_dir=str(tmp_path), random_weights=False)


def test_the_hubs_name_is_timms(tmp_path: Path) -> None:
    for name in ("vit_large_patch14_clip_quickgelu_224.openai.pt", "clip-vit-large-patch14.safetensors"):
        (tmp_path / name).touch()
        assert find_weights(str(tmp_path), "openai/clip-vit-large-patch14") == str(tmp_path / name)
        (tmp_path / name).unlink()
    assert find_weights(str(tmp_path), "openai/clip-vit-large-patch14") is None


def test_what_is_not_in_the_model_folder_is_brought_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_image.embedders import timm_models

    real = timm_models.create_model
    asked = []

    def hub(name: str, pretrained: bool, weights: str | None) -> Any:
        if pretrained:
            asked.append(name)
            return real(name, False, None)
        return real(name, pretrained, weights)

    monkeypatch.setattr(timm_models, "create_model", hub)
    folder = tmp_path / "models"
    for _ in range(2):
        stage(model_dir=str(folder), random_weights=False)
    assert asked == [TINY_MODEL]
    assert [path.name for path in folder.iterdir()] == [f"{TINY_MODEL}.safetensors"]


def test_the_number_type_of_an_earlier_run_stays() -> None:
    one = ImageEmbeddingStage(model_name=TINY_MODEL, random_weights=True)
    made = one.prepare(RunContext("test", settled={"image_embedding": {"dtype": "bfloat16"}}))
    assert made.settled() == {"dtype": "bfloat16"}
    assert made.column_fingerprints()["image_embedding"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_inference_batch_size": 0}, "model_inference_batch_size"),
        ({"num_gpus_per_worker": 2}, "gpus=2"),
        ({"model_dir": ""}, "model_dir"),
        ({"model_dir": "x", "random_weights": True}, "not both"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ImageEmbeddingStage(**options)


def test_an_unknown_model_is_an_error_before_any_task() -> None:
    with pytest.raises(UnknownModelError, match="did you mean"):
        stage(model_name="test_efficientnit")
