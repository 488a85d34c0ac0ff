"""The whole job: tars to Parquet with embeddings."""

from benchmarks.speed.material import Material
from benchmarks.speed.race import Contender, Rival, Row

MODEL = "vit_base_patch32_clip_224.openai"


def row(material: Material) -> Row:
    """Return the row."""
    tars = str(material.tars(128, 4))
    given = {"tars": tars, "model": MODEL}
    alone = {**given, "cores": material.cores}
    return Row(
        name="embed",
        what="tars to Parquet with embeddings, CPU, ViT-B/32 in float32",
        unit="images",
        contenders=[
            Contender("ours", "embedding.py:ours", {**given, "scratch": str(material.folder)}),
            Contender("model alone, a batch a core", "embedding.py:model_from_memory", alone),
            Contender(
                "model alone, a batch at once", "embedding.py:model_from_memory", {**alone, "one_batch_at_once": True}
            ),
            Contender(
                "ours, autocast", "embedding.py:ours", {**given, "scratch": str(material.folder), "autocast": True}
            ),
        ],
        targets=[
            Rival("model alone, a batch a core", at_least=0.9),
            Rival("model alone, a batch at once", at_least=0.9),
        ],
        floor="model alone, a batch a core",
        floor_text="The model alone has memory kept for it as ours has. The rest is decoding, 1.5 to 2 ms of a core a "
        "picture, and writing the Parquet files.",
        rounds=3,
    )
