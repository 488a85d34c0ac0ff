"""What our engine adds to Dask's own time for a task."""

from benchmarks.many_shards import make
from benchmarks.speed.material import Material
from benchmarks.speed.race import Contender, Rival, Row

TASKS = 10_000


def row(material: Material) -> Row:
    """Return the row."""
    folder = material.folder / "few-shards"
    if not folder.exists():
        make(folder, shards=4, rows=100)
    given = {"folder": str(folder), "count": TASKS}
    return Row(
        name="scheduling",
        what="tasks without work, as save_metadata sends them, through a cluster of two processes",
        unit="tasks",
        contenders=[
            Contender("ours", "scheduling.py:ours", given),
            Contender("bare client.map", "scheduling.py:bare_map", given),
        ],
        # At most 1.5 times its seconds.
        targets=[Rival("bare client.map", at_least=1 / 1.5)],
        floor="bare client.map",
        floor_text="Dask's own messages for a task: submit, run, fetch. The rest is the task's pickled operator, the "
        "ledger record that comes back, and smaller batches, because only a window of tasks is under way.",
        rounds=3,
    )
