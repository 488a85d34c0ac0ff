"""The table, and a section for each row, as Markdown; all the figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed.race import Measured, Row, Verdict

Result = tuple[Row, Mapping[str, Measured], Sequence[Verdict]]


def as_json(machine: Mapping[str, str], results: Sequence[Result]) -> dict[str, Any]:
    """Return everything that was measured."""
    rows = {}
    for row, measured, verdicts in results:
        rows[row.name] = {
            "what": row.what,
            "unit": row.unit,
            "floor": row.floor,
            "contenders": {name: vars(one) for name, one in measured.items()},
            "targets": [{**vars(one), "held": one.held} for one in verdicts],
        }
    return {"machine": dict(machine), "rows": rows}


def as_markdown(machine: Mapping[str, str], results: Sequence[Result], skipped: Mapping[str, str]) -> str:
    """Return the table, the machine, and a section for each row."""
    lines = ["# Speed beside others", "", "    make bench", ""]
    lines += [_sentence(machine), ""]
    lines += ["Contenders of a row take turns in one run; a ratio is the median of the ratios within each round", ""]
    lines[-2] += " (in brackets: smallest and largest)."
    lines += ["| row | work | beside | ours to theirs | asked | held |", "|---|---|---|---|---|---|"]
    for row, _, verdicts in results:
        lines += [_line(row, one) for one in verdicts] or [f"| {row.name} | {row.what} | see below | | | |"]
    lines += [f"| {name} | not run: {why} | | | | |" for name, why in skipped.items()]
    for row, measured, _ in results:
        lines += ["", *_section(row, measured)]
    return "\n".join(lines) + "\n"


def _sentence(machine: Mapping[str, str]) -> str:
    return "; ".join(f"{name} {value}" for name, value in machine.items()) + "."


def _line(row: Row, one: Verdict) -> str:
    ratio = f"{one.value:.2f} ({min(one.each):.2f} to {max(one.each):.2f})"
    asked = f"{'≥' if one.kind == 'speed' else '≤'} {one.wanted:g}"
    return (
        f"| {row.name} | {row.what} | {one.rival} | {one.kind} {ratio} | {asked} | {'yes' if one.held else '**no**'} |"
    )


def _section(row: Row, measured: Mapping[str, Measured]) -> list[str]:
    lines = [f"## {row.name}: {row.what}", ""]
    lines += [f"| | {row.unit}/s | seconds a round | of the floor | peak MiB, above the start | peak MiB |"]
    lines += ["|---|---|---|---|---|---|"]
    floor = measured[row.floor] if row.floor else None
    for one in measured.values():
        share = ""
        if floor is not None and one is not floor:
            share = f"{median(a / b for a, b in zip(one.speeds, floor.speeds, strict=True)):.2f}"
        seconds = f"{median(one.seconds):.3g} ({min(one.seconds):.3g} to {max(one.seconds):.3g})"
        lines += [
            f"| {one.name} | {median(one.speeds):,.4g} | {seconds} | {share} | {median(one.extra_mib):.0f} "
            f"| {one.peak_mib:.0f} |"
        ]
    lines += ["", *([row.floor_text] if row.floor_text else [])]
    facts = [f"{one.name}: {_facts(one.facts)}" for one in measured.values() if one.facts]
    if facts:
        lines += ["", "Of the last round: " + ". ".join(facts) + "."]
    return lines


def _facts(facts: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}" for name, value in facts.items()
    )


def write(folder: Path, machine: Mapping[str, str], results: Sequence[Result], skipped: Mapping[str, str]) -> Path:
    """Write ``speed.md`` and ``speed.json``; return the first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "speed.json").write_text(json.dumps(as_json(machine, results), indent=1, ensure_ascii=False) + "\n")
    path = folder / "speed.md"
    path.write_text(as_markdown(machine, results, skipped))
    return path
