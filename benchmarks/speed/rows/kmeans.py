"""k-means on the CPU."""

from benchmarks.speed.material import Material
from benchmarks.speed.race import Contender, Rival, Row


def row(material: Material) -> Row:
    """Return the row."""
    given = {"rows": 100_000, "size": 512, "clusters": 256, "iterations": 20, "cores": material.cores}
    return Row(
        name="kmeans",
        what="20 iterations of k-means, 100,000 × 512, k = 256, same start",
        unit="rows",
        contenders=[
            Contender("ours", "deduplication.py:lloyd", given),
            Contender("faiss-cpu", "deduplication.py:faiss", given, environment="faiss"),
            Contender("the products alone", "deduplication.py:products", given),
        ],
        targets=[Rival("faiss-cpu", at_least=1.0, same={"inertia": 1e-3})],
        floor="the products alone",
        floor_text="The floor is 20 × 2 × 100,000 × 512 × 256 = 5.2 × 10¹¹ operations in float32, by torch's own"
        " product. On AMD's processors ours goes through oneDNN's, which uses AVX-512 there, where MKL does"
        " not: so it may stay below the floor. The rest: the nearest of 256 products a row, and, "
        "in float64, the sums of the rows that changed their cluster.",
    )
