"""Expressions against pandas' own results, and what they refuse."""

from __future__ import annotations

import pandas as pd
import pyarrow as pa
import pytest

from nemo_image.errors import ArgumentError, MissingColumnError
from nemo_image.filters import KeepExpression


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
    ],
)
def test_what_is_not_allowed(text: str) -> None:
    with pytest.raises(ArgumentError):
        KeepExpression(text)


@pytest.mark.parametrize("text", ["score + 1", "caption > 5", "len(width) > 1", "score and ok", "score == None"])
def test_what_does_not_fit_the_columns(frame: pd.DataFrame, text: str) -> None:
    with pytest.raises(ArgumentError, match=r"score|caption|width"):
        KeepExpression(text)(frame)


def test_a_column_that_is_not_there() -> None:
    with pytest.raises(MissingColumnError, match=r"'aesthetic'.*there are score, nsfw"):
        KeepExpression("aesthetic > 5").require_columns(["score", "nsfw"])


def test_empty_frame(frame: pd.DataFrame) -> None:
    assert KeepExpression("score > 5 and shard == 'a'")(frame.iloc[:0]).tolist() == []
