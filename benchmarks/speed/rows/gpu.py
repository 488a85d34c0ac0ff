"""Tars to Parquet on a GPU."""

from benchmarks.speed.material import Material
from benchmarks.speed.race import Contender, Rival, Row


def row(material: Material) -> Row:
    """Return the row."""
    given = {"tars": str(material.tars(20_000, 8)), "scratch": str(material.folder), "gpus": 1.0}
    published = {"count": 20_000}
    return Row(
        name="gpu",
        what="tars to Parquet with embeddings, one GPU, ViT-L/14",
        unit="images",
        contenders=[
            Contender("ours, ViT-L/14", "stages.py:ours", {**given, "model": "openai/clip-vit-large-patch14"}),
            Contender("ours, ViT-B/32", "stages.py:ours", {**given, "model": "openai/clip-vit-base-patch32"}),
            Contender("112 images/s (the Ray system's floor)", "stages.py:published", {**published, "speed": 112}),
            Contender("312 images/s (LAION-5B, A100)", "stages.py:published", {**published, "speed": 312}),
            Contender("2,500 images/s (what we want)", "stages.py:published", {**published, "speed": 2500}),
        ],
        targets=[Rival("2,500 images/s (what we want)", at_least=1.0)],
        rounds=2,
        needs_gpu=True,
    )
