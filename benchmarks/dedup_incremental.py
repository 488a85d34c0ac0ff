"""Ten shards deduplicated at once, against eight and then two more: what differs, by the order of judging.

    python -m benchmarks.dedup_incremental --rows 20000

Both ways use the same centroids and ``representative=True``. A third of the rows are near copies of others, which lie
in any shard.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.dedup import SemanticDedup
from tests.dedup.makers import clustered_vectors, computed, write_embeddings

ORDERS: list[Any] = [("day", True), ("day", False), "hard", "easy", "random"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--eps", type=float, default=0.085)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = arguments.rows
    vectors = clustered_vectors(rows, arguments.size, rows // 20, 0.3)
    day = (np.arange(rows) * 10 // rows).tolist()
    print(f"{rows:,} rows of {arguments.size}, eps {arguments.eps}, 5 clusters")
    print("| order | removed at once | removed in steps | rows that fall in one way only | other differences |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        whole = write_embeddings(root / "data", list(vectors), 10, day=day)
        tars = [f"{root}/data/{number:05d}.tar" for number in range(10)]
        old, new = (ImageTextPairDataset.from_webdataset(part) for part in (tars[:8], tars[8:]))
        SemanticDedup(n_clusters=5, output_dir=root / "centroids")(whole)
        for number, order in enumerate(ORDERS):
            settings: dict[str, Any] = {"eps": arguments.eps, "which_to_keep": order}
            centroids = str(root / "centroids" / "kmeans_centroids.npy")
            at_once = computed(SemanticDedup(centroids=centroids, **settings)(whole))
            earlier = str(root / f"old-{number}")
            steps = [
                computed(SemanticDedup(centroids=centroids, output_dir=earlier, **settings)(old)),
                computed(SemanticDedup(against=earlier, **settings)(new)),
            ]
            in_steps = pd.concat(steps).sort_values("key").reset_index(drop=True)
            fall = at_once["is_duplicate"] != in_steps["is_duplicate"]
            differ = at_once["max_similarity"] != in_steps["max_similarity"]
            differ |= at_once["duplicate_of"].fillna("") != in_steps["duplicate_of"].fillna("")
            others = int((differ & ~fall).sum())
            removed = [int(one["is_duplicate"].sum()) for one in (at_once, in_steps)]
            print(f"| {order} | {removed[0]:,} | {removed[1]:,} | {int(fall.sum()):,} | {others:,} |", flush=True)


if __name__ == "__main__":
    main()
