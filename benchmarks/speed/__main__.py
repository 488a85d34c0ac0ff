"""Run the rows of the table: ``python -m benchmarks.speed`` (or ``make bench``)."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

from benchmarks.speed import environments, machine, report
from benchmarks.speed.material import PROJECT, Material
from benchmarks.speed.race import Row, run_row, verdicts
from benchmarks.speed.rows import NAMES


def main() -> int:
    """Measure; return 1 if a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"all by default: {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, help="rounds that count, instead of each row's own number")
    parser.add_argument("--photos", type=Path, help="a folder of JPEG photographs")
    parser.add_argument("--folder", type=Path, default=PROJECT / ".bench", help="for the material and rivals (5 GB)")
    parser.add_argument(
        "--results",
        type=Path,
        help="a folder for speed.md and .json; benchmarks/results if all rows are run, else none",
    )
    args = parser.parse_args()
    unknown = sorted({*args.rows} - {*NAMES})
    if unknown:
        parser.error(f"no row {', '.join(unknown)}: use {', '.join(NAMES)}")
    args.folder.mkdir(parents=True, exist_ok=True)
    material = Material.at(args.folder.absolute(), args.photos and args.photos.absolute())
    results, skipped, pythons = [], {}, {"project": sys.executable}
    for name in args.rows or NAMES:
        row: Row = importlib.import_module(f"benchmarks.speed.rows.{name}").row(material)
        if row.needs_gpu and machine.gpu() is None:
            skipped[name] = f"{row.what}: there is no GPU here"
            continue
        for contender in row.contenders:
            if contender.environment not in pythons:
                pythons[contender.environment] = environments.python_of(contender.environment, args.folder / "rivals")
        began = time.perf_counter()
        measured = run_row(row, pythons, args.rounds)
        result = (row, measured, verdicts(row, measured))
        results.append(result)
        for one in result[2]:
            print(f"{name}: {one}", flush=True)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    facts = machine.describe(pythons, environments.RIVALS)
    folder = args.results or (None if args.rows else PROJECT / "benchmarks" / "results")
    print(
        report.as_markdown(facts, results, skipped) if folder is None else report.write(folder, facts, results, skipped)
    )
    return int(any(not one.held for _, _, found in results for one in found))


if __name__ == "__main__":
    sys.exit(main())
