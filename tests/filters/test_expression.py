"""Expressions against pandas' own results, and what they refuse."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.errors import ArgumentError, MissingColumnError
from nemo_image.filters import KeepExpression, keep
from tests.makers import make_dataset


def column(values: list[object], kind: pa.DataType) -> pd.Series:
    return pd.Series(pd.arrays.ArrowExtensionArray(pa.array(values, kind)))


@pytest.fixture
def frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "score": column([4.0, 5.5, None, 7.0], pa.float32()),
            "nsfw": column([0.1, 0.9, 0.2, None], pa.float32()),
            "width": column([10, 20, 30, 40], pa.int32()),
            "caption": column(["A cat", None, "two dogs", "Cats!"], pa.string()),
            "shard": pd.Categorical(["a", "a", "b", "b"]),
            "ok": column([True, False, None, True], pa.bool_()),
            "wide": column([70_000, 1, None, 46_341], pa.int32()),
            "small": column([1, 0, 200, None], pa.uint8()),
            "huge": column([2**62, 1, 2, 3], pa.int64()),
            "day": column([date(2024, 5, 1), date(2024, 5, 2), None, date(1969, 1, 1)], pa.date32()),
            "at": column(
                [datetime(2024, 5, 1, 12), None, datetime(2024, 5, 1), datetime(1969, 1, 1)], pa.timestamp("ns")
            ),
            "nothing": column([None] * 4, pa.null()),
        }
    )


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("score > 5", [False, True, False, True]),
        ("score > 5 and nsfw < 0.5", [False, False, False, False]),
        ("score > 5 or nsfw < 0.5", [True, True, True, True]),
        ("not score > 5", [True, False, False, False]),
        ("5 <= score < 6", [False, True, False, False]),
        ("score is None", [False, False, True, False]),
        ("score is not None and nsfw is not None", [True, True, False, False]),
        ("width / 10 + 1 == 3", [False, True, False, False]),
        ("width * 2 - 20 >= 40", [False, False, True, True]),
        ("shard == 'b'", [False, False, True, True]),
        ("shard in ['a', 'z']", [True, True, False, False]),
        ("width not in [10, 20]", [False, False, True, True]),
        ("len(caption) > 5", [False, False, True, False]),
        ("contains(lower(caption), 'cat')", [True, False, False, True]),
        ("startswith(caption, 'two')", [False, False, True, False]),
        ("ok", [True, False, False, True]),
        ("not ok", [False, True, False, False]),
        ("abs(-score) < 5", [True, False, False, False]),
        ("caption != 'A cat'", [False, False, True, True]),
        ("caption not in ['A cat']", [False, False, True, True]),
        ("wide * wide > 2147483647", [True, False, False, True]),  # 46341 squared is the first beyond int32
        ("-small < 0", [True, False, True, False]),
        ("small - 2 < 0", [True, True, False, False]),
        ("small + small == 400", [False, False, True, False]),
        ("small / 2 == 0.5", [True, False, False, False]),
        ("day == '2024-05-01'", [True, False, False, False]),
        ("day != '2024-05-01'", [False, True, False, True]),
        ("'2024-05-01' < day", [False, True, False, False]),
        ("day in ['2024-05-02']", [False, True, False, False]),
        ("at >= '2024-05-01 06:00'", [True, False, False, False]),
        ("at in ['2024-05-01']", [False, False, True, False]),
        ("ok == 1", [True, False, False, True]),
        ("ok == small", [True, True, False, False]),
        ("shard == caption or 'b' == shard", [False, False, True, True]),
        ("lower(nothing) == 'a' or nothing > 1", [False, False, False, False]),
        ("caption + '!' == 'A cat!'", [True, False, False, False]),
    ],
)
def test_rows_kept(frame: pd.DataFrame, text: str, kept: list[bool]) -> None:
    result = KeepExpression(text)(frame)
    assert result.tolist() == kept
    assert result.dtype == pd.ArrowDtype(pa.bool_())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "score >",
        "5 > 3",
        "__import__('os').system('true') == 0",
        "score.real > 1",
        "score[0] > 1",
        "(lambda: 1)() == score",
        "open('x') == score",
        "len(score, 1) > 1",
        "score is 5",
        "caption in 'text'",
        "f'{score}' == 'a'",
        "score if ok else nsfw",
        "'a' in ['a'] and score > 1",
        "3 is None or score > 1",
        "score > 1 or 3 < 4",
        "score in [width]",
        "score == [1]",
        "score in top 1,000",
        "(score in top 12,050)",
    ],
)
def test_what_is_not_allowed(text: str) -> None:
    with pytest.raises(ArgumentError):
        KeepExpression(text)


@pytest.mark.parametrize("text", ["score + 1", "caption > 5", "len(width) > 1", "score and ok", "score == None"])
def test_what_does_not_fit_the_columns(frame: pd.DataFrame, text: str) -> None:
    with pytest.raises(ArgumentError, match=r"score|caption|width"):
        KeepExpression(text)(frame)


@pytest.mark.parametrize(
    ("text", "part", "types"),
    [
        ("caption + 1 > 2", "caption + 1", "string and 1"),
        ("score > 1 and caption / 2 > 1", "caption / 2", "string and 2"),
        ("abs(caption) > 1", "abs(caption)", "string"),
        ("-caption > 1", "-caption", "string"),
        ("ok + 1 > 1", "ok + 1", "bool and 1"),
        ("width + None > 1", "width + None", "int32 and None"),
        ("width > 1 / 0", "1 / 0", "1 and 0"),
        ("width == '10'", "width == '10'", "int32 and '10'"),
        ("caption != 5", "caption != 5", "string and 5"),
        ("caption == width", "caption == width", "string and int32"),
        ("caption in [5]", "caption in [5]", "string and a list"),
        ("day == 'tomorrow'", "day == 'tomorrow'", "date32[day] and 'tomorrow'"),
        ("day == 5", "day == 5", "date32[day] and 5"),
        ("day == at", "day == at", "date32[day] and timestamp[ns]"),
        ("lower(width) == 'a'", "lower(width)", "int32"),
        ("contains(caption, caption)", "contains(caption, caption)", "string and string"),
        ("huge * 4 > 1", "huge * 4", "int64 and 4"),
        ("width > 99999999999999999999", "width > 99999999999999999999", "int32 and 99999999999999999999"),
    ],
)
def test_an_error_names_the_part_and_the_types(frame: pd.DataFrame, text: str, part: str, types: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        KeepExpression(text)(frame)
    said = str(raised.value)
    assert said.startswith(f"{text!r}: cannot ")
    assert f" {part!r} of {types} (" in said


@pytest.mark.parametrize("text", ["caption + 1 > 2", "abs(caption) > 1", "caption == 5", "day == 'tomorrow'"])
def test_types_that_do_not_fit_are_told_before_any_row_is_read(tmp_path: Path, text: str) -> None:
    folder = make_dataset(tmp_path / "in", {"a": 2})
    table = pq.read_table(folder / "a.parquet")
    pq.write_table(table.append_column("day", pa.array([1, 1], pa.date32())), folder / "a.parquet")
    dataset = ImageTextPairDataset.from_webdataset(folder)
    (folder / "a.tar").unlink()
    (folder / "a.parquet").unlink()
    with pytest.raises(ArgumentError, match="cannot com"):
        keep(dataset, text)


def test_terms_are_written_as_users_write_them() -> None:
    terms = KeepExpression("score in top 30% and (width in bottom 5 or ok)").terms()
    assert [one.text for one in terms] == ["score in top 30%", "width in bottom 5 or ok"]
    assert [one.quantiles for one in terms] == [
        [one] for one in KeepExpression("score in top 30% or width in bottom 5").quantiles
    ]


def test_a_column_that_is_not_there() -> None:
    with pytest.raises(MissingColumnError, match=r"'aesthetic'.*there are score, nsfw"):
        KeepExpression("aesthetic > 5").require_columns(["score", "nsfw"])


def test_empty_frame(frame: pd.DataFrame) -> None:
    assert KeepExpression("score > 5 and shard == 'a'")(frame.iloc[:0]).tolist() == []
