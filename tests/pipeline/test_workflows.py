"""Workflows that list duplicates, against a brute force that shares no code with them."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_image import schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.dedup import SemanticDedup
from nemo_image.dedup.sweep import USUAL_EPS
from nemo_image.errors import ArgumentError, DatasetError, MetadataFileError, MissingColumnError, RunError
from nemo_image.pipeline.workflows import (
    DeduplicationResult,
    ExactDeduplicationWorkflow,
    PerceptualDeduplicationWorkflow,
    RankingStrategy,
    SemanticDeduplicationWorkflow,
    duplicates,
    names,
)
from nemo_image.shards import parquet
from nemo_image.stages.base import RunContext
from nemo_image.stages.documents import ConvertImageBatchToDocumentBatchStage, ParquetWriter
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.removal import ImageDuplicatesRemovalStage
from nemo_image.stages.tasks import FileGroup, ImageBatch
from tests.dedup.makers import clustered_vectors, computed, write_embeddings
from tests.dedup.oracle import expected
from tests.makers import encoded, make_dataset, picture, write_rows, write_tar

ROWS, SIZE, EPS = 240, 16, 0.02
BY_SCORE = ("score", False)
Name = tuple[str | None, Any]
"""A row's shard (None where nobody says it) and id."""


@pytest.fixture(scope="module")
def vectors() -> Any:
    return clustered_vectors(ROWS, SIZE, 20, 0.5, seed=4)


@pytest.fixture(scope="module")
def scores() -> Any:
    return np.random.default_rng(7).permutation(ROWS).astype(float)


def rows_of(vectors: Any, scores: Any, shards: int, ids: Any = str, repeats: bool = True) -> pd.DataFrame:
    """Return rows of several shards, with ids that repeat in each of them, or do not."""
    shard = np.repeat(np.arange(shards), ROWS // shards)
    number = np.arange(ROWS) % (ROWS // shards) if repeats else np.arange(ROWS)
    return pd.DataFrame(
        {
            "shard": [f"{one:05d}" for one in shard],
            "id": [f"{one:04d}" if ids is str else int(one) - 7 for one in number],
            "embedding": list(vectors),
            "score": scores,
        }
    )


def write_files(folder: Path, parts: Mapping[str, pd.DataFrame], columns: Sequence[str], kind: Any = None) -> Path:
    """Write rows as Parquet with pyarrow alone."""
    for name, rows in parts.items():
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = {one: pa.array(rows[one].tolist(), from_pandas=True) for one in columns if one != "embedding"}
        values = [None if one is None else np.asarray(one) for one in rows["embedding"]]
        table["embedding"] = pa.array(values, kind or pa.list_(pa.float32()))
        pq.write_table(pa.table(table), path, row_group_size=50)
    return folder


def by_shard(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return dict(iter(rows.groupby("shard", sort=False)))


def mixed(rows: pd.DataFrame, files: int = 4) -> dict[str, pd.DataFrame]:
    """Deal the rows to files in another order, so that each holds rows of many shards."""
    order = np.random.default_rng(3).permutation(len(rows))
    return {f"part-{number}": rows.iloc[part] for number, part in enumerate(np.array_split(order, files))}


def workflow(folder: Path, output: Path, **settings: Any) -> SemanticDeduplicationWorkflow:
    usual = {"id_field": "id", "embedding_field": "embedding", "n_clusters": 1, "eps": EPS, "which_to_keep": BY_SCORE}
    return SemanticDeduplicationWorkflow(str(folder), str(output), **{**usual, **settings})


def listed(result: DeduplicationResult) -> pd.DataFrame:
    assert result.duplicates_path is not None
    tables = [pq.read_table(path) for path in sorted(Path(result.duplicates_path).glob("*.parquet"))]
    assert tables, "there is always a file"
    frame = pa.concat_tables(tables).to_pandas()
    assert len(frame) == result.num_duplicates
    return frame


def found_by(frame: pd.DataFrame) -> dict[Name, tuple[Name, float]]:
    shards = frame["shard"].astype(str) if "shard" in frame else [None] * len(frame)
    twins = frame["duplicate_of_shard"] if "shard" in frame else [None] * len(frame)
    keys = zip(shards, frame["id"], strict=True)
    values = zip(zip(twins, frame["duplicate_of"], strict=True), frame["max_similarity"], strict=True)
    made = dict(zip(keys, values, strict=True))
    assert len(made) == len(frame)
    return made


def brute_force(rows: pd.DataFrame, says_shards: bool = True, **options: Any) -> dict[Name, tuple[Name, float]]:
    """Return what must be listed if all rows are one cluster and are ranked by their score."""
    rows = rows.assign(cluster=0).reset_index(drop=True)
    wanted = expected(rows, EPS, BY_SCORE, **options)
    out = {}
    for row in np.flatnonzero(wanted["is_duplicate"]):
        shard = rows["shard"][row] if says_shards else None
        twin = wanted["duplicate_of_shard"][row] if says_shards else None
        out[shard, rows["id"][row]] = ((twin, wanted["duplicate_of"][row]), wanted["max_similarity"][row])
    assert len(out) > 20, "a case without duplicates shows nothing"
    return out


# What is found --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["a file a shard", "mixed files"])
@pytest.mark.parametrize("ids", [str, int])
def test_lists_what_brute_force_finds_by_shard_and_id(
    tmp_path: Path, vectors: Any, scores: Any, ids: Any, layout: str, scheduler: Any
) -> None:
    rows = rows_of(vectors, scores, 4, ids)
    parts = by_shard(rows) if layout == "a file a shard" else mixed(rows)
    folder = write_files(tmp_path / "in", parts, ["shard", "id", "score"])
    result = workflow(folder, tmp_path / "out").run()
    assert found_by(listed(result)) == brute_force(rows)
    assert result.rows == ROWS
    kinds = pq.read_schema(next(Path(result.duplicates_path or "").glob("*.parquet")))
    kind = pa.string() if ids is str else pa.int64()
    assert [(one.name, one.type) for one in kinds] == [
        ("id", kind),
        ("shard", schema.SHARD_TYPE),
        ("duplicate_of", kind),
        ("duplicate_of_shard", pa.string()),
        ("max_similarity", pa.float32()),
        ("cluster", pa.int32()),
    ]


def test_chains_as_published_on_request(tmp_path: Path, vectors: Any, scores: Any) -> None:
    rows = rows_of(vectors, scores, 2)
    folder = write_files(tmp_path / "in", by_shard(rows), ["shard", "id", "score"])
    result = workflow(folder, tmp_path / "out", representative=False).run()
    assert found_by(listed(result)) == brute_force(rows, representative=False)


def test_mixed_files_change_nothing(tmp_path: Path, vectors: Any, scores: Any) -> None:
    """Rows are the same wherever they lie: also ties, which go by id."""
    rows = rows_of(vectors, scores, 4, int).assign(score=0.0)
    lists = []
    for name, parts in {"a": by_shard(rows), "b": mixed(rows, 3), "c": mixed(rows, 1)}.items():
        folder = write_files(tmp_path / name, parts, ["shard", "id", "score"])
        lists.append(found_by(listed(workflow(folder, tmp_path / f"{name}-out").run())))
    assert lists[0] == lists[1] == lists[2] == brute_force(rows)


@pytest.mark.parametrize("order", ["hard", "easy", "random"])
def test_the_dataset_interface_finds_the_same(tmp_path: Path, vectors: Any, order: Any) -> None:
    dataset = write_embeddings(tmp_path / "data", vectors, 3)
    saved = dataset.save_metadata(tmp_path / "saved", columns=["image_embedding"])
    dedup = SemanticDedup(n_clusters=5, eps=EPS, which_to_keep=order, random_state=42, max_iter=300)
    wanted = computed(dedup(saved))
    wanted = wanted[wanted["is_duplicate"]]
    flow = workflow(
        tmp_path / "saved",
        tmp_path / "out",
        n_clusters=5,
        which_to_keep=order,
        id_field="key",
        embedding_field="image_embedding",
    )
    found = found_by(listed(flow.run()))
    twins = zip(wanted["duplicate_of_shard"], wanted["duplicate_of"], strict=True)
    values = zip(twins, wanted["max_similarity"], strict=True)
    assert found == dict(zip(zip(wanted["shard"], wanted["key"], strict=True), values, strict=True))
    assert len(found) > 20


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float64()), pa.list_(pa.float16()), pa.large_list(pa.float32()), pa.list_(pa.float32(), SIZE)],
    ids=str,
)
@pytest.mark.parametrize("ids", [str, int])
def test_foreign_files(tmp_path: Path, vectors: Any, scores: Any, kind: pa.DataType, ids: Any) -> None:
    """Names and types of others, in nested folders, and ids that are unique by themselves."""
    rounded = np.asarray(vectors, np.float16) if "half" in str(kind) else vectors
    rows = rows_of(rounded, scores, 3, ids, repeats=False)
    is_fixed = pa.types.is_fixed_size_list(kind)  # of which Arrow 17 writes no nulls
    rows.at[5, "embedding"] = np.zeros(SIZE) if is_fixed else None
    parts = {f"day={number}/x": part for number, part in enumerate(by_shard(rows).values())}
    folder = write_files(tmp_path / "in", parts, ["id", "score"], kind)
    for path in folder.rglob("*.parquet"):
        table = pq.read_table(path, partitioning=None)
        pq.write_table(table.rename_columns(["uid", "score", "clip vector"]), path)
    flow = workflow(folder, tmp_path / "out", id_field="uid", embedding_field="clip vector")
    result = flow.run()
    frame = listed(result)
    assert list(frame) == ["id", "duplicate_of", "max_similarity", "cluster"]
    assert found_by(frame) == brute_force(rows.drop(5), says_shards=False)
    assert frame["id"].tolist() == sorted(frame["id"])
    assert result.result is not None
    assert (result.result.without_value, result.result.bad_value) == ((0, 1) if is_fixed else (1, 0))


def test_files_whose_types_differ(tmp_path: Path, vectors: Any, scores: Any) -> None:
    rows = rows_of(vectors, scores, 2, int, repeats=False)
    first, second = by_shard(rows).values()
    folder = write_files(tmp_path / "in", {"b": second}, ["id", "score"], pa.list_(pa.float64(), SIZE))
    write_files(folder, {"a": first}, ["id", "score"])
    table = pq.read_table(folder / "a.parquet")
    pq.write_table(table.set_column(0, "id", table["id"].cast(pa.int16())), folder / "a.parquet")
    write_files(folder, {"0-empty": first.iloc[:0]}, ["id", "score"])
    assert found_by(listed(workflow(folder, tmp_path / "out").run())) == brute_force(rows, says_shards=False)


def test_several_folders(tmp_path: Path, vectors: Any, scores: Any) -> None:
    rows = rows_of(vectors, scores, 4, repeats=False)
    folders = []
    for number, part in enumerate(np.array_split(np.arange(ROWS), 2)):
        some = rows.iloc[part]
        folders.append(str(write_files(tmp_path / f"run{number}", {"x/part": some}, ["id", "score"])))
    flow = SemanticDeduplicationWorkflow(
        folders, tmp_path / "out", 1, embedding_field="embedding", eps=EPS, which_to_keep=BY_SCORE
    )
    assert found_by(listed(flow.run())) == brute_force(rows, says_shards=False)


# From stage to stage --------------------------------------------------------------------------------------------------


def image_objects(rows: pd.DataFrame) -> list[ImageObject]:
    made = []
    for row in rows.itertuples():
        one = ImageObject("", row.id, shard=row.shard, metadata={"score": row.score})
        one.embedding = row.embedding
        made.append(one)
    return made


def write_by_stages(rows: pd.DataFrame, path: Path) -> None:
    """Write rows as a pipeline does, each file group of two shards."""
    shards = list(dict.fromkeys(rows["shard"]))
    groups = [FileGroup([f"/in/{one}.tar" for one in shards[n : n + 2]], name=f"g{n}") for n in (0, 2)]
    convert = ConvertImageBatchToDocumentBatchStage(["image_id", "embedding", "score"])
    writer = ParquetWriter(str(path)).prepare(RunContext("embed", groups, token="t"))
    writer.connect([], [])
    for number, group in enumerate(groups):
        images = image_objects(rows[rows["shard"].isin(shards[2 * number : 2 * number + 2])])
        batches = (ImageBatch(images[start : start + 7]) for start in range(0, len(images), 7))
        assert list(writer.stream(convert.stream(batches, group), group))


def left(folder: str, rows: pd.DataFrame) -> set[Name]:
    shards = sorted(set(rows["shard"]))
    groups = [FileGroup([f"/in/{shard}.tar"], name=shard, root="/in") for shard in shards]
    stage = ImageDuplicatesRemovalStage(folder, duplicate_id_field="id").prepare(RunContext("remove", groups))
    return {(one.shard, one.image_id) for one in stage.process(ImageBatch(image_objects(rows))).data}


def test_tutorial_removes_the_right_image_of_ids_that_repeat(tmp_path: Path, vectors: Any, scores: Any) -> None:
    rows = rows_of(vectors, scores, 4)
    write_by_stages(rows, tmp_path / "embeddings")
    result = workflow(tmp_path / "embeddings", tmp_path / "out", id_field="image_id").run()
    wanted = brute_force(rows)
    assert {name[1] for name in wanted} & {name[1] for name in set(named(rows)) - set(wanted)}, "ids that repeat"
    assert left(result.duplicates_path or "", rows) == set(named(rows)) - set(wanted)


def named(rows: pd.DataFrame) -> list[Name]:
    return list(zip(rows["shard"], rows["id"], strict=True))


def test_nothing_is_a_duplicate(tmp_path: Path) -> None:
    rows = pd.DataFrame({"shard": "a", "id": ["1", "2"], "embedding": [[1.0, 0.0], [0.0, 1.0]], "score": [1.0, 2.0]})
    folder = write_files(tmp_path / "in", {"a": rows}, ["shard", "id", "score"])
    result = workflow(folder, tmp_path / "out").run()
    assert result.num_duplicates == 0
    assert [one.name for one in Path(result.duplicates_path or "").iterdir()] == ["part-00000.parquet"]
    assert list(listed(result))[:2] == ["id", "shard"]
    assert left(result.duplicates_path or "", rows) == {("a", "1"), ("a", "2")}


def test_large_lists_come_in_parts(tmp_path: Path, vectors: Any, scores: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(vectors, scores, 6)
    folder = write_files(tmp_path / "in", by_shard(rows), ["shard", "id", "score"])
    monkeypatch.setattr(duplicates, "PART_ROWS", 80)
    result = workflow(folder, tmp_path / "out").run()
    paths = sorted(Path(result.duplicates_path or "").iterdir())
    assert [path.name for path in paths] == [f"part-{number:05d}.parquet" for number in range(3)]
    assert listed(result)["shard"].astype(str).is_monotonic_increasing
    footers = [parquet.read_summary(str(path)).footer for path in paths]
    said = [(one.record["first"], one.record["last"]) for one in footers if one is not None]
    assert said == [("00000", "00001"), ("00002", "00003"), ("00004", "00005")]
    assert found_by(listed(result)) == brute_force(rows)
    assert left(result.duplicates_path or "", rows) == set(named(rows)) - set(brute_force(rows))


@pytest.mark.parametrize("layout", ["file", "mixed", "id"])
def test_metadata_fields_stand_beside_the_ids(tmp_path: Path, vectors: Any, scores: Any, layout: str) -> None:
    rows = rows_of(vectors, scores, 4, repeats=layout != "id")
    parts = mixed(rows) if layout == "mixed" else by_shard(rows)
    columns = ["id", "score"] if layout == "id" else ["shard", "id", "score"]
    folder = write_files(tmp_path / "in", parts, columns)
    frame = listed(workflow(folder, tmp_path / "out", metadata_fields=["score"]).run())
    keys = ["id"] if layout == "id" else ["shard", "id"]
    said = frame.assign(shard=frame["shard"].astype(str)) if layout != "id" else frame
    joined = said.merge(rows, on=keys)
    assert len(joined) == len(frame) > 20
    assert joined["score_x"].tolist() == joined["score_y"].tolist()


# Names that mean one row only -----------------------------------------------------------------------------------------


def pairs(layout: Mapping[str, Sequence[tuple[str, str, int]]]) -> dict[str, pd.DataFrame]:
    """Return files of (shard, id, vector's number) rows: a vector's first row in the order of files is kept."""
    parts, score = {}, 1000.0
    for name, rows in layout.items():
        frame = pd.DataFrame(rows, columns=["shard", "id", "vector"])
        parts[name] = frame.assign(embedding=[np.eye(8)[one] for one in frame["vector"]], score=score)
        score -= 1
    return parts


@pytest.mark.parametrize("buckets", [1, 5])
def test_ids_that_could_mean_a_row_to_keep_are_refused(
    tmp_path: Path, buckets: int, monkeypatch: pytest.MonkeyPatch, scheduler: Any
) -> None:
    if scheduler is None:
        monkeypatch.setattr(names, "BUCKET_ROWS", 6 // buckets)
    parts = pairs({"a": [("", "1", 0), ("", "2", 1), ("", "3", 3)], "b": [("", "2", 0), ("", "4", 4), ("", "5", 5)]})
    folder = write_files(tmp_path / "in", parts, ["id", "score"])
    with pytest.raises(DatasetError, match=r"id '2' stands in b.parquet, .* and in a.parquet.*column 'shard'"):
        workflow(folder, tmp_path / "out").run()
    assert not list((tmp_path / "out/duplicates").glob("*"))
    assert not list((tmp_path / "out").rglob("names"))


def test_a_row_that_was_not_judged_is_one_to_keep(tmp_path: Path) -> None:
    parts = pairs({"a": [("", "1", 0), ("", "2", 0)], "b": [("", "2", 1)], "c": [("", "9", 2)]})
    parts["b"]["embedding"] = [None]
    folder = write_files(tmp_path / "in", parts, ["id", "score"])
    with pytest.raises(DatasetError, match=r"id '2' stands in a.parquet, .* and in b.parquet"):
        workflow(folder, tmp_path / "out").run()


def test_ids_that_are_all_removed_are_fine(tmp_path: Path) -> None:
    parts = pairs({"a": [("", "1", 0)], "b": [("", "2", 0)], "c": [("", "2", 0)]})
    result = workflow(write_files(tmp_path / "in", parts, ["id", "score"]), tmp_path / "out").run()
    assert listed(result)["id"].tolist() == ["2", "2"]


def test_a_row_of_a_shard_that_stands_in_two_files(tmp_path: Path) -> None:
    parts = pairs({"x": [("s", "1", 0), ("t", "1", 1)], "y": [("s", "1", 0), ("t", "2", 2)]})
    folder = write_files(tmp_path / "in", parts, ["shard", "id", "score"])
    with pytest.raises(DatasetError, match=r"id '1' of shard 's' stands in y.parquet.*give each image one row"):
        workflow(folder, tmp_path / "out").run()


def test_an_id_that_stands_twice_in_its_shard(tmp_path: Path) -> None:
    for name, columns in (("a", ["id", "score"]), ("b", ["shard", "id", "score"])):
        parts = pairs({"x": [("s", "1", 0), ("s", "1", 1), ("t", "2", 1)]})
        folder = write_files(tmp_path / name, parts, columns)
        with pytest.raises(RunError, match="stand more than once"):
            workflow(folder, tmp_path / f"{name}-out").run()


def test_rows_without_a_name(tmp_path: Path) -> None:
    parts = pairs({"x": [("s", "1", 0), ("t", "2", 1)]})
    parts["x"].loc[1, "shard"] = None
    with pytest.raises(RunError, match="1 rows have no shard"):
        workflow(write_files(tmp_path / "a", parts, ["shard", "id", "score"]), tmp_path / "a-out").run()
    parts["x"].loc[1, ["shard", "id"]] = ["t", None]
    for name, columns in (("b", ["shard", "id", "score"]), ("c", ["id", "score"])):
        with pytest.raises(RunError, match="have no id"):
            workflow(write_files(tmp_path / name, parts, columns), tmp_path / f"{name}-out").run()


def test_files_with_and_without_shards(tmp_path: Path) -> None:
    parts = pairs({"x": [("x", "1", 0)], "y": [("y", "1", 1)]})
    folder = write_files(tmp_path / "in", {"x": parts["x"]}, ["shard", "id", "score"])
    write_files(folder, {"y": parts["y"]}, ["id", "score"])
    with pytest.raises(DatasetError, match=r"x.parquet has a column 'shard' and y.parquet has none"):
        workflow(folder, tmp_path / "out").run()


# Without a threshold --------------------------------------------------------------------------------------------------


def test_without_a_threshold_the_curve_is_told(tmp_path: Path, vectors: Any, scores: Any, scheduler: Any) -> None:
    rows = rows_of(vectors, scores, 2)
    folder = write_files(tmp_path / "in", by_shard(rows), ["shard", "id", "score"])
    workflow(folder, tmp_path / "out").run()
    result = workflow(folder, tmp_path / "out", eps=None).run()
    assert (result.rows, result.num_duplicates, result.duplicates_path, result.result) == (ROWS, None, None, None)
    assert not list((tmp_path / "out/duplicates").glob("*")), "the list of another threshold is gone"
    frame = rows.assign(cluster=0)
    kept = [int((~expected(frame, eps, BY_SCORE)["is_duplicate"]).sum()) for eps in USUAL_EPS]
    written = pd.read_csv(tmp_path / "out/dedup_summary.csv")
    assert result.curve is not None
    for curve in (written, result.curve):
        assert curve["eps"].tolist() == list(USUAL_EPS)
        assert curve["kept"].tolist() == kept
        assert (curve["kept"] + curve["removed"]).tolist() == curve["total"].tolist() == [ROWS] * len(kept)
    np.testing.assert_allclose(result.curve["kept_fraction"], np.array(kept) / ROWS)
    assert "eps 0.01" in str(result)
    (tmp_path / "out/dedup_summary.csv").write_text("mine")
    with pytest.raises(DatasetError, match="is another file"):
        workflow(folder, tmp_path / "out", eps=None).run()


# Reruns ---------------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*.parquet") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_rerun_takes_over_what_is_there(
    tmp_path: Path, vectors: Any, scores: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(vectors, scores, 3)
    folder = write_files(tmp_path / "in", by_shard(rows), ["shard", "id", "score"])
    flow = workflow(folder, tmp_path / "out", n_clusters=3)
    flow.run()
    before = contents(tmp_path / "out")
    (tmp_path / "out/duplicates/part-00000.parquet").unlink()

    def refuse(*_: Any) -> None:
        raise AssertionError("this was done before")

    with monkeypatch.context() as patch:
        patch.setattr("nemo_image.dedup.clusters.solve.SolveBucket.__call__", refuse)
        patch.setattr("nemo_image.dedup.clusters.sample.FitCentroids.__call__", refuse)
        assert flow.run().num_duplicates
        assert contents(tmp_path / "out") == before
        written = duplicates.parquet.write_table
        patch.setattr(duplicates.parquet, "write_table", refuse)
        flow.run()
        patch.setattr(duplicates.parquet, "write_table", written)
    with monkeypatch.context() as patch:
        patch.setattr("nemo_image.dedup.clusters.sample.FitCentroids.__call__", refuse)
        other = workflow(folder, tmp_path / "out", n_clusters=3, eps=0.2).run()
    assert other.num_duplicates == len(listed(other))
    results = list((tmp_path / "out/semantic_dedup/_nemo_image").glob("dedup-*"))
    assert len(results) == 1, "the result of the other threshold is gone"
    assert flow.run().num_duplicates == len(pq.read_table(tmp_path / "out/duplicates"))
    assert contents(tmp_path / "out") == before


def test_changed_rows_are_judged_again(tmp_path: Path, vectors: Any, scores: Any) -> None:
    rows = rows_of(vectors, scores, 3)
    folder = write_files(tmp_path / "in", by_shard(rows), ["shard", "id", "score"])
    workflow(folder, tmp_path / "out").run()
    rows = rows[rows["shard"] != "00001"]
    (folder / "00001.parquet").unlink()
    result = workflow(folder, tmp_path / "out").run()
    assert found_by(listed(result)) == brute_force(rows)


def test_other_settings_replace_only_what_the_workflow_wrote(tmp_path: Path, vectors: Any, scores: Any) -> None:
    rows = rows_of(vectors, scores, 2)
    folder = write_files(tmp_path / "in", by_shard(rows), ["shard", "id", "score"])
    workflow(folder, tmp_path / "out").run()
    before = contents(tmp_path / "out/duplicates")
    with pytest.raises(DatasetError, match="clear_output=True replaces them"):
        workflow(folder, tmp_path / "out", eps=0.2, clear_output=False).run()
    assert contents(tmp_path / "out/duplicates") == before
    workflow(folder, tmp_path / "out", clear_output=False).run()
    pq.write_table(pa.table({"id": ["x"]}), tmp_path / "out/duplicates/mine.parquet")
    for settings in ({}, {"eps": 0.2}, {"eps": None}):
        with pytest.raises(DatasetError, match=r"holds something else \(mine.parquet\)"):
            workflow(folder, tmp_path / "out", **settings).run()
    assert {**before, "mine.parquet": b""}.keys() == contents(tmp_path / "out/duplicates").keys()
    (tmp_path / "file").mkdir()
    (tmp_path / "file/duplicates").write_text("x")
    with pytest.raises(DatasetError, match="is a file"):
        workflow(folder, tmp_path / "file").run()


def test_what_a_rerun_takes_over_lies_where_it_is_said(tmp_path: Path, vectors: Any, scores: Any) -> None:
    folder = write_files(tmp_path / "in", by_shard(rows_of(vectors, scores, 2)), ["shard", "id", "score"])
    before = sorted(folder.rglob("*"))
    result = workflow(folder, tmp_path / "a", cache_path=tmp_path / "cache").run()
    assert result.result is not None
    assert Path(result.result.folder).is_relative_to(tmp_path / "cache")
    assert sorted(one.name for one in (tmp_path / "a").iterdir()) == ["_nemo_image", "duplicates"]
    other = workflow(folder, tmp_path / "b").run(checkpoint_path=tmp_path / "cache")
    assert other.result == result.result
    with pytest.raises(ArgumentError, match="leave out checkpoint_path"):
        workflow(folder, tmp_path / "a", cache_path=tmp_path / "cache").run(checkpoint_path=tmp_path / "x")
    assert sorted(folder.rglob("*")) == before, "nothing is written to the input"


# Arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"embedding_dim": 16}, "embedding_dim=16 would do nothing: the length"),
        ({"input_filetype": "jsonl"}, "only Parquet is read"),
        ({"input_file_extensions": [".pq"]}, "files that end in .parquet"),
        ({"tol": 1e-3}, "tol=0.001 would do nothing"),
        ({"init": "random"}, "init='random' would do nothing"),
        ({"init": np.zeros((2, 2))}, "SemanticDedup takes centroids"),
        ({"n_init": "auto"}, "n_init='auto' would do nothing"),
        ({"oversampling_factor": 3.0}, "oversampling_factor"),
        ({"max_samples_per_batch": 10}, "max_samples_per_batch"),
        ({"_duplicates_num_row_groups_hint": 1}, "row groups have 10,000 rows"),
        ({"fit_data_fraction": 1.0}, r"fit_data_fraction must lie in \(0, 1\)"),
        ({"distance_metric": "dot"}, "distance_metric must be 'cosine' or 'l2'"),
        ({"which_to_keep": "best"}, "which_to_keep must be"),
        ({"eps": 2}, r"eps must lie in \[0, 1\]"),
        ({"pairwise_batch_size": 0}, "pairwise_batch_size"),
        ({"n_clusters": 0}, "n_clusters must be"),
        ({"max_iter": 0}, "max_iter must be"),
        ({"random_state": -1}, "random_state must be"),
        ({"read_kwargs": {"columns": ["x"]}}, "read_kwargs: 'columns' would do nothing"),
        (
            {"read_kwargs": {"storage_options": {"key": 1}}, "write_kwargs": {"storage_options": {"key": 2}}},
            "storage option 'key' contradicts",
        ),
        ({"metadata_fields": ["cluster"]}, "has a column 'cluster' of its own"),
        ({"ranking_strategy": "best"}, "must be a RankingStrategy"),
        ({"ranking_strategy": RankingStrategy(["a", "b"])}, "by one column"),
        ({"ranking_strategy": RankingStrategy(["a"], [True, False])}, "1 columns, but"),
        ({"ranking_strategy": RankingStrategy(["a"]), "which_to_keep": "easy"}, "not both"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_meant(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        SemanticDeduplicationWorkflow("in", "out", **settings)


def test_defaults_of_the_old_workflow_are_taken() -> None:
    flow = SemanticDeduplicationWorkflow(
        input_path="in",
        output_path="out",
        id_field="image_id",
        embedding_field="embedding",
        n_clusters=100,
        eps=0.01,
        read_kwargs={"storage_options": {}},
        write_kwargs={"storage_options": {}},
        verbose=True,
        embedding_dim=None,
        input_filetype="parquet",
        input_file_extensions=[".parquet"],
        tol=1e-4,
        init="k-means||",
        n_init=1,
        oversampling_factor=2.0,
        max_samples_per_batch=1 << 15,
    )
    assert flow.duplicates_path == os.path.abspath("out/duplicates")
    for paths in (([], "x"), ("", "x"), ([""], "x"), ("x", "")):
        with pytest.raises(ArgumentError, match="must not be empty"):
            SemanticDeduplicationWorkflow(*paths)


@pytest.mark.parametrize(
    ("strategy", "same"),
    [
        (RankingStrategy.metadata_based(["score"], ascending=False), BY_SCORE),
        (RankingStrategy.metadata_based(["score", "id"], ascending=[True, True]), ("score", True)),
        (RankingStrategy.metadata_based(["cosine_dist_to_cent", "id"], ascending=[False, True]), "hard"),
        (RankingStrategy.metadata_based(["cosine_dist_to_cent"]), "easy"),
        (RankingStrategy.random(), "random"),
    ],
)
def test_ranking_strategies(strategy: RankingStrategy, same: Any, tmp_path: Path, vectors: Any, scores: Any) -> None:
    folder = write_files(tmp_path / "in", by_shard(rows_of(vectors, scores, 2)), ["shard", "id", "score"])
    settings: dict[str, Any] = {"which_to_keep": "hard", "ranking_strategy": strategy}
    found = listed(workflow(folder, tmp_path / "a", distance_metric="l2", **settings).run())
    pd.testing.assert_frame_equal(found, listed(workflow(folder, tmp_path / "b", which_to_keep=same).run()))


def test_a_share_of_the_rows_is_fitted_on(tmp_path: Path, vectors: Any, scores: Any) -> None:
    folder = write_files(tmp_path / "in", by_shard(rows_of(vectors, scores, 2)), ["shard", "id", "score"])
    result = workflow(folder, tmp_path / "out", n_clusters=2, fit_data_fraction=0.25).run().result
    assert result is not None
    assert result.settings["fit_rows"] == ROWS // 4


def test_what_is_wrong_with_the_input_is_said_before_anything_is_written(tmp_path: Path, vectors: Any) -> None:
    out = tmp_path / "out"
    with pytest.raises(DatasetError, match="no such folder"):
        workflow(tmp_path / "in", out).run()
    (tmp_path / "in/_cache").mkdir(parents=True)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "in/_cache/a.parquet")
    with pytest.raises(DatasetError, match="holds no Parquet file"):
        workflow(tmp_path / "in", out).run()
    rows = rows_of(vectors, np.arange(ROWS), 2, repeats=False)
    folder = write_files(tmp_path / "in", by_shard(rows), ["id", "score"])
    for settings, name in (({"id_field": "key"}, "key"), ({"embedding_field": "emb"}, "emb")):
        with pytest.raises(
            MissingColumnError, match=rf"00000.parquet has no column '{name}'; it has id, score, embedding"
        ):
            workflow(folder, out, **settings).run()
    with pytest.raises(MissingColumnError, match="'url'"):
        workflow(folder, out, metadata_fields=["url"]).run()
    with pytest.raises(ArgumentError, match=r"holds .*not lists of floats"):
        workflow(folder, out, embedding_field="score").run()
    with pytest.raises(ArgumentError, match="n_clusters=300 is more than the 240 rows"):
        workflow(folder, out, n_clusters=300).run()
    for settings in ({"output_path": folder / "out"}, {"output_path": folder}, {"cache_path": folder / "c"}):
        with pytest.raises(ArgumentError, match="lies in input_path"):
            SemanticDeduplicationWorkflow(folder, **{"output_path": out, **settings}).run()
    (folder / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(MetadataFileError, match=r"bad\.parquet"):
        workflow(folder, out).run()
    assert not list((tmp_path / "out").rglob("*.parquet"))


class Executor:
    """Stands for a DaskExecutor."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.used = 0

    @contextmanager
    def cluster(self) -> Iterator[Any]:
        self.used += 1
        with self.client.as_current():
            yield self.client


def test_an_executor_brings_its_cluster(tmp_path: Path, vectors: Any, scores: Any, cluster: Any) -> None:
    rows = rows_of(vectors, scores, 2)
    folder = write_files(tmp_path / "in", by_shard(rows), ["shard", "id", "score"])
    executor = Executor(cluster)
    tasks: list[Any] = []
    plain = cluster.map

    def watched(function: Any, *args: Any, **options: Any) -> Any:
        tasks.append(pickle.loads(function._function))  # it travels as bytes
        return plain(function, *args, **options)

    cluster.map = watched
    try:
        result = workflow(folder, tmp_path / "out").run(executor)
    finally:
        del cluster.map
    assert executor.used == 1
    assert {type(getattr(one, "function", one)).__name__ for one in tasks} >= {"SolveBucket", "WritePart"}
    assert found_by(listed(result)) == brute_force(rows)
    with pytest.raises(ArgumentError, match="must be a DaskExecutor"):
        workflow(folder, tmp_path / "out").run(executor="ray")


def test_results_are_printed_and_logged(
    tmp_path: Path, vectors: Any, scores: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_files(tmp_path / "in", by_shard(rows_of(vectors, scores, 2)), ["shard", "id", "score"])
    with caplog.at_level(logging.INFO, "nemo_image"):
        result = workflow(folder, tmp_path / "out", verbose=False).run()
        assert str(result) not in caplog.messages
        assert str(workflow(folder, tmp_path / "out").run()) in caplog.messages
    assert f"{result.num_duplicates} of {ROWS} rows removed" in str(result)
    assert str(result).endswith(f"listed in {tmp_path}/out/duplicates")


# By a hash of the image -----------------------------------------------------------------------------------------------


def copies(folder: Path) -> Path:
    """Write two shards whose ids repeat: exact copies, and copies of another quality."""
    make_dataset(folder, {"00000": 4})
    pictures = [picture(0), picture(1), picture(10), picture(11)]
    data = [
        encoded(picture(0), quality=90),  # as in the first shard
        encoded(pictures[1], quality=35),  # near
        encoded(pictures[2], quality=90),
        encoded(pictures[3], quality=90),
    ]
    keys = [f"{number:06d}" for number in (0, 7, 2, 3)]
    write_tar(folder / "00001.tar", [(key, {"jpg": one}) for key, one in zip(keys, data, strict=True)])
    write_rows(folder / "00001.parquet", {"key": keys, "caption": ["c"] * 4, "seed": [0] * 4, "score": [9.5] * 4})
    return folder


def test_exact_duplicates(tmp_path: Path, scheduler: Any) -> None:
    folder = copies(tmp_path / "in")
    result = ExactDeduplicationWorkflow(str(folder), tmp_path / "out", metadata_fields=["score"]).run()
    assert listed(result).astype({"shard": str}).to_dict("records") == [
        {"id": "000000", "shard": "00001", "duplicate_of": "000000", "duplicate_of_shard": "00000", "score": 9.5}
    ]
    assert (result.rows, result.num_duplicates) == (8, 1)
    assert result.result is not None
    assert result.result.tier == "exact"
    rows = pd.DataFrame({"shard": ["00000", "00001"], "id": "000000", "embedding": None, "score": 0.0})
    assert left(result.duplicates_path or "", rows) == {("00000", "000000")}


def test_exact_duplicates_by_a_column(tmp_path: Path) -> None:
    folder = copies(tmp_path / "in")
    flow = ExactDeduplicationWorkflow(str(folder), tmp_path / "out", which_to_keep=BY_SCORE)
    assert listed(flow.run())["shard"].astype(str).tolist() == ["00000"]


def test_perceptual_duplicates(tmp_path: Path) -> None:
    folder = copies(tmp_path / "in")
    result = PerceptualDeduplicationWorkflow(str(folder), tmp_path / "out", max_distance=6).run()
    frame = listed(result)
    assert list(frame) == ["id", "shard", "duplicate_of", "duplicate_of_shard", "hash_distance"]
    found = list(zip(frame["shard"].astype(str), frame["id"], frame["duplicate_of"], strict=True))
    assert found == [("00001", "000000", "000000"), ("00001", "000007", "000001")]
    assert frame["hash_distance"].tolist()[0] == 0


def test_hash_workflows_replace_their_lists_and_take_over(tmp_path: Path) -> None:
    folder = copies(tmp_path / "in")
    exact = ExactDeduplicationWorkflow(str(folder), tmp_path / "out")
    exact.run()
    before = contents(tmp_path / "out/duplicates")
    exact.run()
    assert contents(tmp_path / "out/duplicates") == before
    near: dict[str, Any] = {"input_path": str(folder), "output_path": tmp_path / "out", "max_distance": 6}
    with pytest.raises(DatasetError, match="clear_output=True"):
        PerceptualDeduplicationWorkflow(**near, clear_output=False).run()
    assert PerceptualDeduplicationWorkflow(**near).run().num_duplicates == 2
    with pytest.raises(ArgumentError, match="leave it out"):
        exact.run(checkpoint_path=str(tmp_path / "x"))


def test_hash_workflows_check_their_arguments(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="which_to_keep"):
        ExactDeduplicationWorkflow("in", "out", which_to_keep="hard")
    with pytest.raises(ArgumentError, match="max_distance"):
        PerceptualDeduplicationWorkflow("in", "out", max_distance=65)
    with pytest.raises(ArgumentError, match="column 'hash_distance' of its own"):
        PerceptualDeduplicationWorkflow("in", "out", metadata_fields=["hash_distance"])
    folder = copies(tmp_path / "in")
    with pytest.raises(MissingColumnError, match="'url'"):
        ExactDeduplicationWorkflow(str(folder), tmp_path / "out", metadata_fields=["url"]).run()
    with pytest.raises(MissingColumnError, match="'uid'"):
        ExactDeduplicationWorkflow(str(folder), tmp_path / "out", id_field="uid").run()


def test_the_input_of_hash_workflows_is_that_of_datasets(tmp_path: Path) -> None:
    folder = copies(tmp_path / "in")
    tars = [str(folder / "00000.tar"), str(folder / "00001.tar")]
    assert ExactDeduplicationWorkflow(tars, tmp_path / "out").run().num_duplicates == 1
    assert len(ImageTextPairDataset.from_webdataset(str(folder))) == 8
