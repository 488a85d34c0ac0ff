"""Near-duplicates within one cluster."""

from benchmarks.speed.material import Material
from benchmarks.speed.race import Contender, Rival, Row

FULL = "full matrix"


def row(material: Material) -> Row:
    """Return the row."""
    given = {"rows": 20_000, "size": 512, "cores": material.cores}
    return Row(
        name="pairwise",
        what="near-duplicates of a cluster of 20,000 × 512",
        unit="rows",
        contenders=[
            Contender("ours, chains", "deduplication.py:judge", {**given, "representative": False}),
            Contender("ours, representative", "deduplication.py:judge", given),
            Contender(FULL, "deduplication.py:full_matrix", given),
            Contender("the products alone", "deduplication.py:half_the_products", given),
        ],
        targets=[Rival(FULL, at_least=2.0, memory_at_most=0.1, same={"removed": 1e-3})],
        floor="the products alone",
        floor_text="The floor is each pair's product once, 2 × 20,000² / 2 × 512 = 2 × 10¹¹ operations, in "
        "float32. The rest: the largest product of each row in each tile, and the winners again in "
        "float64.",
    )
