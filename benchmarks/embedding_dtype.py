"""Embeddings saved as float32 and as float16: bytes on disk and seconds, interleaved.

    python -m benchmarks.embedding_dtype --folder /some/disk

The network is that of `benchmarks.big_shards`: one layer, 1,280 numbers, so that writing counts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from statistics import median

from benchmarks.big_shards import MODEL, make, register

DTYPES = ("float32", "float16")


def main() -> None:
    """Measure."""
    from nemo_image.datasets import ImageTextPairDataset
    from nemo_image.embedders import TimmImageEmbedder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    register()
    source = args.folder / f"dtype-{args.rows}x{args.shards}"
    if not source.exists():
        make(source, args.rows, args.shards, 0)
    seconds: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    written = {}
    for number in range(args.rounds + 1):
        for dtype in DTYPES:
            out = args.folder / f"dtype-{dtype}"
            shutil.rmtree(out, ignore_errors=True)
            embedder = TimmImageEmbedder(MODEL, embedding_dtype=dtype, autocast=False, batch_size=256)
            started = time.perf_counter()
            embedder(ImageTextPairDataset.from_webdataset(source)).save_metadata(out)
            if number:  # the first round loads libraries
                seconds[dtype].append(round(time.perf_counter() - started, 2))
            written[dtype] = sum(path.stat().st_size for path in out.glob("*.parquet"))
    for dtype in DTYPES:
        facts = {"seconds": median(seconds[dtype]), "each": seconds[dtype], "bytes_a_row": written[dtype] / args.rows}
        print(json.dumps({"dtype": dtype, "rows": args.rows, **facts}))


if __name__ == "__main__":
    main()
