"""A filter on a score reads no embeddings."""

from benchmarks.many_shards import make
from benchmarks.speed.material import Material
from benchmarks.speed.race import Contender, Rival, Row

SHARDS, ROWS, SIZE = 20, 5_000, 768


def row(material: Material) -> Row:
    """Return the row."""
    folder = material.folder / f"embedded-{SHARDS}x{ROWS}x{SIZE}"
    if not folder.exists():
        make(folder, SHARDS, ROWS, SIZE)
    given = {"folder": str(folder), "rows": SHARDS * ROWS}
    names = ["shard", "key", "caption", "url", "width", "height", "aesthetic_score", "image_embedding"]
    return Row(
        name="columns",
        what=f"rows of a good score counted, beside embeddings of {SIZE} numbers ({SHARDS * ROWS:,} rows)",
        unit="rows",
        contenders=[
            Contender("ours", "columns.py:ours", {**given, "columns": None}),
            Contender("all columns", "columns.py:ours", {**given, "columns": names}),
            Contender("the column alone", "columns.py:column_alone", given),
        ],
        targets=[Rival("all columns", at_least=5.0)],
        floor="the column alone",
        floor_text="pyarrow reads the score's pages and each file's footer (mib_read says the bytes); the rest is "
        "opening the dataset, and Dask's plan and tasks.",
        rounds=21,  # of half a second each
    )
