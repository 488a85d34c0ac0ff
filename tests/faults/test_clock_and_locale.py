"""Clocks that are wrong or go back, odd time zones, locales that know no UTF-8: the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.faults.outputs import finals, ledgers, leftovers
from tests.faults.points import Fault
from tests.faults.table import FaultTable
from tests.faults.warm_runs import ROOT, WarmRuns, curate
from tests.makers import TINY_MODEL, make_dataset, sample, write_rows, write_tar

SIZES = {"00000": 3, "00001": 2}
YEAR_S = 365.25 * 86400

MOMENTS_S = {
    "1970": 0,
    "1969, before the epoch": -86_400 * 200,
    "1901, the first of 32 bits": -(2**31),
    "2100": 4_102_444_800,
    "2262, beyond nanoseconds in 64 bits": 9_300_000_000,
    "the year 10889": 2**48 // 1000,
}


@pytest.mark.parametrize("moment", MOMENTS_S)
def test_files_of_odd_times(tmp_path: Path, runs: WarmRuns, table: FaultTable, moment: str) -> None:
    source = make_dataset(tmp_path / "in", SIZES)
    for path in source.iterdir():
        os.utime(path, ns=(MOMENTS_S[moment] * 10**9 + 1, MOMENTS_S[moment] * 10**9 + 1))
    if (source / "00000.tar").stat().st_mtime_ns != MOMENTS_S[moment] * 10**9 + 1:
        pytest.skip("the file system does not keep such times")
    command = curate(source, tmp_path / "out")
    first, second = runs.run(command, command)
    assert first.status == 0, first.errors
    assert second.status == 0, second.errors
    assert (second.decoded, second.written.get("enriched", 0), second.written.get("tar", 0)) == (0, 0, 0)
    enriched = tmp_path / "out" / "_nemo_image" / "enriched"
    assert pq.read_table(enriched / "00000.parquet")["image_embedding"].null_count == 0
    table.add(f"a source's files from {moment}", "nothing", "nothing computed")

    # A billionth of a second later it is another file.
    os.utime(source / "00000.tar", ns=(0, MOMENTS_S[moment] * 10**9 + 2))
    (third,) = runs.run(["save-in-place", source, enriched])
    assert third.result["shards"] == {"done": 1, "skipped": 1, "failed": 0}


def test_the_time_zone_changes_nothing(tmp_path: Path, runs: WarmRuns, table: FaultTable) -> None:
    source = make_dataset(tmp_path / "in", SIZES)
    command = curate(source, tmp_path / "out")
    (first,) = runs.run(command, environment={"TZ": "KTM-5:45"})
    assert first.status == 0, first.errors
    made = finals(tmp_path / "out")
    (again,) = runs.run(command, environment={"TZ": "NST3:30NDT,M3.2.0,M11.1.0"})
    assert again.status == 0
    assert again.decoded == 0
    runs.run(curate(source, tmp_path / "utc"), environment={"TZ": "UTC"})
    assert finals(tmp_path / "utc") == finals(tmp_path / "out") == made
    table.add("run in Kathmandu's time zone, again in St. John's", "nothing", "nothing computed; same bytes")


def test_a_clock_that_goes_back_between_runs(tmp_path: Path, runs: WarmRuns, table: FaultTable) -> None:
    source = make_dataset(tmp_path / "in", SIZES)
    runs.run(curate(source, tmp_path / "clean"))
    out = tmp_path / "out"
    command = curate(source, out)
    for fault, shift in ((Fault("half", "enriched", 2), 5 * YEAR_S), (Fault("moved", "tar", 1), -20 * YEAR_S)):
        assert runs.wait(runs.start(command, fault=fault, clock_shift_s=[shift])).killed
    first, second, third = runs.run(command, command, command, clock_shift_s=[-10 * YEAR_S, -40 * YEAR_S, 0.0])
    assert first.status == second.status == third.status == 0, first.errors + second.errors
    assert (second.decoded, third.decoded) == (0, 0)
    assert finals(out) == finals(tmp_path / "clean")
    assert leftovers(out) == []
    # One of the run killed in its export, and one of each that ended.
    assert len(ledgers(out / "_nemo_image" / "enriched", "save_metadata")) == 4
    table.add("a clock 5 years ahead, then 20, 10 and 40 years behind, two kills between", "nothing", "same bytes")


# Locales -------------------------------------------------------------------------------------------------------------

CAPTION = "Käfer, 甲虫, İstanbul'da ılık 🪲"


def odd_names(folder: Path) -> Path:
    """Write shards, keys and captions that ASCII cannot say."""
    for shard in ("bücher-ı", "画像"):
        write_tar(folder / f"{shard}.tar", [sample(1, "größe/İ1", CAPTION), sample(2, "größe/ı2", "plain")])
        write_rows(folder / f"{shard}.parquet", {"key": ["größe/İ1", "größe/ı2"], "caption": [CAPTION, "plain"]})
    return folder


def in_locale(source: Path, out: Path, home: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Curate in a fresh interpreter: how it treats text is settled as it starts."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    options = ["--model", TINY_MODEL, "--no-autocast"]
    command = [sys.executable, "-m", "nemo_image", "curate", str(source), str(out), *options]
    return subprocess.run(
        command,
        env={**kept, "PYTHONPATH": str(ROOT), "NEMO_IMAGE_HOME": str(home), **environment},
        cwd=ROOT,
        capture_output=True,
        check=False,
    )


LOCALES = {
    "C, and Python told not to help": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "POSIX": {"LC_ALL": "POSIX"},
    "tr_TR.UTF-8": {"LC_ALL": "tr_TR.UTF-8"},
}


@pytest.mark.parametrize("name", LOCALES)
def test_locales(tmp_path: Path, runs: WarmRuns, table: FaultTable, name: str) -> None:
    wanted = LOCALES[name]["LC_ALL"]
    known = subprocess.run(["locale", "-a"], capture_output=True, check=False).stdout.decode().lower().split()
    if wanted.lower().replace("-", "") not in [one.replace("-", "") for one in known]:
        pytest.skip(f"this machine has no locale {wanted}")
    source = odd_names(tmp_path / "quelle-ä")
    runs.run(curate(source, tmp_path / "clean"))
    clean = finals(tmp_path / "clean")
    assert len(clean) == 7
    done = in_locale(source, tmp_path / "ausgabe-ö", tmp_path / "home", **LOCALES[name])
    said = done.stderr.decode(errors="replace")
    assert "Traceback" not in said, said
    fault = f"locale {name}; captions, keys, shards and folders beyond ASCII"
    if done.returncode:
        # Where Python cannot say a file's name, it is told how to.
        assert "PYTHONUTF8" in said, said
        table.add(fault, said.strip().splitlines()[-1], "same bytes with PYTHONUTF8=1")
        done = in_locale(source, tmp_path / "ausgabe-ö", tmp_path / "home", **{**LOCALES[name], "PYTHONUTF8": "1"})
    else:
        table.add(fault, "nothing", "same bytes")
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert finals(tmp_path / "ausgabe-ö") == clean


def test_a_shard_is_found_whatever_the_capitals(tmp_path: Path, runs: WarmRuns) -> None:
    """Turkish has two letters i: lower-casing extensions must not ask the locale."""
    write_tar(tmp_path / "in" / "00000.tar", [("a", {"TIFF": b"", "JPG": sample(1, "a")[1]["jpg"]})])
    write_rows(tmp_path / "in" / "00000.parquet", {"key": ["a"]})
    (run,) = runs.run(curate(tmp_path / "in", tmp_path / "out"))
    assert run.result["samples"] == 1
