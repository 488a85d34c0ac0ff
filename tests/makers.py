"""Small datasets that tests make themselves: real pictures' formats, made-up content, tars written by `tarfile`."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

TINY_MODEL = "test_efficientnet"
"""timm's smallest convolutional network; without weights it is seeded, the same everywhere."""


def picture(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    """Return a picture of coloured blobs that differs from that of every other seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """Return a picture's bytes."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def sample(seed: int, key: str, caption: str | None = None, **fields: Any) -> tuple[str, dict[str, bytes]]:
    """Return a sample: its key, and its members by extension."""
    members = {"jpg": encoded(picture(seed), quality=90)}
    if caption is not None:
        members["txt"] = caption.encode()
    members["json"] = json.dumps({"key": key, "seed": seed, **fields}).encode()
    return key, members


def write_tar(path: Path, samples: Sequence[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write samples as a tar, with the standard library's own writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_rows(path: Path, rows: Mapping[str, Sequence[Any]] | pa.Table) -> None:
    """Write a shard's metadata."""
    table = rows if isinstance(rows, pa.Table) else pa.table({name: list(values) for name, values in rows.items()})
    pq.write_table(table, path)


def make_dataset(folder: Path, sizes: Mapping[str, int], first_seed: int = 0) -> Path:
    """Write shards of good samples, with Parquet metadata: key, caption, seed (which picture), score."""
    seed = first_seed
    for name, size in sizes.items():
        seeds = list(range(seed, seed + size))
        seed += size
        keys = [f"{number:06d}" for number in seeds]
        captions = [f"picture number {number}" for number in seeds]
        samples = [sample(one, key, caption) for one, key, caption in zip(seeds, keys, captions, strict=True)]
        write_tar(folder / f"{name}.tar", samples)
        score = [one / 10 for one in seeds]
        write_rows(folder / f"{name}.parquet", {"key": keys, "caption": captions, "seed": seeds, "score": score})
    return folder


def tar_members(path: Path) -> dict[str, bytes]:
    """Return a tar's members by name, read by the standard library."""
    with tarfile.open(path) as tar:
        found = {}
        for info in tar:
            file = tar.extractfile(info)
            assert file is not None
            found[info.name] = file.read()
        return found
