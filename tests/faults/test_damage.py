"""Damaged, cut off and missing files: every loss is named, nothing wrong is believed, and a repair repairs all."""

from __future__ import annotations

import io
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from nemo_image.errors import MetadataFileError, MissingColumnError
from nemo_image.shards import parquet
from tests.faults.outputs import finals, last_ledger, leftovers
from tests.faults.points import Fault
from tests.faults.table import FaultTable
from tests.faults.warm_runs import Run, WarmRuns, curate
from tests.makers import make_dataset, sample, write_rows, write_tar

ROWS = 4
WHOLE = {f"{number:05d}": 4 for number in range(3)}


def copies(folder: Path, count: int) -> Path:
    """Write `count` shards of equal content: one shard, one damage."""
    make_dataset(folder, {"00000": ROWS})
    for number in range(1, count):
        for ending in ("tar", "parquet"):
            shutil.copy2(folder / f"00000.{ending}", folder / f"{number:05d}.{ending}")
    return folder


def put_back(clean: Path, folder: Path) -> None:
    """Repair a folder from a copy, times included."""
    for path in clean.iterdir():
        shutil.copy2(path, folder / path.name)


def records_of(ledger: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {record["shard"]: record for record in ledger if "shard" in record}


# Tars ----------------------------------------------------------------------------------------------------------------


def cuts_of(tar: bytes) -> list[int]:
    """Return where to cut: at every block, a byte before and after some of them, and at seeded odd places."""
    blocks = set(range(0, len(tar), 512))
    near = {cut + more for cut in sorted(blocks)[1::5] for more in (-1, 1)}
    return sorted(blocks | near | set(random.Random(3).sample(range(len(tar)), 12)))


def test_a_tar_cut_anywhere_never_gives_fewer_samples_silently(
    tmp_path: Path, runs: WarmRuns, table: FaultTable
) -> None:
    make_dataset(tmp_path / "one", {"00000": ROWS})
    tar = (tmp_path / "one" / "00000.tar").read_bytes()
    cuts = cuts_of(tar)
    assert len(cuts) > 60
    source = copies(tmp_path / "in", len(cuts))
    shutil.copytree(source, tmp_path / "spare")
    (clean,) = runs.run(["save-in-place", source, tmp_path / "clean"])
    assert clean.status == 0
    with tarfile.open(source / "00000.tar") as opened:
        ends = {info.name: info.offset_data + info.size for info in opened}
    for number, cut in enumerate(cuts):
        (source / f"{number:05d}.tar").write_bytes(tar[:cut])

    command = curate(source, tmp_path / "out", "--max-failure-ratio", 1)
    (run,) = runs.run(command)
    assert run.status == 1
    assert "--retry" in run.said or "failed" in run.said
    found = records_of(last_ledger(tmp_path / "out" / "_nemo_image" / "enriched", "save_metadata"))
    assert len(found) == len(cuts)
    silent = []
    for number, cut in enumerate(cuts):
        record = found[f"{number:05d}"]
        if record["status"] == "failed":
            assert f"{number:05d}.tar" in record["error"], record["error"]
            continue
        rows = pq.read_table(tmp_path / "out" / "_nemo_image" / "enriched" / f"{number:05d}.parquet").to_pylist()
        assert len(rows) == ROWS
        whole = [ends[f"{row['key']}.jpg"] <= cut for row in rows]
        told = [row["image_embedding"] is not None or row["image_error"] is not None for row in rows]
        good = [row["image_embedding"] is not None for row in rows]
        if not all(told) or any(is_good and not is_whole for is_good, is_whole in zip(good, whole, strict=True)):
            silent.append(cut)
        if cut < max(ends.values()):
            named = record["rows_without_sample"]["count"] + sum(record["failures"].values())
            assert named or f"{number:05d}.tar: byte {cut}: no end mark" in run.errors, f"cut at byte {cut}"
    assert silent == []
    table.add(f"a tar cut at {len(cuts)} places: every 512-byte block, ±1, odd places", run.said, "same bytes")

    put_back(tmp_path / "spare", source)
    (again,) = runs.run(["save-in-place", source, tmp_path / "out" / "_nemo_image" / "enriched"])
    assert again.status == 0, again.errors
    mended = finals(tmp_path / "out" / "_nemo_image" / "enriched")
    assert {name: data for name, data in mended.items() if name.endswith(".parquet")} == {
        name: data for name, data in finals(tmp_path / "clean").items() if name.endswith(".parquet")
    }


def damaged(file: Path, how: str) -> None:
    """Damage or remove a file."""
    if how == "missing":
        file.unlink()
    elif how == "cut off":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "an error page":
        file.write_bytes(b"<html><body>503 Service Unavailable</body></html>" * 30)


MID_RUN = {
    "while it is enriched": (Fault("moved", "enriched", 1, "stop"), "00003"),
    "before its samples are counted": (Fault("moved", "enrich ledger", 1, "stop"), "00001"),
    "before it is exported": (Fault("moved", "export manifest", 1, "stop"), "00001"),
}


@pytest.mark.parametrize("how", ["missing", "cut off", "empty", "an error page"])
@pytest.mark.parametrize("when", ["before the run", *MID_RUN])
def test_a_tar_lost_or_damaged(tmp_path: Path, runs: WarmRuns, table: FaultTable, how: str, when: str) -> None:
    sizes = {f"{number:05d}": 3 for number in range(4)}
    source = make_dataset(tmp_path / "in", sizes)
    shutil.copytree(source, tmp_path / "spare")
    runs.run(curate(source, tmp_path / "clean", "--samples-per-shard", 5))
    command = curate(source, tmp_path / "out", "--samples-per-shard", 5, "--max-failure-ratio", 1)
    if when == "before the run":
        damaged(source / "00001.tar", how)
        shard = "00001"
        (run,) = runs.run(command)
    else:
        fault, shard = MID_RUN[when]
        pid = runs.start(command, fault=fault)
        assert runs.wait(pid).stopped
        damaged(source / f"{shard}.tar", how)
        (run,) = runs.go_on(pid).runs
    assert run.status == 1
    assert run.raised is None, run.said
    assert shard in run.said, run.said
    clean = finals(tmp_path / "clean")
    for name, data in finals(tmp_path / "out").items():
        assert name.startswith("_nemo_image/") or data == clean[name], name
    table.add(f"a tar {how}, {when}", run.said, "same bytes")

    put_back(tmp_path / "spare", source)
    (again,) = runs.run(command)
    assert again.status == 0, again.errors
    assert finals(tmp_path / "out") == clean
    assert leftovers(tmp_path / "out") == []


# Parquet of the source -----------------------------------------------------------------------------------------------


def flipped(data: bytes, place: int) -> bytes:
    copy = bytearray(data)
    copy[place] ^= 0x15
    return bytes(copy)


def regions(data: bytes) -> dict[str, range]:
    """Return where the parts of a Parquet file lie (apache.org/parquet-format: magic, pages, footer, length, magic)."""
    end = len(data)
    footer = end - 8 - int.from_bytes(data[-8:-4], "little")
    return {
        "pages": range(4, footer),
        "footer": range(footer, end - 8),
        "footer's length": range(end - 8, end - 4),
        "magic": range(end - 4, end),
    }


def spread(places: range, count: int) -> list[int]:
    return sorted({places[int(number * len(places) / count)] for number in range(count)})


DAMAGES: dict[str, Callable[[bytes], list[bytes]]] = {
    "cut off": lambda data: [data[:cut] for cut in spread(range(len(data)), 16)],
    "empty, or something else": lambda data: [b"", b"PAR1", b"PAR1PAR1", b"<html></html>" * 99, b"\0" * len(data)],
    "with its magic flipped": lambda data: [flipped(data, place) for place in regions(data)["magic"]],
    "with its footer's length flipped": lambda data: [
        flipped(data, place) for place in regions(data)["footer's length"]
    ],
    "with a byte of its footer flipped": lambda data: [
        flipped(data, place) for place in spread(regions(data)["footer"], 45)
    ],
    "with a byte of its pages flipped": lambda data: [
        flipped(data, place) for place in spread(regions(data)["pages"], 30)
    ],
}
ALWAYS_SEEN = ("cut off", "empty, or something else", "with its magic flipped", "with its footer's length flipped")


@pytest.mark.parametrize("how", DAMAGES)
def test_a_sources_parquet_garbled(tmp_path: Path, runs: WarmRuns, table: FaultTable, how: str) -> None:
    """Pages are summed here, as writers may: a byte flipped in values without a sum is nobody's to see."""
    make_dataset(tmp_path / "one", {"00000": ROWS})
    rows = pq.read_table(tmp_path / "one" / "00000.parquet")
    pq.write_table(rows, tmp_path / "one" / "00000.parquet", write_page_checksum=True)
    good = (tmp_path / "one" / "00000.parquet").read_bytes()
    bad = DAMAGES[how](good)
    source = copies(tmp_path / "in", len(bad) + 1)
    for number in range(len(bad) + 1):
        (source / f"{number:05d}.parquet").write_bytes(([good, *bad])[number])

    out = tmp_path / "out" / "_nemo_image" / "enriched"
    (run,) = runs.run(curate(source, tmp_path / "out", "--max-failure-ratio", 1))
    found = records_of(last_ledger(out, "save_metadata"))
    assert len(found) == len(bad) + 1
    assert found["00000"]["status"] == "done"
    wrong = {}
    for number in range(1, len(bad) + 1):
        shard = f"{number:05d}"
        record = found[shard]
        if record["status"] == "failed":
            if f"{shard}.parquet" not in record["error"]:
                wrong[number - 1] = record["error"]
            continue
        made = pq.read_table(out / f"{shard}.parquet")
        # Whatever passes must be right: names may be damaged (then they are absent), values may not.
        same = [name for name in rows.column_names if name in made.column_names]
        lost = sum(value is None for value in made["key"].to_pylist())
        for name in same:
            column = made[name].to_pylist()
            if (column != rows[name].to_pylist() and column != [None] * ROWS) or lost:
                wrong[number - 1] = f"{name}: {column}"
    assert wrong == {}
    if how in ALWAYS_SEEN:
        assert run.status == 1
        assert {record["status"] for shard, record in found.items() if shard != "00000"} == {"failed"}
    failed = next((record["error"] for record in found.values() if record["status"] == "failed"), "")
    table.add(f"a source's Parquet {how} ({len(bad)} times)", failed, "same bytes")

    for number in range(len(bad) + 1):
        (source / f"{number:05d}.parquet").write_bytes(good)
    (again,) = runs.run(["save-in-place", source, out])
    assert again.status == 0, again.errors
    for number in range(len(bad) + 1):
        made = pq.read_table(out / f"{number:05d}.parquet")
        assert made["key"].to_pylist() == rows["key"].to_pylist()
        assert made["image_embedding"].null_count == 0


# Files of an earlier run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", DAMAGES)
def test_an_earlier_runs_parquet_garbled_is_not_believed(
    tmp_path: Path, runs: WarmRuns, table: FaultTable, how: str
) -> None:
    make_dataset(tmp_path / "one", {"00000": ROWS})
    runs.run(["save-in-place", tmp_path / "one", tmp_path / "one-out"])
    bad_count = len(DAMAGES[how]((tmp_path / "one-out" / "00000.parquet").read_bytes()))
    source = copies(tmp_path / "in", bad_count)
    out = tmp_path / "out"
    runs.run(["save-in-place", source, out])
    clean = finals(out)
    for number in range(bad_count):
        file = out / f"{number:05d}.parquet"
        file.write_bytes(DAMAGES[how](clean[file.name])[number])

    (run,) = runs.run(["save-in-place", source, out])
    assert run.status == 0 or run.raised == "RunError", run.errors
    kept, wrong = 0, {}
    for number in range(bad_count):
        file = out / f"{number:05d}.parquet"
        if file.read_bytes() == clean[file.name]:
            continue
        kept += 1
        wanted = pq.read_table(io.BytesIO(clean[file.name]))
        try:
            made = parquet.read_table(str(file), wanted.column_names)
        except (MetadataFileError, MissingColumnError) as error:
            if file.name not in str(error):
                wrong[number] = f"not named: {error}"
            continue
        if not made.equals(wanted):
            wrong[number] = ", ".join(name for name in wanted.column_names if not made[name].equals(wanted[name]))
    assert wrong == {}, f"{len(wrong)} of {bad_count} damaged files are believed and read wrong"
    if how in ALWAYS_SEEN:
        assert run.status == 0, run.errors
        assert kept == 0
    saw = (
        "recomputed" if not kept else f"{bad_count - kept} of {bad_count} recomputed, the others read right or refused"
    )
    table.add(f"an earlier run's Parquet {how} ({bad_count} times)", saw, "—")


@pytest.mark.parametrize("ending", ["tar", "idx", "parquet"])
@pytest.mark.parametrize("how", ["missing", "cut off", "empty"])
def test_an_earlier_exports_file_damaged_is_written_again(
    tmp_path: Path, runs: WarmRuns, table: FaultTable, ending: str, how: str
) -> None:
    source = make_dataset(tmp_path / "in", WHOLE)
    command = curate(source, tmp_path / "out", "--samples-per-shard", 5)
    runs.run(command)
    clean = finals(tmp_path / "out")
    damaged(tmp_path / "out" / f"00001.{ending}", how)
    (run,) = runs.run(command)
    assert run.status == 0, run.errors
    assert finals(tmp_path / "out") == clean
    table.add(f"an exported .{ending} {how}", "written again", "same bytes")


@pytest.mark.parametrize("column", ["key", "image_embedding"])
def test_a_garbled_page_of_the_enriched_metadata_is_never_exported(
    tmp_path: Path, runs: WarmRuns, table: FaultTable, column: str
) -> None:
    source = make_dataset(tmp_path / "in", WHOLE)
    command = curate(source, tmp_path / "out", "--samples-per-shard", 5)
    runs.run(command)
    clean = finals(tmp_path / "out")
    for name in clean:
        if "/" not in name:
            (tmp_path / "out" / name).unlink()
    file = tmp_path / "out" / "_nemo_image" / "enriched" / "00001.parquet"
    chunk = pq.read_metadata(file).row_group(0)
    part = next(
        chunk.column(number)
        for number in range(chunk.num_columns)
        if chunk.column(number).path_in_schema.startswith(column)
    )
    start = part.dictionary_page_offset or part.data_page_offset
    file.write_bytes(flipped(file.read_bytes(), start + part.total_compressed_size // 2))
    (run,) = runs.run(command)
    if run.status:
        assert run.raised is None, run.said
        assert "00001.parquet" in run.said
        file.unlink()
        table.add(
            f"a byte of an earlier run's column {column} flipped, then exported", run.said, "same bytes (file deleted)"
        )
        (run,) = runs.run(command)
    assert run.status == 0, run.errors
    assert finals(tmp_path / "out") == clean


@pytest.mark.parametrize("name", ["_nemo_image/export.json", "_nemo_image/enriched/_nemo_image/dataset.json"])
@pytest.mark.parametrize("how", ["missing", "cut off", "empty"])
def test_a_garbled_manifest(tmp_path: Path, runs: WarmRuns, table: FaultTable, name: str, how: str) -> None:
    source = make_dataset(tmp_path / "in", WHOLE)
    command = curate(source, tmp_path / "out", "--samples-per-shard", 5)
    runs.run(command)
    clean = finals(tmp_path / "out")
    damaged(tmp_path / "out" / name, how)
    (run,) = runs.run(command)
    assert run.raised is None, run.said
    if run.status:
        table.add(f"{name} {how}", run.said, "refused: what lies there is not overwritten")
        # What lies there is nobody's to overwrite without its manifest.
        assert str(tmp_path / "out") in run.said
        assert {path: data for path, data in finals(tmp_path / "out").items() if path != name} == {
            path: data for path, data in clean.items() if path != name
        }
        return
    table.add(f"{name} {how}", "written again", "same bytes")
    assert finals(tmp_path / "out") == clean


# Partners ------------------------------------------------------------------------------------------------------------


def test_a_shard_without_its_parquet_is_named_at_once(tmp_path: Path, runs: WarmRuns, table: FaultTable) -> None:
    source = make_dataset(tmp_path / "in", WHOLE)
    shutil.copytree(source, tmp_path / "spare")
    runs.run(curate(source, tmp_path / "clean"))
    (source / "00001.parquet").unlink()
    command = curate(source, tmp_path / "out")
    (run,) = runs.run(command)
    assert run.status == 1
    assert "00001.tar" in run.said
    assert run.decoded == 0
    table.add("a shard's Parquet missing", run.said, "same bytes")
    put_back(tmp_path / "spare", source)
    (again,) = runs.run(command)
    assert again.status == 0
    assert finals(tmp_path / "out") == finals(tmp_path / "clean")


def test_samples_and_rows_without_partner_are_counted_and_named(
    tmp_path: Path, runs: WarmRuns, table: FaultTable
) -> None:
    source = tmp_path / "in"
    write_tar(source / "00000.tar", [sample(0, "here"), sample(1, "only-in-tar")])
    write_rows(source / "00000.parquet", {"key": ["here", "only-in-rows"]})
    run: Run = runs.run(curate(source, tmp_path / "out"))[0]
    assert (run.result["rows_without_sample"], run.result["samples_without_row"]) == (1, 1)
    (record, _) = last_ledger(tmp_path / "out" / "_nemo_image" / "enriched", "save_metadata")
    assert record["rows_without_sample"] == {"count": 1, "first": ["only-in-rows"]}
    assert record["samples_without_row"] == {"count": 1, "first": ["only-in-tar"]}
    table.add(
        "a row without sample, a sample without row",
        "counted in the result, named in the ledger: " + str(record["rows_without_sample"]),
        "—",
    )
