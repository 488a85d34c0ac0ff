"""Shards whose columns differ: unified before all of them are read, and said."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_image.datasets import ImageTextPairDataset, footers
from nemo_image.datasets.opening import join_types
from nemo_image.datasets.save import SaveOptions, save
from nemo_image.datasets.schemas import unify_schemas, with_source
from nemo_image.datasets.state import DatasetState
from nemo_image.embedders import TimmImageEmbedder
from nemo_image.errors import MetadataFileError, MissingColumnError, RunError
from nemo_image.shards import parquet
from tests.makers import TINY_MODEL, make_dataset, sample, write_rows, write_tar

pytestmark = pytest.mark.filterwarnings("ignore:.*is a random network.*")

Columns = Mapping[str, Any]


def shards_of(folder: Path, shards: Mapping[str, Columns]) -> Path:
    """Write shards of two samples, ``<shard>0`` and ``<shard>1``, with the columns given beside the key."""
    for name, columns in shards.items():
        keys = [f"{name}0", f"{name}1"]
        write_tar(folder / f"{name}.tar", [sample(number, key) for number, key in enumerate(keys)])
        write_rows(folder / f"{name}.parquet", pa.table({"key": keys, **columns}))
    return folder


def opened(folder: Path, **options: Any) -> ImageTextPairDataset:
    return ImageTextPairDataset.from_webdataset(str(folder), **options)


def unified(folder: Path, **options: Any) -> tuple[DatasetState, list[str]]:
    return unify_schemas(opened(folder, **options).state)


def values(frame: Any, name: str) -> list[Any]:
    return [None if value is pd.NA else value for value in frame.compute()[name]]


def arrow_texts(*texts: str) -> pd.Series:
    return pd.Series(texts, dtype=pd.ArrowDtype(pa.string()))


def kind(state: DatasetState, name: str) -> str:
    return str(state.source.schema.field(name).type)


def saved(state: DatasetState, target: str | None, max_failure_ratio: float) -> tuple[DatasetState, dict[str, Any]]:
    return save(state, target, None, SaveOptions(max_failure_ratio=max_failure_ratio))


# Types ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (pa.array([1, 2]), pa.array([1.5, None]), "double"),
        (pa.array([1, 2], pa.int32()), pa.array([2**40, 3]), "int64"),
        (pa.array([0.5, 1], pa.float32()), pa.array([0.1, 2]), "double"),
        (pa.nulls(2), pa.array(["x", None]), "string"),
        (pa.array(["x", "y"]).dictionary_encode(), pa.array(["z", None], pa.large_string()), "string"),
        (pa.array([[], None], pa.list_(pa.null())), pa.array([[1], [2, None]]), "list<item: int64>"),
        (pa.array([[1], None]), pa.array([[1.5], [None]]), "list<item: double>"),
        (pa.array([{"a": 1}] * 2), pa.array([{"a": 1.5, "b": "x"}] * 2), "struct<a: double, b: string>"),
        (
            pa.array([datetime.datetime(2020, 1, 1)] * 2, pa.timestamp("ms")),
            pa.array([datetime.datetime(2020, 1, 1, 0, 0, 0, 7)] * 2, pa.timestamp("us")),
            "timestamp[us]",
        ),
        (
            pa.array([Decimal("12345.6")] * 2, pa.decimal128(6, 1)),
            pa.array([Decimal("1.234")] * 2, pa.decimal128(4, 3)),
            "decimal128(8, 3)",
        ),
    ],
    ids=["int float", "int", "float", "null", "dictionary", "empty lists", "lists", "structs", "times", "decimals"],
)
@pytest.mark.parametrize("filtered", [False, True])
def test_later_shards_widen_the_type(
    tmp_path: Path, first: pa.Array, second: pa.Array, expected: str, filtered: bool
) -> None:
    shards_of(tmp_path / "in", {"a": {"x": first}, "b": {"x": second}, "c": {"x": first}})
    dataset = opened(tmp_path / "in")
    if filtered:
        dataset.metadata = dataset.metadata[dataset.metadata["key"] != "c1"]
    state, notes = unify_schemas(dataset.state)
    assert kind(state, "x") == expected
    plain = [one.dictionary_decode() if pa.types.is_dictionary(one.type) else one for one in (first, second)]
    found, _ = saved(state, str(tmp_path / "out"), 0.0)
    tables = [pq.read_table(tmp_path / "out" / f"{name}.parquet") for name in "abc"]
    assert [str(table.schema.field("x").type).replace("element", "item") for table in tables] == [expected] * 3
    oracle = [*plain[0].to_pylist(), *plain[1].to_pylist(), *plain[0].to_pylist()[: 1 if filtered else 2]]
    padded = [{"b": None, **one} if isinstance(one, dict) and "struct" in expected else one for one in oracle]
    written = [value for table in tables for value in table["x"].to_pylist()]
    assert written == padded
    assert len(found.frame) == len(oracle)
    assert len(notes) == (0 if expected == "string" and not pa.types.is_null(first.type) else 1)


def test_what_differs_is_said_by_shard(tmp_path: Path) -> None:
    ints, floats = {"x": [1, 2]}, {"x": [0.5, 2]}
    shards_of(tmp_path, {"a": ints, "b": floats, "c": ints, "d": ints, "e": ints, "f": {}, "g": {"x": pa.nulls(2)}})
    _, notes = unified(tmp_path)
    assert notes == [
        "column 'x': int64 in 4 shards (a, c, d, …), null in 1 shard (g), absent from 1 shard (f), "
        "double in the dataset"
    ]


def test_where_nothing_differs_the_state_is_the_same(tmp_path: Path) -> None:
    shards_of(tmp_path, {"a": {"x": [1, 2]}, "b": {"x": [3, 4]}})
    dataset = opened(tmp_path)
    dataset.metadata = dataset.metadata[dataset.metadata["x"] > 1]
    state = dataset.state
    again, notes = unify_schemas(state)
    assert again is state
    assert notes == []


def test_narrower_shards_are_said_and_change_nothing(tmp_path: Path) -> None:
    shards_of(tmp_path, {"a": {"x": [1.5, 2]}, "b": {"x": [3, 4]}, "c": {}})
    state = opened(tmp_path).state
    again, notes = unify_schemas(state)
    assert again is state
    assert notes == ["column 'x': int64 in 1 shard (b), absent from 1 shard (c), double in the dataset"]


def test_twice_is_once(tmp_path: Path) -> None:
    shards_of(tmp_path, {"a": {"x": [1, 2]}, "b": {"x": [1.5, 2], "y": ["p", "q"]}})
    once, notes = unified(tmp_path)
    twice, again = unify_schemas(once)
    assert twice is once
    assert len(notes) == len(again) == 2


def test_one_odd_shard_stops_no_other(tmp_path: Path) -> None:
    shards_of(
        tmp_path / "in", {"a": {"x": [1, 2]}, "b": {"x": ["one", "two"]}, "c": {"x": [1.5, 2]}, "d": {"x": [3, 4]}}
    )
    (tmp_path / "in" / "d.parquet").write_bytes(b"PAR1 no more")
    state, notes = unified(tmp_path / "in")
    assert kind(state, "x") == "double"
    assert "string in 1 shard (b)" in notes[0]
    assert "no common type" in notes[0]
    with pytest.raises(RunError) as raised:
        saved(state, str(tmp_path / "out"), 1.0)
    assert sorted(raised.value.failures) == ["b", "d"]
    assert "column 'x' is string here and double in the dataset" in raised.value.failures["b"]
    assert pq.read_table(tmp_path / "out" / "c.parquet")["x"].to_pylist() == [1.5, 2]


# Integers that floats cannot hold -------------------------------------------------------------------------------------

BIG = 2**53 + 1


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
def test_big_integers_never_become_floats(tmp_path: Path, order: list[str]) -> None:
    integers, floats = {"x": [BIG, 1]}, {"x": [1.5, 2]}
    shards_of(tmp_path / "in", dict(zip(order, (integers, floats), strict=True)))
    dataset = opened(tmp_path / "in")
    before = str(dataset.source.schema.field("x").type)
    state, notes = unify_schemas(dataset.state)
    # The type stays, so the one shard that does not fit it fails by name; no value is changed.
    assert kind(state, "x") == before
    assert f"shard {order[0]} holds integers that no double equals" in notes[0]
    with pytest.raises(RunError) as raised:
        saved(state, str(tmp_path / "out"), 1.0)
    assert list(raised.value.failures) == ["b"]
    kept = pq.read_table(tmp_path / "out" / "a.parquet")["x"].to_pylist()
    assert kept == (integers if order[0] == "a" else floats)["x"]


def test_whole_floats_among_big_integers_are_read_as_integers(tmp_path: Path) -> None:
    shards_of(tmp_path / "in", {"a": {"x": [BIG, 1]}, "b": {"x": [3.0, None]}, "c": {"x": [4, 5]}})
    state, _ = unified(tmp_path / "in")
    found, _ = saved(state, str(tmp_path / "out"), 0.0)
    assert kind(found, "x") == "int64"
    assert values(found.frame, "x") == [BIG, 1, 3, None, 4, 5]


def test_the_largest_exact_integers_join_floats(tmp_path: Path) -> None:
    shards_of(tmp_path / "in", {"a": {"x": [2**53, -(2**53)]}, "b": {"x": [0.5, None]}})
    state, _ = unified(tmp_path / "in")
    found, _ = saved(state, str(tmp_path / "out"), 0.0)
    assert values(found.frame, "x") == [2.0**53, -(2.0**53), 0.5, None]


def test_ids_stay_integers(tmp_path: Path) -> None:
    for name, ids in (("a", pa.array([1, 2])), ("b", pa.array([3.0, None]))):
        write_tar(tmp_path / f"{name}.tar", [sample(number, f"{number:06d}") for number in (1, 2, 3)])
        write_rows(tmp_path / f"{name}.parquet", pa.table({"number": ids}))
    dataset = opened(tmp_path, id_col="number")
    state, notes = unify_schemas(dataset.state)
    assert state is not None
    assert kind(state, "number") == "int64"
    assert "ids stay as they are" in notes[0]
    assert values(state.frame, "number") == [1, 2, 3, None]


# Columns that the first shard lacks -----------------------------------------------------------------------------------

LATER: Mapping[str, Columns] = {
    "a": {"x": [1, 2]},
    "b": {"x": [0.5, 2.5], "late": ["p", "q"]},
    "c": {"x": [5, 6], "late": ["r", None]},
}


def test_a_column_that_the_first_shard_lacks_is_there(tmp_path: Path, scheduler: Any) -> None:
    shards_of(tmp_path / "in", LATER)
    dataset = opened(tmp_path / "in")
    assert "late" not in dataset.metadata.columns
    state, notes = unify_schemas(dataset.state)
    assert notes[1] == "column 'late': absent from 1 shard (a), string in the dataset"
    assert not state.lineage.seen(state.frame).touched
    found, totals = saved(state, str(tmp_path / "out"), 0.0)
    assert totals["shards"]["done"] == 3
    assert values(found.frame, "late") == [None, None, "p", "q", "r", None]
    assert values(found.frame, "x") == [1, 2, 0.5, 2.5, 5, 6]


STEPS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "filter": (lambda f: f[f["x"] > 1], lambda f: f[f["x"] > 1]),
    "assign": (lambda f: f.assign(y=f["x"] * 2), lambda f: f.assign(y=f["x"] * 2)),
    "rename": (lambda f: f.rename(columns={"x": "z"}), lambda f: f.rename(columns={"x": "z"})),
    "drop another": (lambda f: f.assign(w=1).drop(columns=["x"]), lambda f: f.assign(w=1).drop(columns=["x"])),
    "a user's function": (
        lambda f: f.map_partitions(lambda part: part.assign(y=part["x"] + 1)),
        lambda f: f.assign(y=f["x"] + 1),
    ),
    "merge": (
        lambda f: f.merge(pd.DataFrame({"key": arrow_texts("a0", "b1", "c0"), "extra": [1, 2, 3]}), on="key"),
        lambda f: f.merge(pd.DataFrame({"key": ["a0", "b1", "c0"], "extra": [1, 2, 3]}), on="key"),
    ),
    "repartition": (lambda f: f.repartition(npartitions=2), lambda f: f),
    "one partition": (lambda f: f.partitions[1], lambda f: f[f["shard"] == "b"]),
}


@pytest.mark.parametrize("step", STEPS)
def test_the_users_steps_go_on_over_the_wider_columns(tmp_path: Path, step: str) -> None:
    shards_of(tmp_path, LATER)
    change, oracle = STEPS[step]
    dataset = opened(tmp_path)
    dataset.metadata = change(dataset.metadata)
    state, _ = unify_schemas(dataset.state)
    whole = pd.DataFrame(
        {
            "key": ["a0", "a1", "b0", "b1", "c0", "c1"],
            "x": [1.0, 2.0, 0.5, 2.5, 5.0, 6.0],
            "late": [None, None, "p", "q", "r", None],
            "shard": ["a", "a", "b", "b", "c", "c"],
        }
    )
    found, expected = state.frame.compute(), oracle(whole)
    assert sorted(found.columns) == sorted(expected.columns)
    assert state.lineage.touched
    for name in expected.columns:
        ours = [None if pd.isna(value) else value for value in found[name]]
        assert ours == [None if pd.isna(value) else value for value in expected[name]], name


def test_columns_that_the_user_chose_stay_chosen(tmp_path: Path) -> None:
    shards_of(tmp_path, LATER)
    dataset = opened(tmp_path)
    dataset.metadata = dataset.metadata[["shard", "key", "x"]]
    state, _ = unify_schemas(dataset.state)
    assert list(state.frame.columns) == ["shard", "key", "x"]
    assert values(state.frame, "x") == [1, 2, 0.5, 2.5, 5, 6]


def test_a_column_of_the_users_own_is_not_overwritten(tmp_path: Path) -> None:
    shards_of(tmp_path, LATER)
    dataset = opened(tmp_path)
    mine = pd.DataFrame({"key": arrow_texts("a0", "b1"), "late": ["mine", "mine too"]})
    dataset.metadata = dataset.metadata.merge(mine, on="key", how="left")
    state, notes = unify_schemas(dataset.state)
    assert list(state.frame.columns) == list(dataset.metadata.columns)
    assert dict(zip(values(state.frame, "key"), values(state.frame, "late"), strict=True))["b1"] == "mine too"
    assert "column 'late': string in 2 shards (b, c), not read: the frame has another of that name" in notes


def test_a_step_of_fixed_columns_keeps_them(tmp_path: Path) -> None:
    shards_of(tmp_path, LATER)
    dataset = opened(tmp_path)
    dataset.metadata = dataset.metadata.map_partitions(lambda part: part, meta=dataset.metadata._meta)
    state, notes = unify_schemas(dataset.state)
    assert list(state.frame.columns) == list(dataset.metadata.columns)
    assert "'late'" in notes[-1]
    assert "left out of the frame" in notes[-1]
    # Without this, Dask refuses the partitions for their columns.
    assert values(state.frame, "x") == [1, 2, 0.5, 2.5, 5, 6]


def test_steps_that_fail_on_wider_types_leave_the_frame_alone(tmp_path: Path) -> None:
    shards_of(tmp_path, LATER)

    def only_integers(part: pd.DataFrame) -> pd.DataFrame:
        if part["x"].dtype != pd.ArrowDtype(pa.int64()):
            raise TypeError("integers only")
        return part

    dataset = opened(tmp_path)
    dataset.metadata = dataset.metadata.map_partitions(only_integers)
    state, notes = unify_schemas(dataset.state)
    assert state.frame is dataset.state.frame
    assert "do not work on the wider types" in notes[-1]


def test_frames_of_the_users_own_are_left_alone(tmp_path: Path) -> None:
    import dask.dataframe as dd

    shards_of(tmp_path, LATER)
    rows = pd.DataFrame({"key": ["a0", "b0"], "shard": ["a", "b"]})
    tars = [str(tmp_path / f"{name}.tar") for name in "abc"]
    state = ImageTextPairDataset(tmp_path, dd.from_pandas(rows, npartitions=1), tars, "key").state
    assert unify_schemas(state) == (state, [])


# Operators, lineage, resuming -----------------------------------------------------------------------------------------


def embedded(folder: Path) -> ImageTextPairDataset:
    return TimmImageEmbedder(TINY_MODEL, autocast=False)(opened(folder))


def test_an_untouched_frame_stays_so_with_what_is_pending(tmp_path: Path) -> None:
    shards_of(tmp_path, LATER)
    dataset = embedded(tmp_path)
    state, _ = unify_schemas(dataset.state)
    lineage = state.lineage.seen(state.frame)
    assert not lineage.touched
    assert lineage.pending == dataset.lineage.pending
    assert lineage.provenance == dataset.lineage.provenance
    saved(state, None, 0.0)
    tables = [pq.read_table(tmp_path / f"{name}.parquet") for name in "abc"]
    assert all(table["image_embedding"].null_count == 0 for table in tables)
    # In place, what was there stays as it was.
    assert [str(table.schema.field("x").type) for table in tables] == ["int64", "double", "int64"]
    _, totals = saved(unify_schemas(embedded(tmp_path).state)[0], None, 0.0)
    assert totals["shards"] == {"done": 0, "skipped": 3, "failed": 0}


def test_what_the_user_changed_is_still_seen(tmp_path: Path) -> None:
    shards_of(tmp_path, LATER)
    dataset = embedded(tmp_path)
    dataset.metadata = dataset.metadata.assign(width=1)
    state, _ = unify_schemas(dataset.state)
    lineage = state.lineage.seen(state.frame)
    assert lineage.touched
    assert "width" not in lineage.pending
    assert {"height", "image_embedding"} <= set(lineage.pending)
    # Assigned after unifying: seen just as well.
    untouched, _ = unify_schemas(embedded(tmp_path).state)
    later = untouched.lineage.seen(untouched.frame.assign(height=1))
    assert later.touched
    assert "height" not in later.pending
    assert "width" in later.pending


@pytest.mark.parametrize("touched", [False, True])
def test_a_second_run_skips_everything(tmp_path: Path, touched: bool) -> None:
    shards_of(tmp_path / "in", LATER)

    def run() -> dict[str, Any]:
        dataset = embedded(tmp_path / "in")
        if touched:
            dataset.metadata = dataset.metadata[dataset.metadata["x"] >= 1]
        state, _ = unify_schemas(dataset.state)
        return saved(state, str(tmp_path / "out"), 0.0)[1]

    assert run()["shards"] == {"done": 3, "skipped": 0, "failed": 0}
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.parquet")}
    assert run()["shards"] == {"done": 0, "skipped": 3, "failed": 0}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.parquet")} == first
    assert run()["rows_out"] == (5 if touched else 6)


def test_results_of_a_run_that_was_stopped_come_from_the_operator(tmp_path: Path) -> None:
    shards_of(tmp_path / "in", LATER)
    (tmp_path / "clean").mkdir()
    for path in (tmp_path / "in").iterdir():
        (tmp_path / "clean" / path.name).write_bytes(path.read_bytes())
    for folder in ("in", "clean"):
        state, _ = unify_schemas(embedded(tmp_path / folder).state)
        if folder == "in":
            bad = (tmp_path / "in" / "a.tar").read_bytes()
            (tmp_path / "in" / "a.tar").write_bytes(b"no tar")
            with pytest.raises(RunError):
                saved(state, None, 1.0)
            (tmp_path / "in" / "a.tar").write_bytes(bad)
            state, notes = unify_schemas(embedded(tmp_path / "in").state)
            assert not [line for line in notes if "image_embedding" in line]
            assert list(state.frame.columns) == list(unify_schemas(embedded(tmp_path / "clean").state)[0].frame.columns)
        saved(state, None, 0.0)
    tables = [[pq.read_table(tmp_path / folder / f"{name}.parquet") for name in "abc"] for folder in ("in", "clean")]
    assert tables[0] == tables[1]


def test_results_that_only_later_shards_have_keep_their_fingerprint(tmp_path: Path) -> None:
    shards_of(tmp_path, LATER)
    saved(unify_schemas(embedded(tmp_path).state)[0], None, 0.0)
    write_rows(tmp_path / "a.parquet", {"key": ["a0", "a1"], "x": [1, 2]})
    state, _ = unified(tmp_path)
    made = embedded(tmp_path).provenance["image_embedding"]
    assert state.lineage.provenance["image_embedding"] == made
    # Made by different operators: nothing is claimed.
    table = pq.read_table(tmp_path / "b.parquet")
    footer = parquet.read_summary(str(tmp_path / "b.parquet")).footer
    assert footer is not None
    other = parquet.Footer(columns={**footer.columns, "image_embedding": {"model": "another"}})
    parquet.write_table(str(tmp_path / "b.parquet"), table.replace_schema_metadata(None), other)
    assert "image_embedding" not in unified(tmp_path)[0].lineage.provenance


def test_operators_look_at_ids_in_the_wider_type(tmp_path: Path) -> None:
    for name, ids, keys in (
        ("a", pa.array([1, 2], pa.int16()), ["1", "2"]),
        ("b", pa.array([70000, 70001]), ["x", "y"]),
    ):
        write_tar(tmp_path / f"{name}.tar", [sample(number, key) for number, key in enumerate(keys)])
        write_rows(tmp_path / f"{name}.parquet", pa.table({"number": ids}))
    dataset = TimmImageEmbedder(TINY_MODEL, autocast=False)(opened(tmp_path, id_col="number"))
    state, _ = unify_schemas(dataset.state)
    with pytest.raises(RunError) as raised:
        saved(state, str(tmp_path / "out"), 1.0)
    # That no id names a sample, not that ids do not fit the first shard's type.
    assert list(raised.value.failures) == ["b"]
    assert "names a sample" in raised.value.failures["b"]


def test_with_source_is_for_frames_beside_the_main_one(tmp_path: Path) -> None:
    shards_of(tmp_path, LATER)
    dataset = opened(tmp_path)
    counting = dataset.metadata[dataset.metadata["x"] > 0.7]
    state, _ = unify_schemas(dataset.state)
    assert len(with_source(counting, dataset.source, state.source)) == 5


# Sidecars, tars alone, clusters ---------------------------------------------------------------------------------------


def sidecar(folder: Path, shards: Mapping[str, Columns]) -> str:
    folder.mkdir(exist_ok=True)
    for name, columns in shards.items():
        write_rows(folder / f"{name}.parquet", pa.table({"key": [f"{name}0", f"{name}1"], **columns}))
    return str(folder)


def test_sidecars_widen_too(tmp_path: Path) -> None:
    shards_of(tmp_path / "in", {name: {"x": [1, 2]} for name in "abc"})
    side = sidecar(tmp_path / "side", {"a": {"s": [1, 2]}, "c": {"s": [0.5, None]}})
    state, notes = unified(tmp_path / "in", sidecars=[side])
    assert notes == [f"column 's' of sidecar {side}: int64 in 1 shard (a), double in the dataset"]
    assert values(state.frame, "s") == [1, 2, None, None, 0.5, None]


def test_columns_of_later_sidecar_files_come_in(tmp_path: Path) -> None:
    shards_of(tmp_path / "in", {name: {"x": [1, 2]} for name in "ab"})
    side = sidecar(tmp_path / "side", {"a": {"s": [1, 2]}, "b": {"s": [3, 4], "late": ["p", "q"], "x": [7, 8]}})
    state, notes = unified(tmp_path / "in", sidecars=[side])
    assert state.source.sidecars == {side: ("s", "late")}
    assert f"column 'late' of sidecar {side}: absent from 1 shard (a), string in the dataset" in notes
    assert any("'x'" in line and "not read" in line for line in notes)
    found = state.frame.partitions[1]
    assert (values(found, "x"), values(found, "late")) == ([1, 2], ["p", "q"])


def test_sidecar_files_that_lack_a_column_give_nulls(tmp_path: Path) -> None:
    shards_of(tmp_path / "in", {name: {"x": [1, 2]} for name in "abc"})
    side = sidecar(tmp_path / "side", {"a": {"s": [1, 2]}, "b": {"late": ["p", "q"]}})
    state, _ = unified(tmp_path / "in", sidecars=[side])
    assert values(state.frame, "s") == [1, 2, None, None, None, None]
    assert values(state.frame, "late") == [None, None, "p", "q", None, None]


def test_tars_alone_are_read_only_if_asked(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [sample(0, "000", size=1)])
    write_tar(tmp_path / "b.tar", [sample(1, "001", size=1.5, late="p")])
    dataset = opened(tmp_path)
    assert unify_schemas(dataset.state) == (dataset.state, [])
    state, notes = unify_schemas(dataset.state, read_tars=True)
    assert len(notes) == 2
    assert values(state.frame, "size") == [1, 1.5]
    assert values(state.frame, "late") == [None, "p"]


def test_many_shards_in_chunks_on_a_cluster(tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{number:03d}" for number in range(30)]
    shards_of(tmp_path, {name: {"x": [1, 2]} if name != "021" else {"x": [1.5, 2]} for name in names})
    monkeypatch.setattr(footers, "SHARDS_A_TASK", 7)
    alone = unified(tmp_path)[1]
    with cluster.as_current():
        state, notes = unified(tmp_path)
    assert notes == alone == ["column 'x': int64 in 29 shards (000, 001, 002, …), double in the dataset"]
    assert kind(state, "x") == "double"


def test_a_dead_worker_loses_no_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards_of(tmp_path, {"a": {"x": [1, 2]}, "b": {"x": [1.5, 2]}})
    monkeypatch.setattr(footers, "current_client", object)

    def all_die(work: Any, items: Sequence[Any], *, on_error: Any, count: int) -> list[Any]:
        assert count == len(items) == 1
        return [on_error(one, RuntimeError("worker died")) for one in items]

    monkeypatch.setattr(footers, "run_tasks", all_die)
    assert kind(unified(tmp_path)[0], "x") == "double"


@pytest.mark.in_process("watches or changes this process")
def test_any_file_system(tmp_path: Path) -> None:
    import fsspec

    shards_of(tmp_path, LATER)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/schemas-test", recursive=True)
    try:
        state, notes = unify_schemas(ImageTextPairDataset.from_webdataset("memory://schemas-test").state)
        assert len(notes) == 2
        assert values(state.frame, "late") == [None, None, "p", "q", "r", None]
    finally:
        memory.rm("/schemas-test", recursive=True)


# Opening --------------------------------------------------------------------------------------------------------------


def test_an_unreadable_first_shard_fails_when_it_is_worked_on(tmp_path: Path) -> None:
    shards_of(tmp_path / "in", {"a": {"x": [1, 2]}, "b": {"x": pa.nulls(2)}, "c": {"x": [0.5, 1]}, "d": {"x": [3, 4]}})
    for name in "ac":
        (tmp_path / "in" / f"{name}.parquet").write_bytes(b"PAR1 no more")
    dataset = opened(tmp_path / "in")
    assert kind(dataset.state, "x") == "int64"
    with pytest.raises(RunError) as raised:
        saved(dataset.state, str(tmp_path / "out"), 1.0)
    assert sorted(raised.value.failures) == ["a", "c"]
    assert "a.parquet" in raised.value.failures["a"]


def test_empty_lists_say_no_type(tmp_path: Path) -> None:
    empty, full = pa.array([[], None], pa.list_(pa.null())), pa.array([["p"], []])
    shards_of(tmp_path, {"a": {"x": empty}, "b": {"x": empty}, "c": {"x": full}, "d": {"x": [1, 2]}})
    assert opened(tmp_path).source.schema.field("x").type == pa.list_(pa.string())


def test_no_readable_shard_is_an_error_at_opening(tmp_path: Path) -> None:
    shards_of(tmp_path, {"a": {}, "b": {}})
    for name in "ab":
        (tmp_path / f"{name}.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(MetadataFileError, match=r"a\.parquet"):
        opened(tmp_path)


def test_an_unreadable_first_tar_fails_when_it_is_worked_on(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar")
    write_tar(tmp_path / "b.tar", [sample(1, "001")])
    dataset = opened(tmp_path)
    with pytest.raises(RunError) as raised:
        saved(dataset.state, str(tmp_path / "out"), 1.0)
    assert list(raised.value.failures) == ["a"]


# Joining two types ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "two", "joined"),
    [
        (pa.timestamp("s"), pa.timestamp("ns"), pa.timestamp("ns")),
        (pa.timestamp("ms", "UTC"), pa.timestamp("us", "UTC"), pa.timestamp("us", "UTC")),
        (pa.timestamp("ms", "UTC"), pa.timestamp("ms"), None),
        (pa.duration("s"), pa.duration("us"), pa.duration("us")),
        (pa.time32("s"), pa.time32("ms"), pa.time32("ms")),
        (pa.time32("s"), pa.time64("us"), pa.time64("us")),
        (pa.date32(), pa.date64(), pa.date64()),
        (pa.date32(), pa.timestamp("s"), None),
        (pa.decimal128(38, 0), pa.decimal128(38, 38), pa.decimal256(76, 38)),
        (pa.decimal256(76, 0), pa.decimal128(3, 2), None),
        (pa.uint64(), pa.int64(), None),
        (pa.uint32(), pa.int32(), pa.int64()),
        (pa.int64(), pa.float32(), pa.float64()),
        (pa.int64(), pa.string(), None),
        (pa.bool_(), pa.int8(), None),
        (pa.null(), pa.timestamp("s"), pa.timestamp("s")),
    ],
    ids=str,
)
def test_joined_types(one: pa.DataType, two: pa.DataType, joined: pa.DataType | None) -> None:
    for pair in ((one, two), (two, one)):
        found = join_types(*pair)
        assert found == joined


def test_a_joined_decimal_holds_both(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        kinds = []
        for _ in range(2):
            precision = int(rng.integers(1, 39))
            kinds.append(pa.decimal128(precision, int(rng.integers(0, precision + 1))))
        joined = join_types(*kinds)
        assert joined is not None
        for one in kinds:
            largest = Decimal("9" * (one.precision - one.scale) + "." + "9" * one.scale)
            assert pa.array([largest], one).cast(joined).to_pylist() == [largest]


def test_a_column_of_other_shards_is_said(tmp_path: Path) -> None:
    """A run that failed in the first shard leaves its columns in the others alone."""
    data = Path(make_dataset(tmp_path / "in", {"a": 3, "b": 2}))
    table = pq.read_table(data / "b.parquet")
    pq.write_table(table.append_column("extra", pa.array([1.0, 2.0])), data / "b.parquet")
    dataset = ImageTextPairDataset.from_webdataset(data)
    with pytest.raises(MissingColumnError, match=r"no column 'extra'.*Other shards have it: dataset\.unify_"):
        dataset.require_columns(["seed", "extra"])
    with pytest.raises(MissingColumnError, match=r"no column 'nowhere'; it has [^.]*$"):
        dataset.require_columns(["nowhere"])
    dataset.unify_schemas().require_columns(["seed", "extra"])
