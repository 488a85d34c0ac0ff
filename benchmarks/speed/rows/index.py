"""The index of a tar without an ``.idx``."""

from benchmarks.speed.material import Material
from benchmarks.speed.race import Contender, Rival, Row


def row(material: Material) -> Row:
    """Return the row."""
    given = {"tar": str(material.tars(3600, 1) / "00000.tar")}
    return Row(
        name="index",
        what="index of a tar of 10,800 members",
        unit="members",
        contenders=[
            Contender("ours", "indexing.py:ours", given),
            Contender("tarfile", "indexing.py:tarfile", given),
            Contender("the headers' bytes", "indexing.py:headers", given),
        ],
        targets=[Rival("tarfile", at_least=5.0)],
        floor="the headers' bytes",
        floor_text="The floor reads each header, 512 bytes, at a place that is known. The rest: checksums, names and "
        "sizes of the headers (two thirds), and grouping the members to samples.",
        rounds=9,
    )
