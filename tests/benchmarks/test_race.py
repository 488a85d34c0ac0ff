"""The benchmark's own arithmetic, on made-up figures, and its contenders' processes."""

from __future__ import annotations

import importlib
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks.speed import report
from benchmarks.speed.race import Contender, Measured, Rival, Row, run_row, verdicts
from benchmarks.speed.rows import NAMES

COUNTS = "indexing.py:tarfile"


def row(*targets: Rival, contenders: tuple[Contender, ...] = ()) -> Row:
    named = contenders or (Contender("ours", COUNTS), Contender("theirs", COUNTS))
    return Row("a row", "some work", "images", named, targets, floor=named[-1].name, rounds=1)


def write_tar(path: Path, members: int) -> Path:
    with tarfile.open(path, "w") as tar:
        for number in range(members):
            tar.addfile(tarfile.TarInfo(f"{number}.txt"))
    return path


def measured(name: str, seconds: list[float], extra: list[float], facts: dict[str, float]) -> Measured:
    return Measured(name, seconds, extra, count=12, peak_mib=1, facts=dict(facts))


def test_ratios_are_of_the_same_round() -> None:
    found = {
        # A slow second round for both: 2, 2 and 4 times as fast, a median of 2.
        "ours": measured("ours", [1.0, 10.0, 1.0], [5.0, 5.0, 9.0], {"sum": 101.0}),
        "theirs": measured("theirs", [2.0, 20.0, 4.0], [10.0, 50.0, 10.0], {"sum": 100.0}),
    }
    asked = Rival("theirs", at_least=2.5, memory_at_most=0.5, same={"sum": 0.02})
    speed, memory, same = verdicts(row(asked), found)
    assert (speed.value, list(speed.each), speed.held) == (2.0, [2.0, 2.0, 4.0], False)
    assert (memory.value, memory.held) == (0.5, True)
    assert same.value == pytest.approx(0.01)
    assert same.held
    text = report.as_markdown({"cores": "2"}, [(row(asked), found, [speed, memory, same])], {"gpu": "no GPU"})
    assert "speed 2.00 (2.00 to 4.00) | ≥ 2.5 | **no** |" in text
    assert "| gpu | not run: no GPU |" in text
    assert report.as_json({}, [(row(asked), found, [speed])])["rows"]["a row"]["targets"][0]["held"] is False


def test_a_published_speed_is_compared_with() -> None:
    ours = {"ours": measured("ours", [2.0, 1.0, 4.0], [0.0], {})}  # 6, 12 and 3 a second
    (verdict,) = verdicts(row(Rival("a paper", at_least=2.0, speed=4.0)), ours)
    assert (verdict.value, verdict.held) == (1.5, False)


def test_contenders_run_in_turn_and_must_do_the_same(tmp_path: Path) -> None:
    pythons = {"project": sys.executable}
    tars = {count: str(write_tar(tmp_path / f"{count}.tar", count)) for count in (3, 4)}
    both = [Contender(name, COUNTS, {"tar": tars[3]}) for name in ("ours", "theirs")]
    found = run_row(row(contenders=tuple(both)), pythons, rounds=2)
    assert [(one.count, len(one.seconds)) for one in found.values()] == [(3, 2), (3, 2)]
    more = Contender("more", COUNTS, {"tar": tars[4]})
    with pytest.raises(RuntimeError, match=r"'a row'.*not do the same work: \{'ours': 3, 'more': 4\}"):
        run_row(row(contenders=(both[0], more)), pythons)


def test_a_contender_that_cannot_be_set_up_is_named() -> None:
    lost = Contender("lost", COUNTS, {"no such": "argument"})
    with pytest.raises(RuntimeError, match="contender 'lost' ended with status 1"):
        run_row(row(contenders=(lost,)), {"project": sys.executable})


@pytest.mark.parametrize("name", NAMES)
def test_every_row_has_a_module(name: str) -> None:
    assert callable(importlib.import_module(f"benchmarks.speed.rows.{name}").row)
