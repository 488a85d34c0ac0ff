"""The writer's rows: types of metadata, names that clash, columns that are the same in every file."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_image.shards.parquet import read_summary
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.tasks import ImageBatch
from nemo_image.stages.writer import ImageWriterStage
from nemo_image.stages.writing.arrow_columns import arrow_column, concatenated
from tests.stages.writing import Makes, Run, rows, tars

UTC = datetime.UTC
AB = pa.struct({"a": pa.int64(), "b": pa.int64()})
DAY = datetime.date(2024, 5, 17)
MOMENT = datetime.datetime(2024, 5, 17, 8, 30, 0, 5)


def images(*fields: dict[str, Any], caption: str | None = None) -> list[ImageObject]:
    """Return images of no tar, with the metadata given."""
    return [
        ImageObject(image_id=f"k{number}", image_bytes=b"x", caption=caption, metadata=one, shard="s")
        for number, one in enumerate(fields)
    ]


def written(tmp_path: Path, *groups: list[ImageObject], fields: pa.Schema | None = None, **made: Any) -> pa.Table:
    """Return the rows of groups that are packed into one tar."""
    out = tmp_path / "out"
    fields = pa.schema([]) if fields is None else fields
    batches = {f"g{number}": [ImageBatch(some, fields=fields)] for number, some in enumerate(groups)}
    Run(ImageWriterStage(str(out)), batches, earlier=[Makes(**made)])
    assert tars(out) == ["packed-00000"]
    return pq.read_table(out / "packed-00000.parquet")


# Types ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "kinds", "kind", "held"),
    [
        ([1, None], [pa.int16()], pa.int16(), None),
        ([1, 3.5], [pa.int64()], pa.float64(), None),
        ([1, 2**40], [pa.int16()], pa.int64(), None),
        ([0.1], [pa.float32()], pa.float64(), None),
        ([0.5, float("nan")], [pa.float32()], pa.float32(), None),
        ([1, 2.5], [pa.int64(), pa.float32()], pa.float64(), None),
        ([2**60 + 1, 1.5], [], pa.string(), [str(2**60 + 1), "1.5"]),
        ([2**64 - 1], [pa.uint64()], pa.uint64(), None),
        ([2**64], [], pa.string(), [str(2**64)]),
        ([None, None], [pa.large_string()], pa.string(), None),
        ([None], [], pa.null(), None),
        (["1", "x"], [pa.int64()], pa.string(), None),
        (["a", 1, True, None, ["b"]], [], pa.string(), ["a", "1", "true", None, '["b"]']),
        ([{"a": 1}, {"b": "x"}], [], None, [{"a": 1, "b": None}, {"a": None, "b": "x"}]),
        ([{}], [], pa.string(), ["{}"]),
        ([{1: 2}], [], pa.string(), ['{"1": 2}']),
        ([{(1,): 2}], [], pa.string(), ["{(1,): 2}"]),
        ([DAY, MOMENT], [], pa.string(), [str(DAY), str(MOMENT)]),
        ([MOMENT], [pa.date32()], pa.timestamp("us"), None),
        ([MOMENT.replace(tzinfo=UTC)], [pa.timestamp("ms", "UTC")], pa.timestamp("us", "UTC"), None),
        ([Decimal("1.50")], [pa.decimal128(5, 2)], pa.decimal128(5, 2), None),
        ([b"\xff", None], [], pa.binary(), None),
        ([b"\xff", "a"], [], pa.string(), ["b'\\xff'", "a"]),
        ([np.float32(0.1), np.float32(2)], [], pa.float32(), [float(np.float32(0.1)), 2.0]),
        ([np.array([1.0, 2.0], np.float32)], [pa.list_(pa.float32())], pa.list_(pa.float32()), [[1.0, 2.0]]),
        ([np.eye(2)], [], pa.string(), ["[[1.0, 0.0], [0.0, 1.0]]"]),
        ([pd.NA, pd.NaT, 1], [], pa.int64(), [None, None, 1]),
        (["\ud800x"], [], pa.string(), ["?x"]),
        ([["a", "\ud800"]], [], pa.list_(pa.string()), [["a", "?"]]),
        ([["x"], []], [pa.list_(pa.dictionary(pa.int32(), pa.string()))], pa.list_(pa.string()), None),
        ([1, 2], [pa.int64(), pa.string()], pa.int64(), None),
    ],
)  # fmt: skip
def test_a_column_loses_nothing(
    values: list[Any], kinds: list[pa.DataType], kind: pa.DataType | None, held: list[Any] | None
) -> None:
    column = arrow_column(values, kinds)
    if kind is not None:
        assert column.type == kind
    np.testing.assert_equal(column.to_pylist(), values if held is None else held)


def test_circles_and_deep_nests_are_text() -> None:
    circle: list[Any] = []
    circle.append(circle)
    assert arrow_column([circle, 1]).to_pylist() == ["[[...]]", "1"]
    deep: Any = 1
    for _ in range(32):
        deep = [deep]
    assert arrow_column([deep]).to_pylist() == [deep]
    assert arrow_column([{"x": deep}]).to_pylist() == [json.dumps({"x": deep})]


NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats())
VALUES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=3), st.lists(st.integers(0, 3), max_size=2))


@given(st.lists(VALUES, max_size=5), st.lists(st.sampled_from([pa.int8(), pa.float32(), pa.string(), pa.bool_()])))
def test_any_values_come_back_as_they_were_or_as_json(values: list[Any], kinds: list[pa.DataType]) -> None:
    column = arrow_column(values, kinds)
    held = column.to_pylist()
    if pa.types.is_string(column.type) and not all(isinstance(value, str | None) for value in values):
        held = [
            one if isinstance(value, str | None) else json.loads(one) for one, value in zip(held, values, strict=True)
        ]
    np.testing.assert_equal(held, values)


@pytest.mark.parametrize(
    ("parts", "kind", "held"),
    [
        ([[1], [2]], pa.int64(), [1, 2]),
        ([[1], [None], [2.5]], pa.float64(), [1.0, None, 2.5]),
        ([[None], [None]], pa.null(), [None, None]),
        ([["x"], [1]], pa.string(), ["x", "1"]),
        ([[[1]], [["x"]]], pa.string(), ["[1]", '["x"]']),
        ([[{"a": 1}], [{"b": 2}]], AB, [{"a": 1, "b": None}, {"a": None, "b": 2}]),
        ([[[]], [["x"]]], pa.list_(pa.string()), [[], ["x"]]),
        ([[2**60 + 1], [0.5]], pa.string(), [str(2**60 + 1), "0.5"]),
    ],
)  # fmt: skip
def test_columns_of_several_tables(parts: list[list[Any]], kind: pa.DataType, held: list[Any]) -> None:
    made = concatenated([pa.chunked_array([part]) for part in parts])
    assert made.type == kind
    assert made.to_pylist() == held


def test_types_that_differ_between_groups(tmp_path: Path) -> None:
    table = written(
        tmp_path,
        images({"n": 1, "only_a": True, "mixed": "x"}),
        images({"n": 2.5, "mixed": 7, "only_b": [1]}),
        images({"mixed": None}),
    )
    assert table.schema.field("n").type == pa.float64()
    found = table.select(["n", "only_a", "mixed", "only_b"]).to_pylist()
    assert found == [
        {"n": 1.0, "only_a": True, "mixed": "x", "only_b": None},
        {"n": 2.5, "only_a": None, "mixed": "7", "only_b": [1]},
        {"n": None, "only_a": None, "mixed": None, "only_b": None},
    ]


def test_types_do_not_depend_on_the_batches(tmp_path: Path) -> None:
    fields = [{"v": 1}, {"v": None, "w": {"a": 1}}, {"v": 2.5, "w": {"b": 2}}, {"u": "x"}, {"u": 3}]
    tables = []
    for size in (1, 2, 5):
        some = images(*fields)
        batches = [ImageBatch(some[start : start + size]) for start in range(0, 5, size)]
        out = tmp_path / str(size)
        Run(ImageWriterStage(str(out), images_per_tar=5), {"g": batches})
        tables.append((out / "g-00000.parquet").read_bytes())
    assert tables[0] == tables[1] == tables[2]


# Columns --------------------------------------------------------------------------------------------------------------


def test_results_are_in_every_file_once_a_stage_makes_them(tmp_path: Path) -> None:
    out = tmp_path / "out"
    some = images({}, {}, {}, {})
    some[0].embedding = np.array([1, 2], np.float16)
    some[2].nsfw_score = 0.25
    groups = {"g": [ImageBatch(some[:3])], "h": [ImageBatch(some[3:])]}
    made = {"image_embedding": {"operator": "clip"}, "aesthetic_score": {}, "phash": {"operator": "p"}, "width": {}}
    Run(ImageWriterStage(str(out), images_per_tar=2), groups, earlier=[Makes(**made)])
    assert tars(out) == ["g-00000", "packed-00000"]
    first, last = (pq.read_schema(out / f"{name}.parquet") for name in tars(out))
    assert first.names == [
        *("shard", "key", "original_shard", "original_key", "phash"),
        *("width", "height", "image_embedding", "aesthetic_score", "image_error"),
    ]
    # Without a stage that makes it, a score is there where an image has one.
    assert {*last.names} - {*first.names} == {"nsfw_score"}
    kinds = {"image_embedding": pa.list_(pa.float32()), "aesthetic_score": pa.float32(), "width": pa.int32()}
    kinds |= {"height": pa.int32(), "image_error": pa.string(), "key": pa.string(), "original_key": pa.string()}
    kinds |= dict.fromkeys(("shard", "original_shard"), pa.dictionary(pa.int32(), pa.string()))
    for found in (first, last):
        assert {name: found.field(name).type for name in kinds} == kinds
    assert last.field("nsfw_score").type == pa.float32()
    footers = [read_summary(str(out / f"{name}.parquet")).footer for name in tars(out)]
    # A size may be the source's: then it is no stage's.
    assert [one and one.columns for one in footers] == [{name: made[name] for name in made if name != "width"}] * 2
    assert [row["image_embedding"] for row in rows(out / "g-00000.parquet")] == [[1.0, 2.0], None]
    assert rows(out / "packed-00000.parquet")[0]["nsfw_score"] == 0.25


def test_a_caption_column_is_there_if_any_image_has_one(tmp_path: Path) -> None:
    assert "caption" not in written(tmp_path, images({}, {})).column_names
    with_one = written(tmp_path, images({}), images({}, caption="x"))
    assert with_one["caption"].to_pylist() == [None, "x"]


def test_fields_of_our_names_give_way_and_keep_what_they_say(tmp_path: Path) -> None:
    fields = {
        "key": 7,
        "shard": "elsewhere",
        "caption": "another",
        "original_key": "older",
        "image_embedding": [1.0, 2.0],
        "aesthetic_score": 3.0,
        "nsfw_score": 0.5,
        "image_error": "decode: old",
        "source_key": "taken",
        "width": 640,
    }
    image = images(fields, caption="a caption")[0]
    image.embedding = np.array([3, 4], np.float32)
    image.aesthetic_score = 5.0
    image.width, image.height = 8, 6
    row = written(tmp_path, [image]).to_pylist()[0]
    assert row == {
        "shard": "packed-00000",
        "key": "k0",
        "original_shard": "s",
        "original_key": "k0",
        "caption": "a caption",
        "source_key_": 7,
        "source_shard": "elsewhere",
        "source_caption": "another",
        "source_original_key": "older",
        "source_image_embedding": [1.0, 2.0],
        "source_aesthetic_score": 3.0,
        "source_image_error": "decode: old",
        "source_key": "taken",
        "width": 640,  # of the source: it stays
        "height": 6,
        "image_embedding": [3.0, 4.0],
        "aesthetic_score": 5.0,
        "nsfw_score": 0.5,  # no stage makes it: it stays
        "image_error": None,
    }


def test_fields_of_our_names_that_say_nothing_new_are_not_repeated(tmp_path: Path) -> None:
    fields = {"key": "k0", "shard": "s", "caption": "c", "image_error": None, "aesthetic_score": 5.0}
    fields |= {"image_embedding": [3.0, 4.0], "original_key": None}
    image = images(fields, caption="c")[0]
    image.embedding, image.aesthetic_score = np.array([3, 4], np.float32), 5.0
    image.caption = "changed"
    table = written(tmp_path, [image])
    assert not [name for name in table.column_names if name.startswith("source_")]
    assert table["caption"].to_pylist() == ["changed"]


def test_sizes_of_the_source_stay_row_by_row(tmp_path: Path) -> None:
    some = images({"width": 640}, {}, {"width": None})
    for image in some:
        image.width, image.height = 8, 6
    table = written(tmp_path, some[:1], some[1:], fields=pa.schema([("width", pa.int64())]))
    assert table["width"].to_pylist() == [640, 8, 8]
    assert (table.schema.field("width").type, table.schema.field("height").type) == (pa.int64(), pa.int32())


def test_a_pipeline_over_a_pipeline_s_output_keeps_what_the_first_one_knew(tmp_path: Path) -> None:
    some = images({"n": 1}, {"n": 2})
    for image in some:
        image.aesthetic_score = 4.0
    first = written(tmp_path / "one", some, aesthetic_score={"operator": "x"})
    second = images(*first.drop_columns("shard").to_pylist())
    table = written(tmp_path / "two", second)
    assert table["aesthetic_score"].to_pylist() == [4.0, 4.0]
    assert table["source_original_shard"].to_pylist() == ["s", "s"]
    assert table["n"].to_pylist() == [1, 2]


def test_odd_names_of_fields(tmp_path: Path) -> None:
    table = written(tmp_path, images({"a\ud800": 1, "": 2, "a?": 3}))
    assert table.select([table.column_names.index(name) for name in ("a?", "", "a?_")]).to_pylist() == [
        {"a?": 1, "": 2, "a?_": 3}
    ]
