"""A full disk, a folder that cannot be written to, a file in the way: one clear line, nothing half-written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.outputs import finals, leftovers, not_whole, sources
from tests.faults.points import Fault
from tests.faults.table import FaultTable
from tests.faults.warm_runs import Run, WarmRuns, curate
from tests.makers import make_dataset

SIZES = {"00000": 8, "00001": 7, "00002": 9}
OPTIONS = ("--samples-per-shard", 5)
PAGE = 4096  # bytes: what a tmpfs counts in
NOBODY = 65534


@dataclass(frozen=True)
class Case:
    source: Path
    hashes: dict[str, tuple[str, int]]
    clean: dict[str, bytes]

    def pages(self, prefix: str = "") -> int:
        """Return how many pages the clean run's files take whose paths begin so."""
        return sum(-(-len(data) // PAGE) for name, data in self.clean.items() if name.startswith(prefix))


@pytest.fixture(scope="module")
def case(memory: Path, runs: WarmRuns) -> Case:
    source = make_dataset(memory / "disk" / "in", SIZES)
    (run,) = runs.run(curate(source, memory / "disk" / "out", *OPTIONS))
    assert run.status == 0
    return Case(source, sources(source), finals(memory / "disk" / "out"))


def assert_told(run: Run, reason: str, named: str) -> None:
    """Assert that the run failed with one line that says why and where."""
    assert run.status == 1
    assert run.raised is None, run.said
    assert re.search(reason, run.said), run.said
    assert named in run.said, run.said


# Full ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mounting(memory: Path, runs: WarmRuns) -> Iterator[WarmRuns]:
    """Give jobs that may mount: as we are, or in a name space of their own; skips where neither works."""
    probe = memory / "probe"
    probe.mkdir()
    direct = subprocess.run(["mount", "-t", "tmpfs", "none", probe], capture_output=True, check=False)
    if direct.returncode == 0:
        subprocess.run(["umount", probe], check=True)
        yield runs
        return
    apart = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "true"], capture_output=True, check=False
    )
    if apart.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {(direct.stderr + apart.stderr).decode(errors='replace').strip()}")
    folder = memory / "mounting"
    folder.mkdir()
    started = WarmRuns(folder, in_namespace=True)
    yield started
    started.close()


class SmallDisk:
    """A tmpfs of few pages."""

    def __init__(self, runs: WarmRuns, place: Path) -> None:
        self.runs = runs
        self.place = place
        self.out = place / "out"
        place.mkdir()

    def mount(self, pages: int, *options: str) -> None:
        chosen = ",".join([f"size={pages * PAGE}", "mode=777", *options])
        (run,) = self.runs.run(["mount", "-t", "tmpfs", "-o", chosen, "none", self.place])
        assert run.status == 0, run.errors

    def remount(self, options: str) -> None:
        (run,) = self.runs.run(["mount", "-o", f"remount,{options}", self.place])
        assert run.status == 0, run.errors

    def seen(self) -> Path:
        """Return the output folder as we see it, who may be in another name space."""
        return self.runs.root / self.out.relative_to("/")


@pytest.fixture
def disk(mounting: WarmRuns, tmp_path: Path) -> Iterator[SmallDisk]:
    made = SmallDisk(mounting, tmp_path / "disk")
    yield made
    if os.path.ismount(made.place):
        subprocess.run(["umount", made.place], check=True)


@pytest.mark.parametrize(("phase", "share"), [("enrich", 0.0), ("enrich", 0.6), ("export", 0.1), ("export", 0.6)])
def test_a_full_disk(case: Case, disk: SmallDisk, table: FaultTable, phase: str, share: float) -> None:
    enriched = case.pages("_nemo_image/enriched")
    whole = case.pages()
    pages = share * enriched + 1 if phase == "enrich" else enriched + share * (whole - enriched) + 2
    disk.mount(int(pages))
    command = curate(case.source, disk.out, *OPTIONS)
    (run,) = disk.runs.run(command)
    assert_told(run, "No space left on device", str(disk.place))
    assert not_whole(disk.seen(), case.clean) == []
    assert leftovers(disk.seen()) == []
    assert sources(case.source) == case.hashes
    table.add(f"the disk full in {phase}, {share:.0%} through", run.said, "same bytes")

    disk.remount(f"size={4 * whole * PAGE}")
    (again,) = disk.runs.run(command)
    assert again.status == 0, again.errors
    assert finals(disk.seen()) == case.clean


def test_enriching_in_place_on_a_full_disk_keeps_the_rows(
    case: Case, disk: SmallDisk, table: FaultTable, tmp_path: Path
) -> None:
    disk.mount(4096)
    disk.runs.run(["save-in-place", case.source, disk.out])  # only to learn how large it gets
    folder, seen = disk.place / "data", disk.seen().parent / "data"
    shutil.copytree(case.source, seen)
    used = sum(-(-path.stat().st_size // PAGE) for path in seen.iterdir())
    shutil.rmtree(disk.seen())
    disk.remount(f"size={(used + 8) * PAGE}")
    (run,) = disk.runs.run(["save-in-place", folder])
    assert run.status == 1
    assert run.raised in ("RunError", "TooManyFailuresError", "OSError")
    assert "No space left on device" in run.said
    before = {path.name: path.read_bytes() for path in case.source.iterdir()}
    for path in seen.iterdir():
        if path.is_file():
            assert path.suffix == ".parquet" or path.read_bytes() == before[path.name]
    assert leftovers(seen) == []
    table.add("the disk full while enriching in place", run.said, "same bytes; every row and column kept meanwhile")
    disk.remount(f"size={4096 * PAGE}")
    (again,) = disk.runs.run(["save-in-place", folder])
    assert again.status == 0, again.errors
    shutil.copytree(case.source, tmp_path / "data")
    disk.runs.run(["save-in-place", tmp_path / "data"])
    assert finals(seen) == finals(tmp_path / "data")


@pytest.mark.parametrize(
    ("stage", "kind", "code"),
    [
        ("half", "enriched", "ENOSPC"),
        ("complete", "enriched", "EIO"),
        ("half", "enrich manifest", "EDQUOT"),
        ("half", "enrich ledger", "ENOSPC"),
        ("half", "count ledger", "ENOSPC"),
        ("half", "export manifest", "ENOSPC"),
        ("half", "tar", "ENOSPC"),
        ("synced", "tar", "EIO"),
        ("half", "idx", "EDQUOT"),
        ("half", "parquet", "ENOSPC"),
        ("half", "output ledger", "ENOSPC"),
        ("half", "export ledger", "ENOSPC"),
    ],
)
def test_a_write_that_fails_names_its_file(
    case: Case, runs: WarmRuns, table: FaultTable, tmp_path: Path, stage: str, kind: str, code: str
) -> None:
    out = tmp_path / "out"
    command = curate(case.source, out, *OPTIONS)
    pid = runs.start(command, fault=Fault(stage, kind, 1, code))
    (run,) = runs.wait(pid).runs
    words = {"ENOSPC": "No space left on device", "EIO": "Input/output error", "EDQUOT": "[Qq]uota exceeded"}[code]
    assert_told(run, words, str(out))
    assert not_whole(out, case.clean) == []
    assert leftovers(out) == []
    table.add(f"{code} at the {kind} ({stage})", run.said, "same bytes")
    (again,) = runs.run(command)
    assert again.status == 0, again.errors
    assert finals(out) == case.clean


# Not to be written to -----------------------------------------------------------------------------------------------


@pytest.fixture
def other_user(memory: Path, tmp_path: Path) -> int | None:
    """Return a user who may not do everything, in whose stead root would do it: nobody, or None if we are no root."""
    if os.getuid() != 0:
        return None
    for folder in (memory, tmp_path):
        folder.chmod(0o755)
    return NOBODY


@pytest.mark.parametrize(
    "what", ["a new folder in a read-only one", "a read-only folder", "a folder of an earlier run"]
)
def test_a_read_only_output(
    case: Case, runs: WarmRuns, table: FaultTable, tmp_path: Path, other_user: int | None, what: str
) -> None:
    parent = tmp_path / "mine"
    parent.mkdir()
    out = parent / "out"
    command = curate(case.source, out, *OPTIONS)
    if what == "a folder of an earlier run":
        runs.run(command)
        for name in case.clean:
            if name.endswith("1.parquet"):
                (out / name).unlink()
    elif what == "a read-only folder":
        out.mkdir()
    folders = [folder for folder in (parent, *parent.rglob("*")) if folder.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    (run,) = runs.run(command, user=other_user)
    assert_told(run, "Permission denied|read-only", str(parent))
    table.add(f"output: {what}", run.said, "same bytes")
    for folder in folders:
        folder.chmod(0o755)
    (again,) = runs.run(command)
    assert again.status == 0, again.errors
    assert finals(out) == case.clean


def test_a_read_only_file_system(case: Case, disk: SmallDisk, table: FaultTable) -> None:
    disk.mount(4096)
    disk.remount("ro")
    command = curate(case.source, disk.out, *OPTIONS)
    (run,) = disk.runs.run(command)
    assert_told(run, "[Rr]ead-only file system", str(disk.place))
    table.add("output: a file system mounted read-only", run.said, "same bytes")
    disk.remount("rw")
    (again,) = disk.runs.run(command)
    assert again.status == 0, again.errors
    assert finals(disk.seen()) == case.clean


def test_a_source_that_cannot_be_written_to_is_fine(
    case: Case, runs: WarmRuns, tmp_path: Path, other_user: int | None
) -> None:
    source = tmp_path / "source"
    shutil.copytree(case.source, source)
    for path in (source, *source.iterdir()):
        path.chmod(0o555 if path.is_dir() else 0o444)
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o777)
    (run,) = runs.run(curate(source, out, *OPTIONS), user=other_user)
    assert run.status == 0, run.errors
    shards = {name: data for name, data in finals(out).items() if name.endswith((".tar", ".idx"))}
    assert shards == {name: data for name, data in case.clean.items() if name.endswith((".tar", ".idx"))}


@pytest.mark.parametrize("what", ["the output", "a folder above it", "its _nemo_image"])
def test_a_file_in_the_way(case: Case, runs: WarmRuns, table: FaultTable, tmp_path: Path, what: str) -> None:
    out = tmp_path / "in-the-way" / "out"
    file = {"the output": out, "a folder above it": out.parent, "its _nemo_image": out / "_nemo_image"}[what]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("precious")
    command = curate(case.source, out, *OPTIONS)
    (run,) = runs.run(command)
    assert_told(run, "is a file|Not a directory|File exists", str(file))
    assert file.read_text() == "precious"
    table.add(f"a file where {what} should be", run.said, "same bytes")
    file.unlink()
    (again,) = runs.run(command)
    assert again.status == 0, again.errors
    assert finals(out) == case.clean
