"""Removing images whose ids are on a list."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_image.engine.model_cache import clear_models
from nemo_image.errors import ArgumentError, DatasetError, IdMismatchError, MissingColumnError
from nemo_image.shards import parquet
from nemo_image.shards.read import ShardReader
from nemo_image.stages.base import RunContext, collecting_metrics
from nemo_image.stages.image_object import ImageObject, SampleSource
from nemo_image.stages.removal import ImageDuplicatesRemovalStage
from nemo_image.stages.removing import id_set, removal_list
from nemo_image.stages.removing.id_set import Ids, TextSet, number_of
from nemo_image.stages.removing.removal_list import RemovalList
from nemo_image.stages.tasks import FileGroup, ImageBatch
from tests.makers import sample, write_tar

Named = tuple[str, str]
"""A shard and an id."""


def write_list(path: Path, ids: Sequence[Any], shards: Sequence[str] | None = None, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {"id": ids if isinstance(ids, pa.Array) else pa.array(ids)}
    if shards is not None:
        columns["shard"] = pa.array(shards, pa.string()).dictionary_encode()
    pq.write_table(pa.table(columns), path, **options)


def groups_of(shards: Sequence[str], root: str = "/in") -> list[FileGroup]:
    return [FileGroup([f"{root}/{shard}.tar"], name=f"g{number}", root=root) for number, shard in enumerate(shards)]


def prepared(folder: Path, shards: Sequence[str] = (), **options: Any) -> ImageDuplicatesRemovalStage:
    stage = ImageDuplicatesRemovalStage(str(folder), **options).prepare(RunContext("p", groups_of(shards)))
    stage.connect([], [])
    return stage


def images(named: Sequence[Named]) -> list[ImageObject]:
    return [ImageObject(f"{shard}.tar/{key}", key, shard=shard) for shard, key in named]


def left(stage: ImageDuplicatesRemovalStage, named: Sequence[Named], size: int = 3) -> list[Named]:
    """Return the images that stay, batches of `size` one after the other."""
    all_images = images(named)
    batches = (ImageBatch(all_images[start : start + size]) for start in range(0, len(all_images), size))
    return [(one.shard, one.image_id) for batch in stage.stream(batches, FileGroup(name="g0")) for one in batch.data]


ROWS = [(shard, f"{number:04d}") for shard in ("00000", "00001") for number in range(8)]


# By id alone ----------------------------------------------------------------------------------------------------------


def test_removes_ids_whatever_their_shard(tmp_path: Path) -> None:
    write_list(tmp_path / "part-0.parquet", ["0001", "0006"])
    write_list(tmp_path / "deep/er/part-1.parquet", ["0002", "9999"])
    stage = prepared(tmp_path, ["00000", "00001"])
    with collecting_metrics() as metrics:
        found = left(stage, ROWS)
    assert found == [one for one in ROWS if one[1] not in ("0001", "0006", "0002")]
    assert metrics["image_dedup_filter"]["removed"] == 6


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([1, 6], pa.int64()),
        pa.array([1, 6], pa.uint8()),
        pa.array([1.0, 6.0], pa.float64()),
        pa.array(["0001", "0006"], pa.large_string()),
        pa.array(["0001", "0006"]).dictionary_encode(),
    ],
    ids=lambda one: str(one.type),
)
def test_ids_of_any_type_name_zero_padded_keys_as_datasets_do(tmp_path: Path, ids: pa.Array) -> None:
    write_list(tmp_path / "a.parquet", ids)
    named = [("s", key) for key in ("0001", "6", "01", "16", "x1", "-1", "0006")]
    if pa.types.is_integer(ids.type) or pa.types.is_floating(ids.type):
        with pytest.raises(IdMismatchError, match=r"the id 1 names several samples of shard 's', '0001' and '01'"):
            left(prepared(tmp_path), named)
        named = [one for one in named if one[1] not in ("01", "0006")]
        assert [key for _, key in left(prepared(tmp_path), named)] == ["16", "x1", "-1"]
    else:
        assert [key for _, key in left(prepared(tmp_path), named)] == ["6", "01", "16", "x1", "-1"]


def test_numbers_as_keys() -> None:
    numbers = {"7": "7", "0007": "7", "-07": "-7", "000": "0", "-0": "0", "9" * 20: "9" * 20, "9" * 21: None}
    odd = dict.fromkeys(("", "-", "1.0", "1e3", " 1", "a/1", "１"), None)
    assert {key: number_of(key) for key in numbers | odd} == numbers | odd


def test_files_of_strings_and_of_integers_together(tmp_path: Path) -> None:
    write_list(tmp_path / "a.parquet", ["0001"])
    write_list(tmp_path / "b.parquet", [6])
    write_list(tmp_path / "c.parquet", pa.array([], pa.null()))
    assert left(prepared(tmp_path), ROWS) == [one for one in ROWS if one[1] not in ("0001", "0006")]


def test_an_empty_list_removes_nothing(tmp_path: Path) -> None:
    for shards in (None, []):
        write_list(tmp_path / "part-00000.parquet", pa.array([], pa.string()), shards)
        assert left(prepared(tmp_path, ["other"]), ROWS) == ROWS


def test_threads_share_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clear_models()
    write_list(tmp_path / "a.parquet", ["0001"])
    reads: list[str] = []
    read_table = parquet.read_table

    def counting(url: str, *args: Any) -> pa.Table:
        reads.append(url)
        return read_table(url, *args)

    stage = prepared(tmp_path)
    monkeypatch.setattr(removal_list.parquet, "read_table", counting)
    results: list[list[Named]] = []
    threads = [threading.Thread(target=lambda: results.append(left(stage, ROWS))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[one for one in ROWS if one[1] != "0001"]] * 4
    assert len(reads) == 1
    write_list(tmp_path / "a.parquet", ["0001", "0002"])
    assert len(left(prepared(tmp_path), ROWS)) == len(ROWS) - 4, "a list that changed is read again"


# By shard and id ------------------------------------------------------------------------------------------------------


def test_an_id_of_two_shards_goes_only_where_it_is_meant(tmp_path: Path) -> None:
    write_list(tmp_path / "a.parquet", ["0001", "0002", "0002"], ["00000", "00000", "00001"])
    gone = [("00000", "0001"), ("00000", "0002"), ("00001", "0002")]
    for size in (1, 3, 100):
        assert left(prepared(tmp_path, ["00000", "00001"]), ROWS, size) == [one for one in ROWS if one not in gone]


def test_integers_by_shard(tmp_path: Path) -> None:
    write_list(tmp_path / "a.parquet", [1, 3], ["00000", "00001"])
    gone = [("00000", "0001"), ("00001", "0003")]
    assert left(prepared(tmp_path, ["00001"]), ROWS) == [one for one in ROWS if one not in gone]


def test_a_task_reads_the_row_groups_of_its_shards_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clear_models()
    shards = [f"{number:05d}" for number in range(40) for _ in range(10)]
    ids = [f"{number:04d}" for _ in range(40) for number in range(10)]
    write_list(tmp_path / "part-00000.parquet", ids[:200], shards[:200], row_group_size=20)
    write_list(tmp_path / "part-00001.parquet", ids[200:], shards[200:], row_group_size=20)
    stage = prepared(tmp_path, ["00007"])
    read: list[tuple[str, int]] = []
    monkeypatch.setattr(RemovalList, "_read", _recording(RemovalList._read, read))
    named = [("00007", f"{number:04d}") for number in range(12)]
    assert left(stage, named) == [("00007", "0010"), ("00007", "0011")]
    assert read == [("part-00000.parquet", 3)]
    assert left(stage, [("00031", "0003")]) == []
    assert read[1:] == [("part-00001.parquet", 5)]


def _recording(function: Any, read: list[tuple[str, int]]) -> Any:
    def recorded(self: Any, group: Any) -> Any:
        read.append((group.name, group.number))
        return function(self, group)

    return recorded


@pytest.mark.parametrize("statistics", [True, False])
def test_files_in_any_order_and_without_statistics(tmp_path: Path, statistics: bool) -> None:
    rng = np.random.default_rng(0)
    rows = [ROWS[number] for number in rng.permutation(len(ROWS))[:9]]
    write_list(
        tmp_path / "a.parquet",
        [key for _, key in rows],
        [shard for shard, _ in rows],
        write_statistics=statistics,
        row_group_size=2,
    )
    assert left(prepared(tmp_path, ["00001"]), ROWS) == [one for one in ROWS if one not in rows]


def test_images_must_say_their_shard(tmp_path: Path) -> None:
    write_list(tmp_path / "a.parquet", ["0001"], ["00000"])
    with pytest.raises(DatasetError, match="says no shard"):
        left(prepared(tmp_path, ["00000"]), [("", "0001")])


# The last part of a key's path ----------------------------------------------------------------------------------------


def nested_images(tmp_path: Path, keys: Sequence[str]) -> list[ImageObject]:
    tar = tmp_path / "in/00000.tar"
    write_tar(tar, [sample(number, key) for number, key in enumerate(keys)])
    with ShardReader(str(tar)) as reader:
        found = {one.key: one for one in reader.index.samples}
    return [ImageObject("p", key, shard="00000", source=SampleSource(str(tar), found[key])) for key in keys]


def keys_left(folder: Path, objects: Sequence[ImageObject]) -> list[str]:
    return [one.image_id for one in prepared(folder).process(ImageBatch(list(objects))).data]


@pytest.mark.parametrize("ids", [["0002"], [2]], ids=str)
def test_the_last_part_of_a_path_counts_where_it_means_one_key(tmp_path: Path, ids: list[Any]) -> None:
    write_list(tmp_path / "list/a.parquet", ids)
    objects = nested_images(tmp_path, ["x/0001", "x/0002", "y/0001"])
    assert keys_left(tmp_path / "list", objects) == ["x/0001", "y/0001"]


def test_a_key_itself_comes_before_the_last_part_of_another(tmp_path: Path) -> None:
    write_list(tmp_path / "list/a.parquet", ["0002"])
    objects = nested_images(tmp_path, ["x/0002", "0002", "y/0001"])
    assert keys_left(tmp_path / "list", objects) == ["x/0002", "y/0001"]


def test_a_last_part_that_means_several_keys(tmp_path: Path) -> None:
    objects = nested_images(tmp_path, ["x/0001", "y/0001", "z/0003"])
    write_list(tmp_path / "texts/a.parquet", ["0001"])
    assert len(keys_left(tmp_path / "texts", objects)) == 3
    write_list(tmp_path / "numbers/a.parquet", [1])
    with pytest.raises(IdMismatchError, match="names several samples"):
        keys_left(tmp_path / "numbers", objects)


# What is checked before any task starts -------------------------------------------------------------------------------


def test_no_list(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        prepared(tmp_path / "nothing")
    with pytest.raises(DatasetError, match="holds no Parquet file"):
        prepared(tmp_path)
    write_list(tmp_path / "_cache/rows/a.parquet", ["0001"])
    write_list(tmp_path / ".hidden.parquet", ["0001"])
    with pytest.raises(DatasetError, match="holds no Parquet file"):
        prepared(tmp_path)
    write_list(tmp_path / "a.parquet", ["0001"])
    with pytest.raises(DatasetError, match="is a file"):
        prepared(tmp_path / "a.parquet")


def test_a_wrong_column_names_those_there_are(tmp_path: Path) -> None:
    write_list(tmp_path / "a.parquet", ["0001"], ["00000"])
    with pytest.raises(MissingColumnError, match=r"a.parquet has no column 'key' .*; it has id, shard"):
        prepared(tmp_path, duplicate_id_field="key")


@pytest.mark.parametrize("statistics", [True, False])
def test_null_ids_and_shards(tmp_path: Path, statistics: bool) -> None:
    write_list(tmp_path / "a/a.parquet", ["0001", None], write_statistics=statistics)
    with pytest.raises(IdMismatchError, match="column 'id' is null in 1 rows"):
        prepared(tmp_path / "a")
    write_list(tmp_path / "b/b.parquet", ["0001", "2"], ["00000", None], write_statistics=statistics)
    with pytest.raises(IdMismatchError, match="column 'shard' is null in 1 rows"):
        prepared(tmp_path / "b")


def test_ids_that_are_none(tmp_path: Path) -> None:
    write_list(tmp_path / "a.parquet", pa.array([True]))
    with pytest.raises(IdMismatchError, match="holds bool; ids are strings or integers"):
        prepared(tmp_path)


def test_files_with_and_without_shards(tmp_path: Path) -> None:
    write_list(tmp_path / "a.parquet", ["0001"])
    write_list(tmp_path / "b.parquet", ["0001"], ["00000"])
    with pytest.raises(DatasetError, match=r"b.parquet has a column 'shard' and a.parquet has none"):
        prepared(tmp_path)


def test_shards_of_another_dataset(tmp_path: Path) -> None:
    write_list(tmp_path / "a.parquet", ["0001"] * 3, ["in/00000", "in/00001", "in/00002"])
    with pytest.raises(DatasetError, match=r"\('in/00000', 'in/00001', 'in/00002', …\) is one of this run's \('00000'"):
        prepared(tmp_path, ["00000", "00001"])
    prepared(tmp_path, ["00000", "in/00002"])
    prepared(tmp_path)


def test_shards_that_were_judged_and_have_no_duplicates(tmp_path: Path) -> None:
    table = pa.table({"id": ["0001"], "shard": pa.array(["00000"]).dictionary_encode()})
    footer = parquet.Footer(record={"writer": "duplicates", "first": "00000", "last": "00009"})
    parquet.write_table(str(tmp_path / "part-00000.parquet"), table, footer)
    assert left(prepared(tmp_path, ["00007"]), [("00007", "0001")]) == [("00007", "0001")]
    with pytest.raises(DatasetError, match="none of the shards"):
        prepared(tmp_path, ["00010"])


def test_arguments() -> None:
    with pytest.raises(ArgumentError, match=r"num_workers_per_node=2 is not needed.*one copy|share one"):
        ImageDuplicatesRemovalStage("x", num_workers_per_node=2)
    with pytest.raises(ArgumentError, match="removal_parquets_dir is empty"):
        ImageDuplicatesRemovalStage("")
    with pytest.raises(ArgumentError, match="duplicate_id_field"):
        ImageDuplicatesRemovalStage("x", "")
    stage = ImageDuplicatesRemovalStage("x", verbose=True)
    assert (stage.duplicate_id_field, stage.name, stage.inputs()[1]) == (
        "id",
        "image_dedup_filter",
        ["image_id", "shard"],
    )


def test_the_list_is_part_of_what_the_stage_is_made_of(tmp_path: Path) -> None:
    write_list(tmp_path / "a.parquet", ["0001"])
    tokens = [prepared(tmp_path).made_of(), prepared(tmp_path).made_of()]
    write_list(tmp_path / "a.parquet", ["0001", "0002"])
    tokens.append(prepared(tmp_path).made_of())
    assert tokens[0] == tokens[1] != tokens[2]
    assert ImageDuplicatesRemovalStage(str(tmp_path)).made_of() is None


def test_pixels_are_freed_on_request_and_a_line_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_list(tmp_path / "a.parquet", ["0001"])
    for frees in (False, True):
        held = images(ROWS[:2])
        for one in held:
            one.hold_pixels(np.zeros((2, 2, 3), np.uint8))
        stage = prepared(tmp_path, remove_image_data=frees, verbose=True)
        with caplog.at_level(logging.INFO, "nemo_image"):
            (batch,) = stage.stream(iter([ImageBatch(held)]), FileGroup(name="g7"))
        assert [one.holds_pixels for one in batch.data] == [not frees]
    assert caplog.messages == ["image_dedup_filter: g7: 1 of 2 images removed"] * 2


# The compact set ------------------------------------------------------------------------------------------------------


def test_texts_with_equal_hashes_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(id_set, "_digest", len)
    found = TextSet([pa.array(["ab", "c"]), pa.chunked_array([["de"], ["", "fgh"]])])
    wanted: Mapping[str | None, bool] = {
        "ab": True,
        "de": True,
        "c": True,
        "": True,
        "fgh": True,
        "xy": False,
        "abcd": False,
        None: False,
    }
    assert dict(zip(wanted, found.has(list(wanted)), strict=True)) == wanted


def test_a_set_says_what_a_python_set_says() -> None:
    rng = np.random.default_rng(1)
    texts = [f"{number:07d}é" for number in rng.integers(0, 10**6, 5000)]
    found = TextSet([pa.array(texts)])
    wanted = [f"{number:07d}é" for number in rng.integers(0, 10**6, 5000)] + texts[:50]
    assert found.has(wanted) == [one in set(texts) for one in wanted]
    assert len(found) == 5000
    assert TextSet([]).has(["a"]) == [False]
    assert len(Ids.of([])) == 0


def test_memory_is_that_of_the_texts_and_their_hashes() -> None:
    texts = pa.array([f"{number:012d}" for number in range(20_000)])
    assert TextSet([texts]).nbytes <= 20_000 * (12 + 8 + 8 + 1)


def test_an_integer_beyond_what_a_double_holds(tmp_path: Path) -> None:
    write_list(tmp_path / "a.parquet", pa.array([2**64 - 1, 2**53 + 1], pa.uint64()))
    keys = [str(2**64 - 1), str(2**53 + 1), str(2**53)]
    assert [key for _, key in left(prepared(tmp_path), [("s", key) for key in keys])] == [str(2**53)]
