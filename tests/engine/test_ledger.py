from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_image.engine.ledger import NAMED_AT_MOST, LedgerError, Named, ShardRecord, count_failures, total, write_ledger


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
    assert named.first == [str(number) for number in range(NAMED_AT_MOST)]


def test_reasons_count_by_category() -> None:
    assert count_failures(["empty: no bytes", "empty: 0", "bomb: 1 x 9"]) == {"bomb": 1, "empty": 2}


def test_written_and_read_again(tmp_path: Path) -> None:
    one = record(repeated_members=Named.of(["x.jpg"]), seconds=1.5)
    url, sums = write_ledger(str(tmp_path), "save", [one])
    lines = [json.loads(line) for line in Path(url).read_text().splitlines()]
    assert ShardRecord.from_dict(lines[0]) == one
    assert lines[-1] == {"run": sums}
