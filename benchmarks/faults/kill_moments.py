"""Kill ``nemo-image curate`` at every named point and at seeded moments, resume, compare with a clean run.

Run it from the project's root::

    python -m benchmarks.faults.kill_moments
    python -m benchmarks.faults.kill_moments --workers 2 --moments 10

Each line of the table is one kill with SIGKILL of the whole process group, then the same command again, then once
more. "whole" says that every file found under a final name right after the kill had a clean run's bytes; "computed"
counts pictures decoded, batches embedded and shards' files written by the third run. The exit status is 1 if anything
differs. The moments are uniform in the duration that a clean run's enriching and exporting took.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from tests.faults.kill_points import STAGES, WITH_GROUPS
from tests.faults.outputs import finals, ledgers, leftovers, not_whole, sources
from tests.faults.points import Fault
from tests.faults.warm_runs import Ending, Run, WarmRuns, curate
from tests.makers import make_dataset

SHARDS = 40
SAMPLES = 6
GROUP_ROWS = 3
OPTIONS = ("--keep", "seed > 7", "--samples-per-shard", 12)

POINTS = [
    Fault("forward", nth=1),
    Fault("forward", nth=40),
    Fault("decode", nth=1),
    Fault("decode", nth=123),
    *(Fault(stage, "enrich manifest") for stage in STAGES),
    *(Fault(stage, "enriched", nth) for stage in WITH_GROUPS for nth in (1, 20)),
    Fault("moved", "enriched", SHARDS),
    *(Fault(stage, "enrich ledger") for stage in STAGES),
    *(Fault(stage, "count ledger") for stage in STAGES),
    *(Fault(stage, "export manifest") for stage in STAGES),
    *(Fault(stage, "tar", nth) for stage in STAGES for nth in (1, 10)),
    *(Fault(stage, "idx", 10) for stage in STAGES),
    *(Fault(stage, "parquet", 10) for stage in WITH_GROUPS),
    Fault("moved", "parquet", ceil((SHARDS * SAMPLES - 8) / 12)),
    *(Fault(stage, "output ledger") for stage in STAGES),
    *(Fault(stage, "export ledger") for stage in STAGES),
]


@dataclass(frozen=True)
class Bench:
    """What every kill shares: the source, a clean run's bytes, and how to run."""

    runs: WarmRuns
    folder: Path
    source: Path
    hashes: dict[str, tuple[str, int]]
    clean: dict[str, bytes]
    workers: int | None
    small: dict[str, Any]

    def command(self, out: Path) -> list[object]:
        """Return the command that is killed."""
        more = ("--workers", self.workers) if self.workers else ()
        return curate(self.source, out, *OPTIONS, *more)


@dataclass(frozen=True)
class Seen:
    """What a kill left, and how the runs after it ended."""

    phase: str
    enriched: int
    exported: int
    not_whole: list[str]
    problems: list[str]
    computed: str


def phase_of(out: Path) -> str:
    """Tell from the files how far a run has come."""
    inside = out / "_nemo_image"
    if ledgers(inside, "to_webdataset-2"):
        return "finished"
    if ledgers(inside, "to_webdataset-output"):
        return "last ledger"
    if (inside / "export.json").exists():
        return "export"
    if ledgers(inside / "enriched" / "_nemo_image", "save_metadata"):
        return "counting"
    return "enrich" if (inside / "enriched").exists() else "start"


def look(bench: Bench, out: Path) -> tuple[str, int, int, list[str]]:
    """Look at an output in the moment after a kill."""
    names = finals(out)
    enriched = sum(name.startswith("_nemo_image/enriched/") and name.endswith(".parquet") for name in names)
    exported = sum("/" not in name and name.endswith(".parquet") for name in names)
    return phase_of(out), enriched, exported, not_whole(out, bench.clean)


def resume(bench: Bench, out: Path) -> tuple[list[str], str]:
    """Run the command twice more; return what is wrong, and what the last run computed."""
    second, third = bench.runs.run(
        curate(bench.source, out, *OPTIONS), curate(bench.source, out, *OPTIONS), **bench.small
    )
    problems = [f"exit status {run.status}: {run.said}" for run in (second, third) if run.status]
    made = finals(out)
    problems += [
        f"{name} differs"
        for name in sorted(made.keys() | bench.clean.keys())
        if made.get(name) != bench.clean.get(name)
    ]
    problems += [f"left over: {name}" for name in leftovers(out)]
    if sources(bench.source) != bench.hashes:
        problems.append("a source file changed")
    counts = (third.decoded, third.forwarded, files_written(third))
    if any(counts):
        problems.append("the third run computed something")
    return problems, "/".join(map(str, counts))


def files_written(run: Run) -> int:
    """Count the shards' files that a run wrote."""
    return sum(run.written.get(kind, 0) for kind in ("enriched", "tar", "idx", "parquet"))


def kill_at_point(bench: Bench, fault: Fault, out: Path) -> bool:
    """Run until the point, where the run kills itself; tell whether it came there."""
    return bench.runs.wait(bench.runs.start(curate(bench.source, out, *OPTIONS), fault=fault, **bench.small)).killed


@dataclass(frozen=True)
class Moment:
    """A time after a phase has begun.

    Attributes
    ----------
    phase : str
        ``"enrich"`` or ``"export"`` (its counting included).
    after_s : float
    """

    phase: str
    after_s: float

    def __str__(self) -> str:
        return f"{self.after_s * 1000:.0f} ms into {self.phase}"


def begun(out: Path, phase: str) -> bool:
    """Tell whether a phase of a run has begun."""
    inside = out / "_nemo_image" / "enriched" / "_nemo_image"
    return (inside / "dataset.json").exists() if phase == "enrich" else any(inside.glob("save_metadata-*.jsonl"))


def kill_at_moment(bench: Bench, moment: Moment, out: Path) -> bool:
    """Kill a run's process group at a moment; tell whether it was still running."""
    pid = bench.runs.start(bench.command(out), **bench.small)
    while not begun(out, moment.phase):
        time.sleep(0.0005)
    time.sleep(moment.after_s)
    os.killpg(pid, signal.SIGKILL)
    return bench.runs.wait(pid).killed


def measured(bench: Bench, out: Path) -> dict[str, float]:
    """Return how long the phases of a clean run take, in seconds."""
    pid = bench.runs.start(bench.command(out), **bench.small)
    starts = {}
    for phase in ("enrich", "export"):
        while not begun(out, phase):
            time.sleep(0.0005)
        starts[phase] = time.monotonic()
    ending: Ending = bench.runs.wait(pid)
    assert ending.runs[0].status == 0, ending.runs[0].errors
    export_s = (
        ledgers(out / "_nemo_image", "to_webdataset-2")[-1].stat().st_mtime
        - ledgers(out / "_nemo_image" / "enriched", "save_metadata")[-1].stat().st_mtime
    )
    return {"enrich": starts["export"] - starts["enrich"], "export": export_s}


def moments(durations: dict[str, float], count: int, seed: int) -> Iterator[Moment]:
    """Draw moments, half of them in each phase."""
    draw = random.Random(seed)
    for number in range(count):
        phase = ("enrich", "export")[number % 2]
        yield Moment(phase, draw.uniform(0, durations[phase]))


def worker_processes(group: int) -> list[int]:
    """Return the processes of a group that a Dask nanny has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            is_worker = b"spawn_main" in (entry / "cmdline").read_bytes()
            if is_worker and os.getpgid(int(entry.name)) == group:
                found.append(int(entry.name))
        except OSError:
            continue  # it has just ended
    return sorted(found)


def kill_one_worker(bench: Bench, out: Path, after_shards: int) -> list[str]:
    """Kill one worker process once some shards are finished; the run must end by itself as a clean one does."""
    pid = bench.runs.start(bench.command(out), **bench.small)
    enriched = out / "_nemo_image" / "enriched"
    while len(list(enriched.glob("*.parquet"))) < after_shards:
        time.sleep(0.001)
    workers = worker_processes(pid)
    os.kill(workers[0], signal.SIGKILL)
    (run,) = bench.runs.wait(pid).runs
    made = finals(out)
    problems = [f"exit status {run.status}: {run.said}"] if run.status else []
    problems += [
        f"{name} differs"
        for name in sorted(made.keys() | bench.clean.keys())
        if made.get(name) != bench.clean.get(name)
    ]
    return problems + [f"left over: {name}" for name in leftovers(out)]


def show(label: str, seen: Seen) -> bool:
    """Print a line of the table; tell whether all is well."""
    same = not any("differs" in problem or "exit" in problem for problem in seen.problems)
    sound = not any("source" in problem for problem in seen.problems)
    other = [one for one in seen.problems if "differs" not in one]
    cells: list[object] = [label, seen.phase, seen.enriched, seen.exported]
    cells += ["yes" if not seen.not_whole else seen.not_whole, "yes" if same else "NO", "yes" if sound else "NO"]
    cells += [seen.computed, "; ".join(other[:3]) or "—"]
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return not seen.not_whole and not seen.problems


def try_kill(bench: Bench, label: str, kill: Callable[[Path], bool]) -> bool:
    """Kill, look, resume, print; tell whether all is well."""
    out = Path(tempfile.mkdtemp(dir=bench.folder)) / "out"
    if not kill(out):
        print(f"| {label} | the run ended first | | | | | | | not killed |", flush=True)
        return False
    found = look(bench, out)
    problems, computed = resume(bench, out)
    shutil.rmtree(out.parent)
    return show(label, Seen(*found, problems, computed))


def kill_until_hit(bench: Bench, moment: Moment, out: Path) -> bool:
    """Kill at a moment; a run that was faster than the clean one is tried again, a little earlier."""
    for _ in range(20):
        if kill_at_moment(bench, moment, out):
            return True
        shutil.rmtree(out)
        moment = Moment(moment.phase, moment.after_s * 0.9)
    return False


def prepare(folder: Path, runs: WarmRuns, workers: int | None) -> Bench:
    """Write the source and make the clean run."""
    source = make_dataset(folder / "in", {f"{number:05d}": SAMPLES for number in range(SHARDS)})
    # Small row groups in this process only: a cluster's workers keep the product's.
    small = {} if workers else {"row_group_rows": GROUP_ROWS}
    (run,) = runs.run(curate(source, folder / "clean", *OPTIONS), **small)
    assert run.status == 0, run.errors
    return Bench(runs, folder, source, sources(source), finals(folder / "clean"), workers, small)


def main() -> int:
    """Make the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--moments", type=int, default=30, help="Seeded moments. [default: 30]")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--workers", type=int, help="Run on a local cluster; named points are then left out.")
    parser.add_argument("--folder", type=Path, help="Where to work. [default: a temporary folder]")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        (folder / "runs").mkdir()
        runs = WarmRuns(folder / "runs")
        try:
            return report(prepare(folder, runs, chosen.workers), chosen.moments, chosen.seed)
        finally:
            runs.close()


def report(bench: Bench, count: int, seed: int) -> int:
    """Print the table; return 1 if anything is wrong."""
    durations = measured(bench, bench.folder / "measured")
    print(
        f"{SHARDS} shards of {SAMPLES} samples; "
        + ", ".join(f"{name} {value:.2f} s" for name, value in durations.items())
    )
    print("\n| killed | phase | enriched | exported | whole | same bytes | sources | computed again | else |")
    print("|---|---|---|---|---|---|---|---|---|")
    kills = [] if bench.workers else [(str(fault), partial(kill_at_point, bench, fault)) for fault in POINTS]
    kills += [(str(moment), partial(kill_until_hit, bench, moment)) for moment in moments(durations, count, seed)]
    good = [try_kill(bench, label, kill) for label, kill in kills]
    print(f"\n{sum(good)} of {len(good)} kills resumed to a clean run's bytes")
    if bench.workers:
        good.append(one_worker_killed(bench))
    return int(not all(good))


def one_worker_killed(bench: Bench) -> bool:
    """Kill one worker, three times; print and tell how the runs end."""
    good = True
    for after in (1, SHARDS // 4, SHARDS // 2):
        out = Path(tempfile.mkdtemp(dir=bench.folder)) / "out"
        problems = kill_one_worker(bench, out, after)
        ending = "; ".join(problems) or "same bytes, without a rerun"
        print(f"one of {bench.workers} workers killed after {after} shards: {ending}", flush=True)
        good &= not problems
    return good


if __name__ == "__main__":
    sys.exit(main())
