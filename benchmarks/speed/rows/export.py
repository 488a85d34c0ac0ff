"""Whole datasets to new shards, in order."""

import os
from pathlib import Path

from benchmarks.speed.material import Material
from benchmarks.speed.race import Contender, Rival, Row

SAMPLES, SHARDS = 6_000, 4
MEMORY = Path("/dev/shm")


def row(material: Material) -> Row:
    """Return the row."""
    disk = material.folder / "exported"
    memory = MEMORY / f"nemo-image-bench-{os.getpid()}" if MEMORY.is_dir() else disk
    tars = str(material.tars(SAMPLES, SHARDS))
    theirs = "export.py:webdataset_copy"

    def given(out: Path, name: str, **more: object) -> dict[str, object]:
        return {"tars": tars, "target": f"{out}-{name}", "samples_per_shard": SAMPLES // SHARDS, **more}

    return Row(
        name="export",
        what=f"to_webdataset of {SAMPLES} samples in {SHARDS} shards, to a file system in memory",
        unit="images",
        contenders=[
            Contender("ours", "export.py:ours", given(memory, "ours")),
            Contender("webdataset", theirs, given(memory, "theirs", synced=False), environment="webdataset"),
            Contender("ours, one core", "export.py:ours", given(memory, "one", cores=1)),
            Contender(
                "ours, shards of 1/4", "export.py:ours", {**given(memory, "s"), "samples_per_shard": SAMPLES // 16}
            ),
            Contender("copy of the bytes", "export.py:copy_bytes", given(memory, "copy", cores=material.cores)),
            Contender("ours, to disk", "export.py:ours", given(disk, "ours")),
            Contender("webdataset, to disk, synced", theirs, given(disk, "w", synced=True), environment="webdataset"),
            Contender("copy of the bytes, to disk", "export.py:copy_bytes", given(disk, "c", cores=material.cores)),
        ],
        targets=[Rival("webdataset", at_least=3.0)],
        floor="copy of the bytes",
        floor_text=(
            "Each byte is read from the cache and written to it once. To disk, ours and the copy sync what they write, "
            "and the disk decides more than the program. Ours uses all cores, as it does for users; webdataset uses "
            "one. The rest of our time goes into the walk through the tars' headers, new headers, JSON with new ids, "
            "and the Parquet and index files. Memory is that of an output's rows, whatever its pictures: compare ours "
            "with shards of 1/4."
        ),
        rounds=9,
    )
