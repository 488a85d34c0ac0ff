"""Sizes, blur and brightness against Pillow, scipy and numpy; what is read, and what becomes of bad files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import ndimage

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import TimmImageEmbedder
from nemo_image.errors import RunError
from nemo_image.filters import CaptionStats, ImageQualityStats, ImageSizeStats
from nemo_image.filters.image_size import size_from_file, size_from_head
from nemo_image.filters.luma import laplacian_variance, luma_of
from nemo_image.shards.sources import LocalSource
from tests.makers import TINY_MODEL, encoded, make_dataset, picture, write_rows, write_tar

ACCEPTED = {"JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"}


def dataset_of(folder: Path, files: dict[str, bytes]) -> ImageTextPairDataset:
    """One shard of the files, each a sample called by its number."""
    samples = [(f"{number:04d}", {name.rsplit(".", 1)[1]: data}) for number, (name, data) in enumerate(files.items())]
    write_tar(folder / "00000.tar", samples)
    write_rows(folder / "00000.parquet", {"key": [key for key, _ in samples], "name": list(files)})
    return ImageTextPairDataset.from_webdataset(folder)


def stored_size(data: bytes) -> tuple[int, int] | None:
    """What Pillow alone says of a file."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format not in ACCEPTED:
                return None
            if image.format == "TIFF":  # Pillow swaps a TIFF's sides by its orientation
                return image.tag_v2[256], image.tag_v2[257]  # type: ignore[attr-defined,no-any-return]
            return image.size
    except Exception:
        return None


def grey(data: bytes) -> np.ndarray:
    """Luma by the weights of BT.601, over Pillow's pixels."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float64) @ np.array([0.299, 0.587, 0.114])


def made_files() -> dict[str, bytes]:
    shot = picture(1, 90, 40)
    exif = Image.Exif()
    exif[274] = 6
    exif[0x9286] = b"x" * 30_000  # a comment so long that the picture's size stands behind the first 4 KiB
    return {
        "plain.jpg": encoded(shot),
        "turned.jpg": encoded(shot, exif=exif),
        "progressive.jpg": encoded(picture(2, 33, 77), progressive=True),
        "grey.jpg": encoded(shot.convert("L")),
        "cmyk.jpg": encoded(shot.convert("CMYK")),
        "noise.png": encoded(Image.effect_noise((300, 200), 50).convert("RGB"), "PNG"),
        "x.gif": encoded(shot, "GIF"),
        "x.webp": encoded(shot, "WEBP"),
        "x.bmp": encoded(shot, "BMP"),
        "x.tif": encoded(shot, "TIFF"),
        "x.avif": encoded(shot, "AVIF"),
    }


def test_sizes_are_those_of_the_stored_files(tmp_path: Path) -> None:
    files = made_files()
    frame = ImageSizeStats()(dataset_of(tmp_path, files)).metadata.compute()
    assert list(zip(frame["width"], frame["height"], strict=True)) == [stored_size(data) for data in files.values()]
    ratios = [max(size) / min(size) for size in map(stored_size, files.values()) if size is not None]
    assert np.allclose(frame["aspect_ratio"].to_numpy(float), ratios, rtol=1e-6)
    assert frame["image_error"].isna().all()
    assert [str(frame.dtypes[name]) for name in ("width", "aspect_ratio")] == ["int32[pyarrow]", "float[pyarrow]"]


def test_only_heads_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.effect_noise((800, 600), 90).convert("RGB")
    files = {f"{number}.jpg": encoded(noise, quality=95) for number in range(8)}
    exif = Image.Exif()
    exif[0x9286] = b"x" * 30_000
    files["long.jpg"] = encoded(noise, quality=95, exif=exif)
    dataset = ImageSizeStats()(dataset_of(tmp_path, files))
    read: list[int] = []
    read_at = LocalSource.read_at

    def counting(self: LocalSource, offset: int, size: int) -> bytes:
        read.append(size)
        return read_at(self, offset, size)

    monkeypatch.setattr(LocalSource, "read_at", counting)
    frame = dataset.metadata.compute()
    assert (frame["width"] == 800).all()
    stored = sum(map(len, files.values()))
    # The tar's own headers, 4 KiB of each picture, and 64 KiB of the one with a long header.
    assert stored > 2_000_000
    assert sum(read) < stored / 10


def test_bad_files_have_reasons_and_stop_nothing(tmp_path: Path) -> None:
    good = encoded(picture(1))
    files = {
        "good.jpg": good,
        "text.jpg": b"no picture at all",
        "empty.jpg": b"",
        "cut.jpg": good[: len(good) // 2],
        "header.jpg": good[:100],
        "bomb.png": encoded(Image.new("1", (20000, 20000)), "PNG"),
        "good2.jpg": good,
    }
    dataset = dataset_of(tmp_path, files)
    saved = ImageSizeStats()(dataset).save_metadata(tmp_path / "sizes")
    frame = saved.metadata.compute().set_index("name")
    assert frame["width"].notna().tolist() == [True, False, False, True, False, False, True]  # a cut one has a header
    assert frame["image_error"].isna().tolist() == frame["width"].notna().tolist()
    assert frame["image_error"]["bomb.png"].startswith("bomb:")
    assert (saved.run_totals or {})["failures"] == {"bomb": 1, "empty": 1, "truncated": 1, "unknown": 1}
    decoded = ImageQualityStats()(dataset).metadata.compute().set_index("name")
    assert decoded["blur"].notna().tolist() == [True, False, False, False, False, False, True]
    assert decoded["image_error"].isna().tolist() == decoded["blur"].notna().tolist()


def test_blur_is_the_variance_of_the_laplacian() -> None:
    rng = np.random.default_rng(3)
    for shape in ((1, 1), (1, 7), (7, 1), (2, 2), (48, 64), (1500, 1100)):
        luma = rng.integers(0, 256, shape, dtype=np.uint8)
        edges = ndimage.laplace(luma.astype(np.float64), mode="mirror")
        assert laplacian_variance(luma) == pytest.approx(edges.var(), rel=1e-12, abs=1e-12)


def test_blur_and_brightness_of_pictures(tmp_path: Path, scheduler: Any) -> None:
    sharp = Image.effect_noise((120, 80), 60).convert("RGB")
    files = {
        "sharp.png": encoded(sharp, "PNG"),
        "soft.png": encoded(sharp.resize((30, 20)).resize((120, 80), Image.Resampling.BICUBIC), "PNG"),
        "black.png": encoded(Image.new("RGB", (9, 9)), "PNG"),
        "white.png": encoded(Image.new("RGB", (9, 9), "white"), "PNG"),
        "clear.png": encoded(Image.new("RGBA", (9, 9), (0, 0, 0, 0)), "PNG"),
        "red.png": encoded(Image.new("RGB", (9, 9), (255, 0, 0)), "PNG"),
    }
    frame = ImageQualityStats()(dataset_of(tmp_path, files)).metadata.compute().set_index("name")
    assert frame["blur"]["sharp.png"] > 10 * frame["blur"]["soft.png"] > 0
    assert frame["brightness"].loc["black.png":].tolist() == [0.0, 255.0, 255.0, pytest.approx(0.299 * 255, abs=0.5)]
    for name in ("sharp.png", "soft.png"):
        assert frame["brightness"][name] == pytest.approx(grey(files[name]).mean(), abs=0.5)
        oracle = ndimage.laplace(np.rint(grey(files[name])), mode="mirror").var()
        assert frame["blur"][name] == pytest.approx(oracle, rel=0.02)


def test_one_reading_gives_sizes_too(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 3})
    dataset = ImageTextPairDataset.from_webdataset(tmp_path)
    both = ImageQualityStats(sizes=True)(dataset).metadata.compute()
    alone = ImageSizeStats()(dataset).metadata.compute()
    for name in ("width", "height", "aspect_ratio"):
        pd.testing.assert_series_equal(both[name], alone[name])


def test_columns_that_came_with_the_data_stay(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1", {"jpg": encoded(picture(1, 80, 40))})])
    write_rows(tmp_path / "a.parquet", {"key": ["1"], "width": [4000], "height": [2000]})
    frame = ImageSizeStats()(ImageTextPairDataset.from_webdataset(tmp_path)).metadata.compute()
    assert frame[["width", "height", "aspect_ratio"]].iloc[0].tolist() == [4000, 2000, 2.0]


def test_a_rerun_computes_nothing_and_new_columns_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path, {"a": 3, "b": 2})

    def filtered() -> ImageTextPairDataset:
        dataset = ImageTextPairDataset.from_webdataset(tmp_path)
        return ImageQualityStats()(ImageSizeStats()(dataset))

    first = filtered().save_metadata()
    assert (first.run_totals or {})["results"]["blur"] == 5
    assert (filtered().save_metadata().run_totals or {})["shards"] == {"done": 0, "skipped": 2, "failed": 0}
    called = []
    for cls in ("image_size.SizeColumns", "image_quality.QualityColumns"):
        monkeypatch.setattr(f"nemo_image.filters.{cls}.__call__", lambda self, frame: called.append(type(self)))
    more = CaptionStats()(filtered()).save_metadata()
    assert called == []
    assert (more.run_totals or {})["shards"]["done"] == 2
    assert more.metadata["blur"].compute().tolist() == first.metadata["blur"].compute().tolist()


def test_what_an_embedder_said_of_bad_pictures_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = encoded(picture(1))
    dataset = dataset_of(tmp_path, {"good.jpg": good, "cut.jpg": good[: len(good) // 2]})
    TimmImageEmbedder(TINY_MODEL, autocast=False)(dataset).save_metadata()
    before = ImageTextPairDataset.from_webdataset(tmp_path)
    reasons = before.metadata["image_error"].compute().tolist()
    assert pd.isna(reasons[0])
    assert pd.notna(reasons[1])
    after = ImageSizeStats()(before).save_metadata()
    assert after.metadata["image_error"].compute().tolist()[1] == reasons[1]
    assert after.provenance["image_error"] == before.provenance["image_error"]

    def fail(*given: Any) -> None:
        raise AssertionError("embedded again")

    monkeypatch.setattr("nemo_image.embedders.base.EmbedPartition.__call__", fail)
    again = TimmImageEmbedder(TINY_MODEL, autocast=False)(ImageTextPairDataset.from_webdataset(tmp_path))
    assert (again.save_metadata().run_totals or {})["shards"]["skipped"] == 1


def test_an_unreadable_tar_fails_its_shard(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "b.tar").write_bytes(b"garbage" * 300)
    with pytest.raises(RunError, match=r"b\.tar"):
        ImageSizeStats()(ImageTextPairDataset.from_webdataset(tmp_path)).save_metadata(tmp_path / "out")
    assert (tmp_path / "out" / "a.parquet").exists()


def test_heads_say_what_whole_files_say() -> None:
    for name, data in made_files().items():
        for size in (2**12, 2**16):
            head = size_from_head(data[:size])
            assert head in (None, stored_size(data)), (name, size)
        assert size_from_file(data) == stored_size(data)


@pytest.mark.parametrize("folder", ["photos", "odd"])
def test_the_shared_pictures(folder: str, shared: Path, tmp_path: Path) -> None:
    endings = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
    paths = sorted(path for path in (shared / "data" / folder).iterdir() if path.suffix.lower() in endings)
    files = {path.name.replace("#", "_"): path.read_bytes() for path in paths}
    frame = ImageQualityStats()(ImageSizeStats()(dataset_of(tmp_path, files))).metadata.compute().set_index("name")
    differ = []
    for name, data in files.items():
        width, height = frame["width"][name], frame["height"][name]
        found = None if pd.isna(width) else (width, height)
        if found != stored_size(data):
            differ.append((name, found, stored_size(data)))
    assert differ == []
    for name, data in files.items():
        if folder == "photos":
            luma = grey(data)
            assert frame["brightness"][name] == pytest.approx(luma.mean(), abs=0.1)
            assert frame["blur"][name] == pytest.approx(
                ndimage.laplace(np.rint(luma), mode="mirror").var(), rel=0.01, abs=0.5
            )
        else:
            assert pd.isna(frame["blur"][name]) == pd.isna(frame["brightness"][name])
            assert pd.notna(frame["blur"][name]) or pd.notna(frame["image_error"][name])


def test_luma_is_pillows() -> None:
    shot = picture(4)
    assert (luma_of(np.asarray(shot)) == np.asarray(shot.convert("L"))).all()
