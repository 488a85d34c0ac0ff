"""Whole datasets to new shards, in order."""

from benchmarks.speed.material import Material
from benchmarks.speed.race import Contender, Rival, Row

SAMPLES, SHARDS = 8_000, 4


def row(material: Material) -> Row:
    """Return the row."""
    out = material.folder / "exported"
    tars = str(material.tars(SAMPLES, SHARDS))
    theirs = "export.py:webdataset_copy"

    def given(name: str, **more: object) -> dict[str, object]:
        return {"tars": tars, "target": str(out / name), "samples_per_shard": SAMPLES // SHARDS, **more}

    return Row(
        name="export",
        what=f"to_webdataset of {SAMPLES} samples in {SHARDS} shards",
        unit="images",
        contenders=[
            Contender("ours", "export.py:ours", given("ours")),
            Contender("webdataset", theirs, given("theirs", synced=False), environment="webdataset"),
            Contender("webdataset, synced", theirs, given("synced", synced=True), environment="webdataset"),
            Contender("ours, one core", "export.py:ours", given("one", cores=1)),
            Contender("ours, shards of 1/4", "export.py:ours", {**given("small"), "samples_per_shard": SAMPLES // 16}),
            Contender("copy of the bytes", "export.py:copy_bytes", given("copy", cores=material.cores)),
        ],
        targets=[
            Rival("webdataset", at_least=3.0),
            Rival("webdataset, synced", at_least=3.0),
        ],
        floor="copy of the bytes",
        floor_text=(
            "Each byte is read from the cache and written to it once, and synced. Ours uses all cores, as it does for "
            "users, and syncs; webdataset uses one, and does not sync by itself. The rest of our time goes into the "
            "walk through the tars' headers, new headers, JSON with new ids, and the Parquet and index files. "
            "Memory is that of an output's rows, whatever its pictures: compare ours with shards of 1/4."
        ),
        rounds=5,
    )
