"""Tables of images, and the files they are written to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_image import schema
from nemo_image.errors import ArgumentError, DatasetError, EmbeddingError, MissingColumnError
from nemo_image.shards import parquet
from nemo_image.stages.base import ProcessingStage, RunContext
from nemo_image.stages.documents import ConvertImageBatchToDocumentBatchStage, ParquetWriter
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.record import GroupRecord
from nemo_image.stages.tasks import DocumentBatch, FileGroup, ImageBatch
from tests.makers import encoded, picture

MADE_BY = {"model": "vit_tiny_clip", "weights": "abc"}


class Embeds(ProcessingStage[ImageBatch, ImageBatch]):
    """Stands for a stage that has made columns."""

    def column_fingerprints(self) -> Mapping[str, Mapping[str, Any]]:
        return {schema.IMAGE_EMBEDDING: MADE_BY, schema.AESTHETIC_SCORE: {"model": "head"}}


def image(number: int, shard: str = "00000", size: int = 3, **metadata: Any) -> ImageObject:
    made = ImageObject(f"{shard}.tar/{number}.jpg", f"{number:06d}", metadata=metadata, shard=shard)
    made.embedding = np.arange(number, number + size, dtype=np.float32)
    made.aesthetic_score = number / 10
    return made


def batches(images: Sequence[ImageObject], size: int, fields: pa.Schema | None = None) -> Iterator[ImageBatch]:
    for start in range(0, len(images), size):
        yield ImageBatch(list(images[start : start + size]), f"batch-{start}", fields=fields or pa.schema([]))


def write(
    path: Path,
    tables: Iterator[DocumentBatch],
    group: FileGroup | None = None,
    context: RunContext | None = None,
    **options: Any,
) -> tuple[FileGroup, ParquetWriter]:
    group = group or FileGroup([], name="g0")
    writer = ParquetWriter(str(path), **options).prepare(context or RunContext("p", [group], token="t1"))
    writer.connect([Embeds()], [])
    outputs = list(writer.stream(tables, group))
    assert len(outputs) == 1
    return outputs[0], writer


def convert(images: Sequence[ImageObject], fields: list[str], size: int = 4, **kinds: Any) -> Iterator[DocumentBatch]:
    stage = ConvertImageBatchToDocumentBatchStage(fields)
    return stage.stream(batches(images, size, **kinds), FileGroup(name="g0"))


# Converting -----------------------------------------------------------------------------------------------------------


def test_by_default_a_table_says_id_and_shard() -> None:
    table = ConvertImageBatchToDocumentBatchStage().process(ImageBatch([image(1), image(2, "00001")], "b", "set"))
    assert (table.task_id, table.dataset_name, table.num_items) == ("b", "set", 2)
    assert table.data.to_dict("list") == {"image_id": ["000001", "000002"], "shard": ["00000", "00001"]}


def test_attributes_have_the_types_of_the_schema() -> None:
    good, bad = image(1), ImageObject("x", "000002", shard="00000")
    bad.image_error = "truncated: no end"
    good.caption = "a cat \ud800"
    good.image_bytes = encoded(picture(0, 64, 48))
    names = [
        "image_id",
        "key",
        "embedding",
        "aesthetic_score",
        "nsfw_score",
        "caption",
        "width",
        "height",
        "image_error",
    ]
    frame = ConvertImageBatchToDocumentBatchStage(names).process(ImageBatch([good, bad])).data
    assert list(frame) == [*names, "shard"]
    assert frame["embedding"].dtype == schema.list_dtype()
    assert frame.dtypes[["aesthetic_score", "nsfw_score"]].tolist() == [schema.arrow_dtype("float32")] * 2
    assert frame.dtypes[["width", "height"]].tolist() == [schema.arrow_dtype("int32")] * 2
    assert frame["embedding"].tolist()[0] == [1, 2, 3]
    assert pd.isna(frame["embedding"][1])
    assert frame["aesthetic_score"].tolist()[0] == float(np.float32(0.1))
    assert frame.loc[0, ["key", "caption", "width", "height"]].tolist() == ["000001", "a cat ?", 64, 48]
    assert frame["image_error"].tolist()[1] == "truncated: no end"


def test_metadata_keeps_the_types_of_the_source() -> None:
    fields = pa.schema([("seed", pa.int16()), ("place", pa.string()), ("when", pa.timestamp("ms"))])
    images = [image(1, seed=7, place=None, when=None, size=3), image(2, seed=None, place="here", when=None)]
    batch = ImageBatch(images, fields=fields)
    frame = ConvertImageBatchToDocumentBatchStage(["seed", "place", "when"]).process(batch).data
    kinds = [frame[name].dtype.pyarrow_dtype for name in ("seed", "place", "when")]
    assert kinds == [pa.int16(), pa.string(), pa.timestamp("ms")]
    assert frame["seed"].tolist()[0] == 7


def test_metadata_without_declared_types() -> None:
    odd = {"a": 1}
    images = [image(1, ratio=1, tags=["x"], extra=odd, mixed=1), image(2, ratio=2.5, tags=[], extra={}, mixed="b")]
    frame = ConvertImageBatchToDocumentBatchStage(["ratio", "tags", "mixed"]).process(ImageBatch(images)).data
    assert frame["ratio"].tolist() == [1.0, 2.5]
    assert [list(one) for one in frame["tags"]] == [["x"], []]
    assert frame["mixed"].tolist() == ["1", "b"]


def test_an_unknown_field_is_an_error_that_lists_what_there_is() -> None:
    batch = ImageBatch([image(1, seed=3)], "b0", fields=pa.schema([("score", pa.float64())]))
    with pytest.raises(
        MissingColumnError, match=r"field 'embeding': no image of b0 .*embedding.* metadata score, seed"
    ):
        ConvertImageBatchToDocumentBatchStage(["embeding"]).process(batch)


def test_a_field_of_earlier_batches_may_be_absent_from_later_ones() -> None:
    images = [image(1, tag="x"), image(2)]
    tables = list(convert(images, ["tag"], size=1))
    assert pd.isna(tables[1].data["tag"][0])
    with pytest.raises(MissingColumnError, match="'tag'"):
        list(convert(images[::-1], ["tag"], size=1))


def test_a_batch_of_no_images_is_a_table_of_no_rows() -> None:
    frame = ConvertImageBatchToDocumentBatchStage(["embedding", "whatever"]).process(ImageBatch([])).data
    assert (len(frame), list(frame)) == (0, ["embedding", "whatever", "shard"])


def test_embeddings_of_two_models_are_an_error() -> None:
    with pytest.raises(EmbeddingError, match="of 2 and of 3 numbers"):
        ConvertImageBatchToDocumentBatchStage(["embedding"]).process(ImageBatch([image(1, size=2), image(2, size=3)]))


def test_fields_must_be_a_list_and_are_what_the_stage_needs() -> None:
    with pytest.raises(ArgumentError, match="list of names"):
        ConvertImageBatchToDocumentBatchStage("embedding")  # type: ignore[arg-type]
    stage = ConvertImageBatchToDocumentBatchStage(["image_id", "seed", "embedding"])
    assert stage.inputs()[1] == ["embedding"]
    assert stage.outputs()[1] == ["image_id", "seed", "embedding", "shard"]


# Writing --------------------------------------------------------------------------------------------------------------


def test_writes_a_file_for_each_source_shard(tmp_path: Path) -> None:
    images = [image(number, "00000") for number in range(5)] + [image(number, "sub/00001") for number in range(3)]
    group = FileGroup([], task_id="t", dataset_name="d", name="g0", index=4)
    output, _ = write(tmp_path / "out", convert(images, ["image_id", "embedding"]), group)

    assert (output.name, output.index, output.dataset_name, output.root) == ("g0", 4, "d", str(tmp_path / "out"))
    assert output.data == [str(tmp_path / "out/00000.parquet"), str(tmp_path / "out/sub/00001.parquet")]
    assert json.loads(json.dumps(output.metadata)) == {"rows": 8}
    tables = [pq.read_table(url) for url in output.data]
    assert [table["image_id"].to_pylist() for table in tables] == [
        [f"{number:06d}" for number in range(5)],
        [f"{number:06d}" for number in range(3)],
    ]
    assert tables[1]["shard"].to_pylist() == ["sub/00001"] * 3
    assert tables[0].schema.field("shard").type == schema.SHARD_TYPE
    assert tables[0].schema.field("embedding").type == pa.list_(pa.float32())
    np.testing.assert_array_equal(tables[0]["embedding"].to_pylist()[4], [4, 5, 6])
    assert pd.read_parquet(output.data[0])["image_id"].tolist() == [f"{number:06d}" for number in range(5)]


def test_footers_say_what_made_the_columns(tmp_path: Path) -> None:
    output, _ = write(tmp_path, convert([image(1)], ["embedding", "aesthetic_score", "image_id"]))
    footer = parquet.read_summary(output.data[0]).footer
    assert footer is not None
    assert footer.columns == {"embedding": MADE_BY, "aesthetic_score": {"model": "head"}}
    assert footer.plan == "t1"
    assert footer.record["rows"] == 1


def test_without_shards_a_group_is_one_file(tmp_path: Path) -> None:
    tables = [DocumentBatch(pd.DataFrame({"text": [str(number)]})) for number in range(3)]
    output, _ = write(tmp_path, iter(tables), FileGroup(name="00012-3fa8c01d"))
    assert output.data == [str(tmp_path / "00012-3fa8c01d.parquet")]
    assert pq.read_table(output.data[0]).to_pydict() == {"text": ["0", "1", "2"]}


def test_a_group_without_rows_writes_nothing(tmp_path: Path) -> None:
    output, _ = write(tmp_path, convert([], ["image_id"]))
    assert (output.data, output.metadata) == ([], {"rows": 0})
    empty = DocumentBatch(pd.DataFrame({"shard": [], "x": []}))
    assert write(tmp_path, iter([empty]))[0].data == []


@pytest.mark.parametrize("nulls", [1, 30])
def test_a_column_that_is_null_at_first_takes_its_type_from_later_rows(
    tmp_path: Path, nulls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "ROW_GROUP_ROWS", 8)
    images = [image(number, note=None if number < nulls else number, other="x") for number in range(40)]
    output, _ = write(tmp_path, convert(images, ["note", "other", "image_id"]))
    table = pq.read_table(output.data[0])
    assert table.schema.field("note").type == pa.int64()
    assert table["note"].to_pylist() == [None] * nulls + list(range(nulls, 40))
    assert table["other"].to_pylist() == ["x"] * 40
    assert table["image_id"].to_pylist() == [f"{number:06d}" for number in range(40)]
    assert pq.ParquetFile(output.data[0]).metadata.row_group(0).num_rows == 8


def test_a_column_that_is_null_throughout_stays_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "ROW_GROUP_ROWS", 8)
    images = [image(number, note=None) for number in range(20)]
    table = pq.read_table(write(tmp_path, convert(images, ["note"]))[0].data[0])
    assert table["note"].null_count == 20


def test_types_are_joined_over_the_first_rows_and_must_fit_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "ROW_GROUP_ROWS", 8)
    widened = [image(number, ratio=number if number < 4 else number + 0.5) for number in range(20)]
    table = pq.read_table(write(tmp_path / "a", convert(widened, ["ratio"]))[0].data[0])
    assert table["ratio"].to_pylist() == [0, 1, 2, 3, *(number + 0.5 for number in range(4, 20))]

    late = [image(number, ratio=number if number < 12 else number + 0.5) for number in range(20)]
    with pytest.raises(DatasetError, match=r"'ratio' is int64 in the first 8 rows, and later double"):
        write(tmp_path / "b", convert(late, ["ratio"]))
    texts = [image(number, ratio=number if number < 4 else "x") for number in range(8)]
    with pytest.raises(DatasetError, match=r"'ratio' holds int64 in some rows and string in others"):
        write(tmp_path / "c", convert(texts, ["ratio"]))
    assert not list((tmp_path / "b").glob("*.parquet")) + list((tmp_path / "c").glob("*.parquet"))


def test_rows_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer draws no more than a row group, or what a null column hides, before it writes."""
    monkeypatch.setattr(parquet, "ROW_GROUP_ROWS", 8)
    held: list[int] = []
    write_group = parquet.TableWriter._write_groups

    def counting(self: Any, rows: int) -> None:
        held.append(self._waiting_rows)
        write_group(self, rows)

    monkeypatch.setattr(parquet.TableWriter, "_write_groups", counting)
    images = [image(number) for number in range(100)]
    write(tmp_path, convert(images, ["embedding"]))
    assert max(held) < 8 + 4
    assert sum(held) >= 100


def test_a_stage_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def failing() -> Iterator[DocumentBatch]:
        yield from convert([image(number) for number in range(4)], ["image_id"])
        raise RuntimeError("worker lost")

    with pytest.raises(RuntimeError, match="worker lost"):
        write(tmp_path, failing())
    assert list(tmp_path.rglob("*.parquet")) == []


def test_repeated_work_gives_the_same_bytes(tmp_path: Path) -> None:
    images = [image(number, seed=number) for number in range(9)]
    first, _ = write(tmp_path, convert(images, ["image_id", "embedding", "seed"]))
    before = Path(first.data[0]).read_bytes()
    write(tmp_path, convert(images, ["image_id", "embedding", "seed"]))
    assert Path(first.data[0]).read_bytes() == before


def test_rows_of_a_shard_must_come_together(tmp_path: Path) -> None:
    images = [image(1, "a"), image(2, "b"), image(3, "a")]
    with pytest.raises(DatasetError, match="'a' come after those of another"):
        write(tmp_path, convert(images, ["image_id"]))
    rows = DocumentBatch(pd.DataFrame({"shard": ["a", None], "x": [1, 2]}), "b7")
    with pytest.raises(DatasetError, match="b7: a row says no shard"):
        write(tmp_path, iter([rows]))
    with pytest.raises(ArgumentError, match="leads out"):
        write(tmp_path, convert([image(1, "../../etc/x")], ["image_id"]))


# Whose folder it is ---------------------------------------------------------------------------------------------------


def test_a_folder_of_other_parquet_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "theirs.parquet")
    for replace in (False, True):
        with pytest.raises(DatasetError, match=r"holds other Parquet files \(theirs.parquet"):
            ParquetWriter(str(tmp_path), replace=replace).prepare(RunContext("p", token="t1"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(DatasetError, match="is a file"):
        ParquetWriter(str(tmp_path / "file")).prepare(RunContext("p", token="t1"))
    with pytest.raises(ArgumentError, match="path is empty"):
        ParquetWriter("")


def record(output: FileGroup) -> GroupRecord:
    return GroupRecord.from_dict(json.loads(json.dumps(GroupRecord(output.name, outputs=[output]).to_dict())))


def run(path: Path, shards: Mapping[str, str], token: str = "t1", failed: Sequence[str] = (), **options: Any) -> Any:
    """Write one image for each group's shard; return what `finish` says."""
    groups = [FileGroup([], name=name) for name in shards]
    context = RunContext("p", groups, token=token)
    done = []
    writer = ParquetWriter(str(path), **options).prepare(context)
    writer.connect([], [])
    for group in groups:
        if group.name not in failed:
            images = [image(1, shards[group.name])] if shards[group.name] else []
            done += [record(one) for one in writer.stream(convert(images, ["image_id"]), group)]
    return writer.finish(context, done)


def names(path: Path) -> list[str]:
    return sorted(str(one.relative_to(path)) for one in path.rglob("*.parquet"))


def test_leftovers_of_groups_that_are_gone_are_removed(tmp_path: Path) -> None:
    assert run(tmp_path, {"g0": "a", "g1": "b", "g2": "x/c"}) == {}
    pq.write_table(pa.table({"x": [1]}), tmp_path / "theirs.parquet")
    assert run(tmp_path, {"g0": "a", "g2": "x/c"}) == {"leftovers removed": 1}
    assert names(tmp_path) == ["a.parquet", "theirs.parquet", "x/c.parquet"]


def test_what_a_failed_group_wrote_before_stays_and_what_a_finished_one_no_longer_gives_goes(tmp_path: Path) -> None:
    run(tmp_path, {"g0": "a", "g1": "b"})
    assert run(tmp_path, {"g0": "a", "g1": "b"}, failed=["g1"]) == {}
    assert names(tmp_path) == ["a.parquet", "b.parquet"]
    assert run(tmp_path, {"g0": "a", "g1": ""}) == {"leftovers removed": 1}
    assert names(tmp_path) == ["a.parquet"]


def test_another_pipeline_needs_replace(tmp_path: Path) -> None:
    run(tmp_path, {"g0": "a", "g1": "b"})
    with pytest.raises(DatasetError, match="replace=True"):
        run(tmp_path, {"g0": "a"}, token="t2")
    assert run(tmp_path, {"g1": "b"}, token="t2", replace=True) == {"leftovers removed": 1}
    assert names(tmp_path) == ["b.parquet"]


def test_in_the_middle_of_a_pipeline_nothing_of_a_known_group_is_removed(tmp_path: Path) -> None:
    group = FileGroup([], name="g0")
    context = RunContext("p", [group], token="t1")
    writer = ParquetWriter(str(tmp_path)).prepare(context)
    writer.connect([], [Embeds()])
    list(writer.stream(convert([image(1, "a")], ["image_id"]), group))
    assert writer.finish(context, [GroupRecord("g0", outputs=[])]) == {}
    assert names(tmp_path) == ["a.parquet"]


def test_a_checkpoint_asks_whether_files_are_there(tmp_path: Path) -> None:
    output, writer = write(tmp_path, convert([image(1, "a")], ["image_id"]))
    assert writer.output_folder() == str(tmp_path)
    assert writer.outputs_intact([output])
    Path(output.data[0]).write_bytes(b"cut")
    assert not writer.outputs_intact([output])
    Path(output.data[0]).unlink()
    assert not writer.outputs_intact([output])


def test_one_table_alone(tmp_path: Path) -> None:
    output = ParquetWriter(str(tmp_path)).process(next(convert([image(1, "a")], ["image_id"])))
    assert names(tmp_path) == ["a.parquet"]
    assert output.num_items == 1
