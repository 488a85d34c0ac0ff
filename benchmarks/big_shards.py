"""Peak memory of enriching and exporting the same rows in one big shard, and in ten times as many shards.

    python -m benchmarks.big_shards --rows 1000000 --folder /some/disk

Rows: tiny pictures, embedded in 1,280 numbers by a network of one layer. `--bytes` makes a tar of that size instead, of
few and large members. Each job runs in a process of its own, whose peak RSS is what the kernel says (``ru_maxrss``).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from nemo_image.shards.write import TarWriter

SIZE = 1280
MODEL = "benchmark_one_layer"
DIFFERENT_PICTURES = 256


PIXELS = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "num_classes": 0,
    "architecture": MODEL,
}


def register() -> None:
    """Give timm a network that costs nearly nothing."""
    import torch
    from timm.models import register_model

    class OneLayer(torch.nn.Module):
        """Means of 4 x 4 fields, and one linear layer."""

        num_features = SIZE

        def __init__(self) -> None:
            super().__init__()
            self.pretrained_cfg = self.default_cfg = PIXELS
            self.layer = torch.nn.Linear(3 * 4 * 4, SIZE)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1))

    def benchmark_one_layer(pretrained: bool = False, **kwargs: object) -> OneLayer:
        return OneLayer()

    benchmark_one_layer.__module__ = __name__
    register_model(benchmark_one_layer)


def make(folder: Path, rows: int, shards: int, payload: int) -> None:
    """Write the dataset: `rows` rows in all, each with `payload` bytes of further data in its sample."""
    folder.mkdir(parents=True)
    pictures = []
    for seed in range(DIFFERENT_PICTURES):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).resize((32, 32)).save(out, "JPEG")
        pictures.append(out.getvalue())
    block = os.urandom(2**20)
    each = rows // shards
    for shard in range(shards):
        keys = [f"{shard:04d}{row:08d}" for row in range(each)]
        with open(folder / f"{shard:04d}.tar", "wb", buffering=2**20) as file, TarWriter(file) as tar:
            for row, key in enumerate(keys):
                tar.add(f"{key}.jpg", pictures[row % DIFFERENT_PICTURES])
                if payload:
                    parts = [block] * (payload // len(block)) + [block[: payload % len(block)]]
                    tar.add_from(f"{key}.npy", payload, parts)
        # One row group, as pandas and img2dataset write.
        pq.write_table(pa.table({"key": keys, "seed": list(range(each))}), folder / f"{shard:04d}.parquet")


def enrich(folder: Path, out: Path) -> None:
    """Embed and save."""
    from nemo_image.datasets import ImageTextPairDataset
    from nemo_image.embedders import TimmImageEmbedder

    register()
    dataset = ImageTextPairDataset.from_webdataset(folder)
    TimmImageEmbedder(MODEL, autocast=False, batch_size=256)(dataset).save_metadata(out / "enriched")


def export(folder: Path, out: Path) -> None:
    """Export all rows."""
    from nemo_image.datasets import ImageTextPairDataset

    dataset = ImageTextPairDataset.from_webdataset(out / "enriched")
    dataset.metadata["keep"] = dataset.metadata["seed"] >= 0
    dataset.to_webdataset(out / "new", "keep")


def measured(job: str, folder: Path, out: Path) -> dict[str, float]:
    """Run one job in a process of its own."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.big_shards", "--job", job, "--folder", folder, "--out", out],
        stdout=subprocess.PIPE,
        check=True,
    )
    peak_kib = int(done.stdout.split()[-1])
    return {"peak_rss_mib": round(peak_kib / 1024), "seconds": round(time.monotonic() - started, 1)}


def main() -> None:
    """Measure, or do one job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--job", choices=["enrich", "export"])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--payload", type=int, default=0, help="bytes beside each picture")
    args = parser.parse_args()
    if args.job:
        {"enrich": enrich, "export": export}[args.job](args.folder, args.out)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    for shards in args.shards:
        folder, out = args.folder / f"in-{shards}", args.folder / f"out-{shards}"
        make(folder, args.rows, shards, args.payload)
        tar_bytes = sum(path.stat().st_size for path in folder.glob("*.tar"))
        for job in ("enrich", "export"):
            found = measured(job, folder, out)
            print(json.dumps({"job": job, "rows": args.rows, "shards": shards, "tar_bytes": tar_bytes, **found}))


if __name__ == "__main__":
    main()
