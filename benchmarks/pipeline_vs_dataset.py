"""The pipeline of stages beside the dataset interface, on the same tars: are the results equal, and the times?

Runs alternate in one process tree, and what is compared is the median. Both write the results as Parquet.

    python benchmarks/pipeline_vs_dataset.py TARS MODELS --model openai/clip-vit-large-patch14 --heads
    python benchmarks/pipeline_vs_dataset.py TARS MODELS --model tf_efficientnet_lite0 --repeat 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from nemo_image.classifiers import AestheticClassifier, NsfwClassifier
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import TimmImageEmbedder
from nemo_image.engine.client import get_client
from nemo_image.pipeline import Pipeline
from nemo_image.stages import (
    FilePartitioningStage,
    ImageAestheticFilterStage,
    ImageEmbeddingStage,
    ImageNSFWFilterStage,
    ImageReaderStage,
    ImageWriterStage,
)
from nemo_image.stages.models import find_weights, timm_name

SCORES = ("image_embedding", "aesthetic_score", "nsfw_score")


def by_pipeline(chosen: argparse.Namespace, target: str) -> None:
    """Embed and score with stages."""
    models = chosen.models
    pipeline = Pipeline("benchmark", stages=[FilePartitioningStage(chosen.tars)])
    pipeline.add_stage(ImageReaderStage(batch_size=chosen.batch, num_threads=4, num_gpus_per_worker=0, verbose=False))
    pipeline.add_stage(
        ImageEmbeddingStage(model_dir=models, model_name=chosen.model, num_gpus_per_worker=0, autocast=False)
    )
    if chosen.heads:
        pipeline.add_stage(ImageAestheticFilterStage(model_dir=models, num_gpus_per_worker=0, filter=False))
        pipeline.add_stage(ImageNSFWFilterStage(model_dir=models, num_gpus_per_worker=0, filter=False))
    pipeline.add_stage(ImageWriterStage(output_dir=target, write_images=False))
    pipeline.run()


def by_dataset(chosen: argparse.Namespace, target: str) -> None:
    """Embed and score with operators."""
    heads = [
        kind(model_path=f"{chosen.models}/{kind.source.filename}") for kind in (AestheticClassifier, NsfwClassifier)
    ]
    embedder = TimmImageEmbedder(
        timm_name(chosen.model),
        weights=find_weights(chosen.models, chosen.model),
        classifiers=heads if chosen.heads else (),
        batch_size=32,
        autocast=False,
    )
    embedder(ImageTextPairDataset.from_webdataset(chosen.tars)).save_metadata(target)


def results(folder: str, key: str) -> dict[str, Any]:
    """Return the results in a folder by the shard and key of the source."""
    import pyarrow.parquet as pq

    tables = [pq.read_table(path) for path in sorted(Path(folder).glob("*.parquet"))]
    found: dict[str, Any] = {}
    for name in SCORES:
        if name in tables[0].column_names:
            order = np.argsort(np.concatenate([table[key].to_numpy() for table in tables]), kind="stable")
            values = [value for table in tables for value in table[name].to_pylist()]
            found[name] = np.array(values, np.float64)[order]
    return found


def main() -> None:
    """Run both in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tars")
    parser.add_argument("models")
    parser.add_argument("--model", required=True)
    parser.add_argument("--heads", action="store_true")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args()
    seconds: dict[str, list[float]] = {"pipeline": [], "dataset": []}
    differences: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as work, get_client("cpu", n_workers=chosen.workers):
        for number in range(chosen.repeat + 1):
            order = [("pipeline", by_pipeline), ("dataset", by_dataset)]
            for name, run in order if number % 2 else reversed(order):
                started = time.perf_counter()
                run(chosen, f"{work}/{name}-{number}")
                if number:  # the first runs load libraries and models
                    seconds[name].append(time.perf_counter() - started)
            one, two = (results(f"{work}/{name}-{number}", "key") for name in ("pipeline", "dataset"))
            assert one.keys() == two.keys()
            for column in one:
                difference = float(np.abs(one[column] - two[column]).max())
                differences[column] = max(difference, differences.get(column, 0.0))
    medians = {name: round(statistics.median(taken), 2) for name, taken in seconds.items()}
    print(
        json.dumps(
            {
                "model": chosen.model,
                "rows": len(next(iter(one.values()))),
                "seconds": medians,
                "pipeline / dataset": round(medians["pipeline"] / medians["dataset"], 3),
                "each": {name: [round(value, 2) for value in taken] for name, taken in seconds.items()},
                "largest difference": differences,
            }
        )
    )


if __name__ == "__main__":
    main()
