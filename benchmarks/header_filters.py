"""Images a second of the filters that need no model, against decoding alone.

    python -m benchmarks.header_filters PHOTOS

One shard of 2,000 samples (the JPEGs of the folder PHOTOS, over and over, each with a caption), one thread, everything
in the page cache. Each filter computes its columns as a save does: index of the tar, ids matched, columns as Arrow.
Decoding is `decode_rgb` of the same bytes, already in memory, with torchvision's decoder and with Pillow's. Processor
time; turns alternate; medians, and the median of the ratios within turns.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.filters import (
    Blocklist,
    CaptionDuplicates,
    CaptionLanguage,
    CaptionStats,
    ImageQualityStats,
    ImageSizeStats,
)
from nemo_image.shards.decode import decode_rgb
from nemo_image.shards.sources import LocalSource

SAMPLES = 2000
CAPTION = "a photograph of number {} with people who walk along a street in the rain"


def write_shard(folder: Path, photos: Sequence[bytes]) -> None:
    """Write a shard with its metadata."""
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number in range(SAMPLES):
            for name, data in (("jpg", photos[number % len(photos)]), ("txt", CAPTION.format(number).encode())):
                info = tarfile.TarInfo(f"{number:06d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    keys = [f"{number:06d}" for number in range(SAMPLES)]
    captions = [CAPTION.format(number) for number in range(SAMPLES)]
    pq.write_table(pa.table({"key": keys, "caption": captions}), folder / "00000.parquet")


def seconds(work: Callable[[], Any]) -> float:
    """Return the processor time that a call takes."""
    began = time.process_time()
    work()
    return time.process_time() - began


def bytes_read(work: Callable[[], Any]) -> int:
    """Return how many bytes of the tar a call reads."""
    sizes: list[int] = []
    read_at = LocalSource.read_at

    def counting(self: LocalSource, offset: int, size: int) -> bytes:
        sizes.append(size)
        return read_at(self, offset, size)

    LocalSource.read_at = counting  # type: ignore[method-assign]
    try:
        work()
    finally:
        LocalSource.read_at = read_at  # type: ignore[method-assign]
    return sum(sizes)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    photos = [path.read_bytes() for path in sorted(arguments.photos.glob("*.jpg"))]
    blobs = [photos[number % len(photos)] for number in range(SAMPLES)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shard(folder, photos)
        dataset = ImageTextPairDataset.from_webdataset(folder)
        bare = ImageTextPairDataset.from_webdataset(folder)
        bare.metadata = bare.metadata.drop(columns=["caption"])
        listed = [str(number) for number in range(100_000)]
        filters: dict[str, tuple[Any, list[str]]] = {
            "ImageSizeStats": (ImageSizeStats()(dataset), ["width", "height", "aspect_ratio"]),
            "CaptionStats, a column": (CaptionStats()(dataset), ["caption_length", "caption_words"]),
            "CaptionStats, the tar's": (CaptionStats()(bare), ["caption_length", "caption_words"]),
            "CaptionLanguage": (CaptionLanguage()(dataset), ["caption_language"]),
            "Blocklist, 100,000 ids": (Blocklist(listed)(dataset), ["blocked"]),
            "Blocklist, SHA-256 of bytes": (Blocklist([], content_hash="sha256")(dataset), ["blocked"]),
            "ImageQualityStats": (ImageQualityStats(num_threads=1)(dataset), ["blur", "brightness"]),
        }
        works: dict[str, Callable[[], Any]] = {
            label: lambda made=made, names=names: made.metadata[names].compute(scheduler="synchronous")
            for label, (made, names) in filters.items()
        }
        works["CaptionDuplicates, all passes"] = lambda: CaptionDuplicates(output_dir=tempfile.mkdtemp(dir=folder))(
            dataset
        )
        works["decoding, torchvision"] = lambda: [decode_rgb(blob) for blob in blobs]
        works["decoding, Pillow"] = lambda: [decode_rgb(blob, decoder="pillow") for blob in blobs]
        taken: dict[str, list[float]] = {label: [] for label in works}
        for turn in range(arguments.turns + 1):
            for label, work in works.items():
                once = seconds(work)
                if turn:  # the first one warms up
                    taken[label].append(once)
        size = (folder / "00000.tar").stat().st_size
        print(f"{SAMPLES} samples, {size / 1e6:.0f} MB")
        print("| what | images/s of a core | times decoding (torchvision) | bytes of the tar read |")
        print("|---|---|---|---|")
        fastest = taken["decoding, torchvision"]
        for label, some in taken.items():
            ratio = median(base / one for base, one in zip(fastest, some, strict=True))
            read = "" if label.startswith("decoding") else f"{bytes_read(works[label]) / size:.1%}"
            print(f"| {label} | {SAMPLES / median(some):,.0f} | {ratio:.1f} | {read} |")


if __name__ == "__main__":
    main()
