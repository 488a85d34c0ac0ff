"""Whole datasets to new shards, shuffled by a seed."""

from benchmarks.speed.material import Material
from benchmarks.speed.race import Contender, Rival, Row

SAMPLES, SHARDS = 4_000, 40


def row(material: Material) -> Row:
    """Return the row."""
    out = material.folder / "exported"
    per_shard = SAMPLES // SHARDS

    def given(name: str, **more: object) -> dict[str, object]:
        tars = str(material.tars(SAMPLES, SHARDS))
        return {"tars": tars, "target": str(out / name), "samples_per_shard": per_shard, **more}

    return Row(
        name="shuffled_export",
        what=f"to_webdataset(shuffle_seed=…) of {SAMPLES} samples in {SHARDS} shards",
        unit="images",
        contenders=[
            Contender("ours", "export.py:ours", given("shuffled", shuffle_seed=1)),
            Contender("ours, in order", "export.py:ours", given("ours")),
            Contender(
                "webdataset, shuffle buffer of a group",
                "export.py:webdataset_copy",
                given("theirs", synced=True, buffer=16 * per_shard),
                environment="webdataset",
            ),
        ],
        # What the order costs: every output reads some of each of 16 input shards.
        targets=[Rival("ours, in order", at_least=0.4)],
        floor="ours, in order",
        floor_text="Beside the export in order: each source is opened for each output of its group (its rows are "
        "remembered where they are few), and samples are copied one by one instead of in runs of neighbours.",
        rounds=5,
    )
