"""Quantile keeps against sorting all values in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets import load as load_module
from nemo_image.errors import ArgumentError, MissingColumnError, RunError
from nemo_image.filters import ImageQualityStats, KeepExpression, keep, keep_with_thresholds
from nemo_image.filters.image_quality import QualityColumns
from nemo_image.filters.quantiles import Quantile
from nemo_image.shards import parquet
from tests.makers import make_dataset, write_rows, write_tar


def expected(values: Sequence[Any], side: str, amount: str, unit: str) -> list[bool]:
    """Which values are in a quantile, found by sorting them all."""
    good = [value for value in values if value is not None and not (isinstance(value, float) and math.isnan(value))]
    if not good:
        return [False] * len(values)
    rows = math.ceil(Fraction(amount) * len(good) / 100) if unit else min(len(good), int(amount))
    edge = sorted(good, reverse=side == "top")[rows - 1]
    inside = (lambda value: value >= edge) if side == "top" else (lambda value: value <= edge)
    return [value in good and inside(value) if value is not None else False for value in values]


def shards_of(folder: Path, values: pa.Array, sizes: Sequence[int]) -> ImageTextPairDataset:
    """A dataset of rows without samples: nothing but a key, a column of values, and one of text."""
    start = 0
    for number, size in enumerate(sizes):
        write_tar(folder / f"{number:03d}.tar", [])
        some = values.slice(start, size)
        rows = {"key": [f"{row}" for row in range(len(some))], "value": some, "text": ["x"] * len(some)}
        write_rows(folder / f"{number:03d}.parquet", pa.table(rows))
        start += size
    return ImageTextPairDataset.from_webdataset(folder)


def kept(dataset: ImageTextPairDataset, text: str) -> list[bool]:
    found: list[bool] = keep(dataset, text).metadata["nemo_image_kept"].compute().tolist()
    return found


FLOATS = st.one_of(st.none(), st.floats(width=32, allow_subnormal=True), st.sampled_from([0.0, -0.0, 1.5]))
KINDS = {
    "float32": (pa.float32(), FLOATS),
    "float64": (pa.float64(), st.one_of(st.none(), st.floats())),
    "int64": (pa.int64(), st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1))),
    "uint64": (pa.uint64(), st.one_of(st.none(), st.integers(0, 2**64 - 1))),
    "int16": (pa.int16(), st.one_of(st.none(), st.integers(-3, 3))),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_the_rows_are_those_that_sorting_gives(
    kind: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    arrow, values = KINDS[kind]
    drawn = data.draw(st.lists(values, min_size=1, max_size=40))
    side = data.draw(st.sampled_from(["top", "bottom"]))
    amount, unit = data.draw(
        st.sampled_from([("30", "%"), ("0.1", "%"), ("100", "%"), ("33.3", "%"), ("1", ""), ("7", "")])
    )
    cut = data.draw(st.integers(0, len(drawn)))
    array = pa.array(drawn, arrow)
    dataset = shards_of(tmp_path_factory.mktemp("rows"), array, [cut, len(drawn) - cut])
    assert kept(dataset, f"value in {side} {amount}{unit}") == expected(array.to_pylist(), side, amount, unit)


def test_the_largest_integers(tmp_path: Path) -> None:
    dataset = shards_of(tmp_path, pa.array([2**63 + 5, None, 3, 2**64 - 1, 0], pa.uint64()), [2, 3])
    assert kept(dataset, "value in top 2") == [True, False, False, True, False]
    assert kept(dataset, "value not in bottom 2") == [True, False, False, True, False]


def test_many_values_in_many_shards(tmp_path: Path, scheduler: Any) -> None:
    values = np.random.default_rng(5).normal(size=3000).astype(np.float32)
    dataset = shards_of(tmp_path, pa.array(values), [700, 0, 1, 1299, 1000])
    edge = np.sort(values)[::-1][899]
    assert keep_with_thresholds(dataset, "value in top 30%")[1] == {"value in top 30%": float(edge)}
    assert kept(dataset, "value in top 30%") == (values >= edge).tolist()
    assert kept(dataset, "value not in top 30%") == (values < edge).tolist()


def test_ties_are_all_kept_and_no_order_matters(tmp_path: Path) -> None:
    values = [1, 2, 2, 2, 3, 2, None, 1]
    for name, sizes in (("one", [8]), ("more", [3, 3, 2])):
        dataset = shards_of(tmp_path / name, pa.array(values, pa.int32()), sizes)
        assert kept(dataset, "value in top 2") == [value is not None and value >= 2 for value in values]
        dataset.metadata = dataset.metadata.repartition(npartitions=2)
        assert kept(dataset, "value in bottom 2") == [value == 1 for value in values]


def test_a_quantile_is_of_all_rows_whatever_else_is_asked(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 6, "b": 4})
    dataset = ImageTextPairDataset.from_webdataset(tmp_path)  # score is seed / 10
    kept_seeds = keep(dataset, "score in top 40% and seed < 8").metadata.compute().query("nemo_image_kept")["seed"]
    assert kept_seeds.tolist() == [6, 7]
    dataset.metadata = dataset.metadata[dataset.metadata["seed"] < 8]
    of_the_rest = keep(dataset, "score in top 40%").metadata.compute().query("nemo_image_kept")["seed"]
    assert of_the_rest.tolist() == [4, 5, 6, 7]


def test_nulls_and_nans_never_count(tmp_path: Path) -> None:
    values = pa.array([None, float("nan"), 1.0, 2.0, float("nan"), 3.0, 4.0], pa.float32())
    dataset = shards_of(tmp_path, values, [4, 3])
    assert kept(dataset, "value in top 50%") == [False, False, False, False, False, True, True]
    assert kept(dataset, "value not in top 50%") == [False, False, True, True, False, False, False]
    nothing = shards_of(tmp_path / "nothing", pa.array([None, None], pa.float32()), [2])
    assert keep_with_thresholds(nothing, "value in top 50%")[1] == {"value in top 50%": None}
    assert kept(nothing, "value in top 50%") == [False, False]


@pytest.mark.in_process("watches or changes this process")
def test_only_the_column_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = shards_of(tmp_path, pa.array(range(10), pa.int64()), [5, 5])
    asked: set[str] = set()
    read = parquet.read_present

    def noting(url: str, columns: Sequence[str], *more: Any) -> Any:
        asked.update(columns)
        return read(url, columns, *more)

    monkeypatch.setattr(load_module.parquet, "read_present", noting)
    keep(dataset, "value in top 3")
    assert asked == {"key", "value"}


@pytest.mark.in_process("watches or changes this process")
def test_pending_columns_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path, {"a": 4, "b": 3})
    calls = []
    compute = QualityColumns.__call__

    def counting(self: QualityColumns, frame: pd.DataFrame) -> pd.DataFrame:
        calls.append(len(frame))
        return compute(self, frame)

    monkeypatch.setattr(QualityColumns, "__call__", counting)
    chosen = keep(ImageQualityStats()(ImageTextPairDataset.from_webdataset(tmp_path)), "blur in top 50%")
    frame = chosen.metadata.compute()
    assert sorted(calls) == [3, 4]
    assert frame["nemo_image_kept"].tolist() == expected(frame["blur"].tolist(), "top", "50", "%")


def test_a_garbled_shard_is_named(tmp_path: Path) -> None:
    dataset = shards_of(tmp_path, pa.array(range(10), pa.int64()), [5, 5])
    (tmp_path / "001.parquet").write_bytes(b"garbage")
    with pytest.raises(RunError, match="001"):
        keep(dataset, "value in top 3")


@pytest.mark.parametrize(
    ("text", "quantiles"),
    [
        ("clip_score in top 30%", [Quantile("clip_score", "top", Fraction(30), True)]),
        ("a in bottom 0.5 % and b > 1", [Quantile("a", "bottom", Fraction(1, 2), True)]),
        ("a in top 10000", [Quantile("a", "top", Fraction(10000), False)]),
        ("b == 'a in top 30%'", []),
        ('contains(b, "in top 5%") or a not in top 5%', [Quantile("a", "top", Fraction(5), True)]),
        ("0 < a in top 30%", [Quantile("a", "top", Fraction(30), True)]),
    ],
)
def test_what_is_written(text: str, quantiles: list[Quantile]) -> None:
    assert KeepExpression(text).quantiles == quantiles


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a in top 0%", "above 0%"),
        ("a in top 101%", "100%"),
        ("a in top 0", "at least 1"),
        ("a in top 1.5", "whole"),
        ("a in top", "quantile"),
        ("a in top 30 percent", "not an expression"),
        ("a + 1 in top 30%", "a column by itself"),
        ("a in len(b)", "a column by itself"),
        ("top 30%", "not an expression"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        KeepExpression(text)


def test_some_rows_do_not_tell(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [1.0, 2.0]})
    with pytest.raises(ArgumentError, match="all rows of the dataset"):
        KeepExpression("a in top 30%")(frame)
    dataset = shards_of(tmp_path, pa.array([1, 2], pa.int64()), [2])
    with pytest.raises(ArgumentError, match="cannot compare"):
        keep(dataset, "text in top 30%")
    with pytest.raises(MissingColumnError, match="nosuch"):
        keep(dataset, "nosuch in top 30%")
    with pytest.raises(MissingColumnError, match=r"add_columns\(dataset, \['blur'\]\)"):
        keep(dataset, "blur in top 30%")


def test_a_float_beyond_all_integers(tmp_path: Path) -> None:
    array = pa.array([2.0**64, 1.0, None], pa.float64())
    folder = make_dataset(tmp_path, {"a": 3})
    pq.write_table(pq.read_table(folder / "a.parquet").append_column("value", array), folder / "a.parquet")
    assert kept(ImageTextPairDataset.from_webdataset(folder), "value in top 30%") == [True, False, False]
