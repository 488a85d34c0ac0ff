from __future__ import annotations

import copy
import datetime
import gc
import json
import pickle
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_image.engine.ledger import (
    NAMED_AT_MOST,
    LedgerError,
    Named,
    ShardRecord,
    Sums,
    accounted,
    count_failures,
    failed_shards,
    read_ledgers,
    total,
    write_ledger,
)
from nemo_image.errors import DatasetError


def record(**values: object) -> ShardRecord:
    return ShardRecord(shard="a", **{"rows_in": 10, "rows_out": 7, "rows_filtered": 3, **values})  # type: ignore[arg-type]


def test_a_balanced_record() -> None:
    record().balance()
    record(rows_joined=2, losses={"without_sample": 2}).balance()


@pytest.mark.parametrize("change", [{"rows_out": 6}, {"rows_in": 11}, {"rows_joined": 1}, {"losses": {"x": 1}}])
def test_a_lost_or_gained_row_is_found(change: dict[str, object]) -> None:
    with pytest.raises(LedgerError, match="shard a"):
        record(**change).balance()


def test_totals_leave_failed_shards_out_and_name_them() -> None:
    failed = ShardRecord(shard="b", status="failed", rows_in=5, error="no tar")
    sums = total([record(failures={"empty": 1}), record(failures={"empty": 2, "bomb": 1}), failed])
    assert sums["rows_in"] == 20
    assert sums["rows_out"] == 14
    assert sums["failures"] == {"bomb": 1, "empty": 3}
    assert sums["shards"] == {"done": 2, "skipped": 0, "failed": 1}
    assert sums["failed_shards"] == {"b": "no tar"}


def test_totals_are_balanced_too() -> None:
    with pytest.raises(LedgerError):
        total([record(rows_out=8)])


def test_counts_are_whole_and_names_are_few() -> None:
    named = Named.of(range(1000))
    assert named.count == 1000
    assert list(named.first) == [str(number) for number in range(NAMED_AT_MOST)]


def test_reasons_count_by_category() -> None:
    assert count_failures(["empty: no bytes", "empty: 0", "bomb: 1 x 9"]) == {"bomb": 1, "empty": 2}


def test_written_and_read_again(tmp_path: Path) -> None:
    one = record(repeated_members=Named.of(["x.jpg"]), seconds=1.5)
    url, sums = write_ledger(str(tmp_path), "save", [one])
    lines = [json.loads(line) for line in Path(url).read_text().splitlines()]
    assert ShardRecord.from_dict(lines[0]) == one
    assert lines[-1] == {"run": sums}


# Small and whole on their way -----------------------------------------------------------------------------------------


@dataclass
class WithMore(ShardRecord):
    digest: str = ""
    size: tuple[int, ...] = ()


FULL = record(
    status="skipped",
    rows_in=0,
    rows_out=0,
    rows_filtered=0,
    losses={"x": 0},
    samples=0,
    results={"image_embedding": 5, "width": 5},
    failures={"empty": 1},
    rows_without_sample=Named.of(range(30)),
    notes=["odd"],
    seconds=0.5,
    error="why",
)


@pytest.mark.parametrize(
    "one", [ShardRecord("a"), FULL, WithMore("a", digest="d", size=(3, 4))], ids=["bare", "full", "more"]
)
def test_records_travel_whole(one: ShardRecord) -> None:
    for other in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        assert other == one
        assert type(other) is type(one)
        assert other.to_dict() == one.to_dict()
    text = json.dumps(one.to_dict())
    assert json.dumps(type(one).from_dict(json.loads(text)).to_dict()) == text


def test_the_names_in_the_file_stay() -> None:
    # What ledgers and footers on disk have; a change would orphan them.
    assert list(FULL.to_dict()) == [
        "shard", "status", "rows_in", "rows_joined", "rows_out", "rows_filtered", "losses", "samples", "results",
        "failures", "rows_without_sample", "samples_without_row", "repeated_members", "notes", "seconds", "error",
    ]  # fmt: skip
    assert FULL.to_dict()["rows_without_sample"] == {"count": 30, "first": [str(n) for n in range(NAMED_AT_MOST)]}


def test_what_a_record_gives_away_is_a_copy() -> None:
    one = copy.deepcopy(FULL)
    values = one.to_dict()
    values["losses"]["y"] = 1
    values["notes"].append("more")
    assert one == FULL
    two = ShardRecord.from_dict(FULL.to_dict())
    two.losses["z"] = 3
    two.notes.append("more")
    assert ShardRecord("b").losses == {}
    assert ShardRecord("b").notes == []


def test_a_client_holds_less_than_a_kilobyte_a_record() -> None:
    columns = ("image_embedding", "width", "height", "aesthetic_score", "nsfw_score")
    typical = [
        ShardRecord(
            shard=f"{number:06d}",
            rows_in=10_000 + number,
            rows_out=10_000 + number,
            samples=10_000 + number,
            results=dict.fromkeys(columns, 9_000 + number),
            failures={"truncated": 7, "empty": 3},
            seconds=1.5 + number,
        )
        for number in range(2_000)
    ]
    sent = [pickle.dumps(one) for one in typical]
    gc.collect()
    tracemalloc.start()
    received = [pickle.loads(one) for one in sent]
    gc.collect()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert received == typical
    assert size / len(received) < 1_000


def test_sums_and_totals_agree() -> None:
    records = [record(), record(rows_out=5, losses={"x": 2}, rows_without_sample=Named(3, ["k"]))]
    sums = Sums()
    for one in records:
        sums.add(one)
    assert sums.to_dict() == total(records)
    assert (sums.to_dict()["rows_out"], sums.to_dict()["losses"]) == (12, {"x": 2})
    assert sums.to_dict()["rows_without_sample"] == 3


# Reading --------------------------------------------------------------------------------------------------------------


def test_ledgers_are_found_in_the_order_of_their_runs(tmp_path: Path) -> None:
    assert read_ledgers(str(tmp_path)) == []
    urls = [write_ledger(str(tmp_path), kind, [record()])[0] for kind in ("b", "a-b", "b")]
    (tmp_path / "_nemo_image" / "other.jsonl").write_text("{}\n")
    old = tmp_path / "_nemo_image" / "save_metadata-20200102T030405-0123abcd.jsonl"
    old.write_bytes(Path(urls[0]).read_bytes())
    found = read_ledgers(str(tmp_path))
    assert [one.url for one in found] == [str(old), *urls]
    assert [one.kind for one in found] == ["save_metadata", "b", "a-b", "b"]
    assert found[0].time == datetime.datetime(2020, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    assert abs((datetime.datetime.now(datetime.UTC) - found[-1].time).total_seconds()) < 600


def test_lines_are_records_and_then_the_totals(tmp_path: Path) -> None:
    records = [record(), ShardRecord("b", status="failed", error="no tar \udc80 é")]
    _, sums = write_ledger(str(tmp_path), "save", records, notes=["n"])
    (one,) = read_ledgers(str(tmp_path))
    *found, last = one.lines()
    assert found == records
    assert last == json.loads(json.dumps(sums))
    assert isinstance(last, dict)
    assert last["notes"] == ["n"]


@pytest.mark.parametrize("end", [None, -1, -30])
def test_a_ledger_without_its_end(tmp_path: Path, end: int | None) -> None:
    url, _ = write_ledger(str(tmp_path), "save", [record()])
    lines = Path(url).read_bytes().splitlines(keepends=True)
    Path(url).write_bytes(lines[0] + (lines[1].rstrip()[:end] if end is not None else b""))
    (one,) = read_ledgers(str(tmp_path))
    found = one.lines()
    assert next(found) == record()
    with pytest.raises(DatasetError, match="cut off"):
        next(found)


def test_the_last_run_of_a_shard_says_whether_it_failed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def ran(**statuses: str) -> str:
        records = [ShardRecord(shard, status=status) for shard, status in statuses.items()]
        return write_ledger(str(tmp_path), "save", records)[0]

    ran(a="failed", b="failed", c="done", d="failed")
    ran(a="done", c="failed")
    last = ran(d="skipped", e="failed")
    assert failed_shards(str(tmp_path)) == {"b", "c", "e"}
    assert failed_shards(str(tmp_path / "nowhere")) == frozenset()
    # A damaged ledger counts as far as it goes.
    lines = Path(last).read_text().splitlines()
    Path(last).write_text(lines[0] + "\n" + lines[1][:9])
    assert failed_shards(str(tmp_path)) == {"b", "c"}
    assert "cut off" in caplog.text


def test_runs_of_one_second_keep_their_order(tmp_path: Path) -> None:
    for number in range(20):
        write_ledger(str(tmp_path), "save", [ShardRecord("a", status="done" if number % 2 else "failed")])
        assert failed_shards(str(tmp_path)) == (frozenset() if number % 2 else {"a"})


def test_an_account_that_fails_on_its_way_is_a_failure() -> None:
    one = ShardRecord("a", rows_in=3, rows_out=2)
    with accounted(one):
        pass
    assert one.status == "failed"
    assert "3 rows in" in str(one.error)
