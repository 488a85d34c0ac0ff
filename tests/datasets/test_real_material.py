"""The main job on real photographs and awkward files, with real trained weights. Skips where they are not there."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps

from nemo_image.backend import to_matrix
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import TimmImageEmbedder
from tests.makers import write_rows, write_tar

MODEL = "tf_efficientnet_lite0"
PROMISED_COSINE = 0.999

DECODERS = [
    "torchvision",
    "pillow",
    pytest.param(
        "dali",
        marks=pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None, reason="DALI is not installed"),
    ),
]


def embedded(folder: Path, out: Path, weights: Path, decoder: str) -> ImageTextPairDataset:
    embedder = TimmImageEmbedder(MODEL, weights=weights, decoder=decoder, autocast=False)  # type: ignore[arg-type]
    return embedder(ImageTextPairDataset.from_webdataset(str(folder))).save_metadata(out)


@pytest.fixture(scope="module")
def reference(shared: Path) -> Any:
    """timm's own transform and model, as an image-to-vector function."""
    import timm
    import torch

    overlay = {"file": str(shared / "weights" / "tf_efficientnet_lite0.pth")}
    model = timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)

    def embed(image: Image.Image) -> np.ndarray:
        with torch.inference_mode():
            vector = model(transform(image.convert("RGB"))[None])[0].double().numpy()
        return vector / np.linalg.norm(vector)

    return embed


@pytest.fixture(scope="module", params=["as they are", "4:2:0"])
def photos(request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    lines = (shared / "data" / "photos" / "captions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for number in range(4):
        part = rows[number::4]
        samples = []
        for row in part:
            data = (shared / "data" / "photos" / row["file"]).read_bytes()
            if request.param == "4:2:0":
                out = io.BytesIO()
                Image.open(io.BytesIO(data)).convert("RGB").save(out, "JPEG", quality=90, subsampling=2)
                data = out.getvalue()
            samples.append((Path(row["file"]).stem, {"jpg": data, "txt": row["captions"][0].encode()}))
        write_tar(folder / f"{number:05d}.tar", samples)
        captions = [row["captions"][0] for row in part]
        write_rows(folder / f"{number:05d}.parquet", {"key": [key for key, _ in samples], "caption": captions})
    return folder


@pytest.fixture(scope="module")
def photo_vectors(photos: Path, reference: Any) -> dict[str, np.ndarray]:
    """Each photograph's embedding by timm's own transform and model."""
    vectors = {}
    for tar_path in photos.glob("*.tar"):
        with tarfile.open(tar_path) as tar:
            for info in tar:
                if info.name.endswith(".jpg"):
                    vectors[info.name[:-4]] = reference(Image.open(tar.extractfile(info)))  # type: ignore[arg-type]
    return vectors


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
def test_photographs_agree_with_timm(
    photos: Path, shared: Path, photo_vectors: dict[str, np.ndarray], decoder: str, tmp_path: Path
) -> None:
    done = embedded(photos, tmp_path, shared / "weights" / "tf_efficientnet_lite0.pth", decoder)
    frame = done.metadata.compute()
    matrix, rows = to_matrix(frame["image_embedding"])
    assert len(rows) == len(frame) == 184
    vectors = photo_vectors
    cosines = [vector.astype(np.float64) @ vectors[key] for vector, key in zip(matrix, frame["key"], strict=True)]
    assert min(cosines) >= PROMISED_COSINE
    # Another photograph is far away: the check can fail.
    others = [vector.astype(np.float64) @ vectors[key] for vector, key in zip(matrix, frame["key"][::-1], strict=True)]
    assert np.median(others) < 0.9


@pytest.fixture(scope="module")
def odd(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("odd")
    manifest = json.loads((shared / "data" / "odd" / "manifest.json").read_text())
    samples = []
    for number, entry in enumerate(manifest):
        extension = entry["file"].rsplit(".", 1)[1]
        samples.append((f"{number:05d}", {extension: (shared / "data" / "odd" / entry["file"]).read_bytes()}))
    write_tar(folder / "a.tar", samples)
    write_rows(
        folder / "a.parquet",
        {
            "key": [key for key, _ in samples],
            "file": [entry["file"] for entry in manifest],
            "kind": [entry["kinds"][0] for entry in manifest],
        },
    )
    return folder, manifest


@pytest.fixture(scope="module")
def odd_rows(
    odd: tuple[Path, list[dict[str, Any]]], shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, pd.DataFrame]:
    decoders = ["torchvision", "pillow", *(["dali"] if importlib.util.find_spec("nvidia.dali") else [])]
    weights = shared / "weights" / "tf_efficientnet_lite0.pth"
    return {
        one: embedded(odd[0], tmp_path_factory.mktemp(f"odd-{one}"), weights, one).metadata.compute()
        for one in decoders
    }


ALWAYS_FAIL = {"bomb", "truncated", "oserror_other"}


def test_every_odd_file_is_an_embedding_or_a_reason(odd_rows: dict[str, pd.DataFrame]) -> None:
    for decoder, frame in odd_rows.items():
        assert len(frame) == 139, decoder
        has_vector, has_reason = frame["image_embedding"].notna(), frame["image_error"].notna()
        assert (has_vector ^ has_reason).all(), decoder
        for kind, group in frame.groupby("kind"):
            if kind in ALWAYS_FAIL or str(kind).startswith("odd_exception"):
                assert group["image_error"].notna().all(), (decoder, kind)
            else:
                assert group["image_embedding"].notna().all(), (decoder, kind)


def test_decoders_agree_on_what_is_an_image(odd_rows: dict[str, pd.DataFrame]) -> None:
    good = {decoder: frame["image_error"].isna().tolist() for decoder, frame in odd_rows.items()}
    assert all(one == good["pillow"] for one in good.values())


def test_exif_rotated_pictures_agree_with_the_upright_ones(
    odd_rows: dict[str, pd.DataFrame], shared: Path, reference: Any
) -> None:
    for decoder, frame in odd_rows.items():
        rotated = frame[frame["kind"] == "exif_rotated"]
        assert len(rotated) == 12
        matrix, _ = to_matrix(rotated["image_embedding"])
        turned = 0
        for vector, name in zip(matrix, rotated["file"], strict=True):
            image = Image.open(shared / "data" / "odd" / name)
            upright = reference(ImageOps.exif_transpose(image))
            assert vector.astype(np.float64) @ upright >= PROMISED_COSINE, (decoder, name)
            turned += bool(vector.astype(np.float64) @ reference(image) < PROMISED_COSINE)
        # As stored, most of them look different to the network: the check can fail.
        assert turned >= 9, decoder
