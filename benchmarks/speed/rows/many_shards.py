"""Ten thousand shards are opened and filtered without being read."""

from benchmarks.many_shards import make
from benchmarks.speed.material import Material
from benchmarks.speed.race import Contender, Rival, Row

SHARDS = 10_000


def row(material: Material) -> Row:
    """Return the row."""
    folder = material.folder / f"shards-{SHARDS}"
    if not folder.exists():
        make(folder, SHARDS, rows=2)
    given = {"folder": str(folder)}
    return Row(
        name="many_shards",
        what="10,000 shards opened and filtered, up to one planned task a shard; no row is read",
        unit="shards",
        contenders=[
            Contender("ours", "many_shards.py:ours", given),
            Contender("dask.dataframe.read_parquet", "many_shards.py:read_parquet", given),
            Contender("names and one footer", "many_shards.py:listing", given),
        ],
        targets=[Rival("dask.dataframe.read_parquet", at_least=1.0)],
        floor="names and one footer",
        floor_text="One listing and one footer. Ours lists twice (tars, Parquet) and asks each file's type; the rest "
        "is Dask's expressions and their tokens.",
        rounds=7,
    )
