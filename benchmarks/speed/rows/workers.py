"""Two worker processes beside one."""

from benchmarks.speed.material import Material
from benchmarks.speed.race import Contender, Rival, Row


def row(material: Material) -> Row:
    """Return the row."""
    given = {"tars": str(material.tars(368, 4)), "weights": str(material.lite0())}

    def contender(name: str, workers: int) -> Contender:
        out = str(material.folder / f"workers-{workers}")
        return Contender(name, "workers.py:ours", {**given, "workers": workers, "out": out})

    return Row(
        name="workers",
        what="tars to Parquet with EfficientNet-Lite0's embeddings, two workers of one core beside one",
        unit="images",
        contenders=[contender("two workers", 2), contender("one worker", 1)],
        targets=[Rival("one worker", at_least=1.6)],
        floor_text="Twice one worker's speed is the most that is possible; two cores that share caches, memory and "
        "clock give less.",
    )
