"""The whole job with a small model, which leaves decoding no spare core; and what number type and compiling bring."""

from benchmarks.speed.material import Material
from benchmarks.speed.race import Contender, Row

MODEL = "tf_efficientnet_lite0"


def row(material: Material) -> Row:
    """Return the row."""
    given = {"tars": str(material.tars(184, 4)), "model": MODEL, "weights": str(material.lite0())}
    ours = {**given, "scratch": str(material.folder)}
    alone = {**given, "cores": material.cores, "batch": 4}
    return Row(
        name="embed_lite0",
        what="tars to Parquet with embeddings, CPU, EfficientNet-Lite0 in float32",
        unit="images",
        contenders=[
            Contender("ours", "embedding.py:ours", ours),
            Contender("model alone, a batch a core", "embedding.py:model_from_memory", alone),
            Contender("model alone, not channels last", "embedding.py:model_from_memory", {**alone, "as_built": True}),
            Contender("decoding alone", "pictures.py:decoding_alone", {"tars": given["tars"], "cores": material.cores}),
            Contender("ours, compiled", "embedding.py:ours", {**ours, "compile_model": True}),
            Contender("ours, autocast", "embedding.py:ours", {**ours, "autocast": True}),
            Contender("ours, batches of 8", "embedding.py:ours", {**ours, "batch_size": 8}),
            Contender("ours, batches of 32", "embedding.py:ours", {**ours, "batch_size": 32}),
        ],
        floor="model alone, a batch a core",
        floor_text="Model and decoding share the cores: the seconds of both, alone, add up to the least that the "
        "whole job can take.",
        rounds=3,
    )
