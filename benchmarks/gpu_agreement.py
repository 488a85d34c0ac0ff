"""Embeddings, scores, clusters and duplicates made on the CPU and on GPUs, beside each other.

    python -m benchmarks.gpu_agreement PICTURES_IN_TARS --model vit_base_patch32_clip_224.openai --pretrained

Both runs start from the same tars and weights; k-means' centroids of the CPU's run are given to the other, because two
starts of k-means differ however exact the arithmetic is. With ``--other cpu`` the CPU is compared with itself, which
must give ones and zeros: that is how the script is tested where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import dask
import numpy as np

from nemo_image import backend
from nemo_image.classifiers import AestheticClassifier, NsfwClassifier
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.dedup import SemanticDedup
from nemo_image.embedders import TimmImageEmbedder

HEAD_SIZE = 768


def measure(kind: str, tars: str, folder: Path, options: argparse.Namespace, centroids: Any) -> Any:
    """Enrich the dataset on one backend; return its rows in order, and the centroids."""
    with dask.config.set({backend.BACKEND_KEY: kind}):
        dataset = ImageTextPairDataset.from_webdataset(tars, id_col=options.id_col)
        embedder = TimmImageEmbedder(
            options.model, pretrained=options.pretrained, weights=options.weights, autocast=options.autocast
        )
        dataset = embedder(dataset).save_metadata(folder / "embedded")
        size = len(dataset.head(1)[embedder.image_embedding_column].iloc[0])
        if size == HEAD_SIZE and options.aesthetic_weights and options.nsfw_weights:
            dataset = AestheticClassifier(model_path=options.aesthetic_weights)(dataset)
            dataset = NsfwClassifier(model_path=options.nsfw_weights)(dataset)
        n_clusters = options.n_clusters if centroids is None else None
        dedup = SemanticDedup(n_clusters=n_clusters, eps=options.eps, centroids=centroids)
        frame = backend.to_pandas(dedup(dataset).save_metadata(folder / "judged").metadata.compute())
    found = next(folder.rglob("kmeans_centroids.npy"))
    return frame.sort_values(["shard", options.id_col]).reset_index(drop=True), np.load(found)


def compare(one: Any, two: Any, id_col: str) -> dict[str, Any]:
    """Return how far two runs agree."""
    assert one[id_col].tolist() == two[id_col].tolist()
    assert one["image_error"].isna().tolist() == two["image_error"].isna().tolist()
    (left, rows), (right, others) = (backend.to_matrix(frame["image_embedding"]) for frame in (one, two))
    assert rows.tolist() == others.tolist()
    cosine = np.einsum("ij,ij->i", left.astype(np.float64), right.astype(np.float64))
    result: dict[str, Any] = {
        "rows": len(one),
        "embeddings": len(rows),
        "cosine, least": float(cosine.min()),
        "cosine, mean": float(cosine.mean()),
        "rows in the same cluster": float((one["cluster"] == two["cluster"]).mean()),
        "rows with the same verdict": float((one["is_duplicate"] == two["is_duplicate"]).mean()),
        "removed": [int(frame["is_duplicate"].sum()) for frame in (one, two)],
    }
    for name in ("aesthetic_score", "nsfw_score"):
        if name in one:
            result[f"{name}, largest difference"] = float((one[name] - two[name]).abs().max())
    return result


def main() -> None:
    """Compare, and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tars")
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--weights")
    parser.add_argument("--aesthetic-weights")
    parser.add_argument("--nsfw-weights")
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--id-col", default="key")
    parser.add_argument("--n-clusters", type=int, default=4)
    parser.add_argument("--eps", type=float, default=0.3)
    parser.add_argument("--other", choices=("gpu", "cpu"), default="gpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first, centroids = measure("cpu", options.tars, folder / "cpu", options, None)
        second, _ = measure(options.other, options.tars, folder / "other", options, centroids)
    print(
        json.dumps({"model": options.model, "other": options.other, **compare(first, second, options.id_col)}, indent=1)
    )


if __name__ == "__main__":
    main()
