"""Tars to Parquet on a GPU."""

from benchmarks.speed.material import Material
from benchmarks.speed.race import Contender, Rival, Row


def row(material: Material) -> Row:
    """Return the row."""
    given = {"tars": str(material.tars(20_000, 8)), "scratch": str(material.folder), "gpus": 1.0}
    return Row(
        name="gpu",
        what="tars to Parquet with embeddings, one GPU, ViT-L/14",
        unit="images",
        contenders=[
            Contender("ours, ViT-L/14", "stages.py:ours", {**given, "model": "openai/clip-vit-large-patch14"}),
            Contender("ours, ViT-B/32", "stages.py:ours", {**given, "model": "openai/clip-vit-base-patch32"}),
        ],
        targets=[
            Rival("112 images/s, the Ray system's published floor", at_least=1.0, speed=112),
            Rival("312 images/s, LAION-5B's run on an A100", at_least=1.0, speed=312),
            Rival("2,500 images/s, what we want", at_least=1.0, speed=2500),
        ],
        rounds=2,
        needs_gpu=True,
    )
