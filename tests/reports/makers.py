"""Datasets for reports: scores, copies, clusters, errors, and what hostile people write."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from tests.makers import encoded, picture, write_rows, write_tar

HOSTILE = (
    "<script>document.title = 'taken'</script>",
    '"><img src="http://127.0.0.1:9/x" onerror="document.title = \'taken\'">',
    "</style></title><h1 id=taken>taken</h1>",
    "\u202eright to left \u05e9\u05dc\u05d5\u05dd",
    "{{ 7 * 7 }} {% raw %} ${7*7}",
    "nul \x00 bell \x07 lone \ud800 end",
    "w" * 100_000,
    "\u0301" * 5_000,
    "",
)


def write_hostile(folder: Path, captions: tuple[str, ...] = HOSTILE, noise: bool = False, rows: int = 40) -> Path:
    """Write two shards whose captions, ids, column names, errors and values are what no page should believe."""
    rng = np.random.default_rng(3)
    for number, shard in enumerate(("a<b>", "plain")):
        keys = [f"{number}{row:04d}" for row in range(rows)]
        said = [captions[row % len(captions)].encode("utf-8", "replace").decode() for row in range(rows)]
        samples = []
        for row, key in enumerate(keys):
            data = _noise(rng) if noise else encoded(picture(row), "JPEG")
            members = {"jpg": data, "txt": said[row].encode(), "json": json.dumps({"key": key}).encode()}
            samples.append((key, members))
        write_tar(folder / f"{shard}.tar", samples)
        copies = [row % 4 == 3 for row in range(rows)]
        columns = {
            "key": keys,
            "caption": said,
            "aesthetic_score": rng.normal(5, 1, rows).astype(np.float32),
            "nsfw_score": rng.random(rows).astype(np.float32),
            "<script>alert(1)</script>": rng.random(rows),
            "note": [captions[-1 - row % len(captions)].encode("utf-8", "replace").decode() for row in range(rows)],
            "image_error": ["<b>bold</b>: <i>x</i>" if row % 9 == 1 else None for row in range(rows)],
            "cluster": pa.array([row % 3 for row in range(rows)], pa.int32()),
            "is_duplicate": copies,
            "duplicate_of": [f"{number}{row - 1:04d}" if copies[row] else None for row in range(rows)],
            "duplicate_of_shard": [shard if copies[row] else None for row in range(rows)],
            "duplicate_tier": ["<u>tier</u>" if copies[row] else None for row in range(rows)],
            "max_similarity": rng.random(rows).astype(np.float32),
        }
        write_rows(folder / f"{shard}.parquet", pa.table(columns))
    return folder


def _noise(rng: np.random.Generator) -> bytes:
    from PIL import Image

    return encoded(Image.fromarray(rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)), "JPEG", quality=95)
