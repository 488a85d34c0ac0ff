"""Opening datasets of all kinds, and reading only what is needed."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets import load as load_module
from nemo_image.embedders import TimmImageEmbedder
from nemo_image.errors import ArgumentError, RunError
from tests.makers import TINY_MODEL, encoded, make_dataset, picture, sample, write_rows, write_tar


def load(path: Path, **options: object) -> ImageTextPairDataset:
    return ImageTextPairDataset.from_webdataset(str(path), **options)  # type: ignore[arg-type]


def test_one_partition_a_shard_with_its_name(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"b": 2, "a": 3})
    dataset = load(tmp_path)
    assert dataset.metadata.npartitions == 2
    frame = dataset.metadata.compute()
    assert frame["shard"].tolist() == ["a"] * 3 + ["b"] * 2
    assert isinstance(frame["shard"].dtype, pd.CategoricalDtype) or frame["shard"].dtype == object
    assert isinstance(dataset.metadata.get_partition(0).compute()["shard"].dtype, pd.CategoricalDtype)
    assert len(dataset) == 5
    assert len(dataset.head(2)) == 2
    assert [Path(tar).name for tar in dataset.tar_files] == ["a.tar", "b.tar"]
    assert "2 shards" in repr(dataset)
    assert "5 rows" in repr(dataset)
    assert "score" in repr(dataset)


def test_opening_reads_one_schema_and_nothing_else(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "b.parquet").write_bytes(b"not looked at")
    (tmp_path / "a.tar").write_bytes(b"not looked at")
    assert load(tmp_path).shards == ["a", "b"]


def test_only_the_columns_needed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path, {"a": 2})
    asked: list[list[str]] = []
    real = load_module.read_rows

    def spy(source: object, shard: str, columns: list[str]) -> pa.Table:
        asked.append(list(columns))
        return real(source, shard, columns)  # type: ignore[arg-type]

    monkeypatch.setattr(load_module, "read_rows", spy)
    dataset = load(tmp_path)
    frame = dataset.metadata[dataset.metadata["score"] >= 0]
    frame[["key"]].compute(scheduler="sync")
    assert sorted(asked[0]) == ["key", "score"]


def test_tars_without_any_parquet(tmp_path: Path) -> None:
    samples = [sample(seed, f"{seed:03d}", f"caption {seed}", size=seed * 1.5) for seed in range(3)]
    write_tar(tmp_path / "a.tar", samples[:2])
    write_tar(tmp_path / "b.tar", samples[2:])
    dataset = load(tmp_path)
    frame = dataset.metadata.compute()
    assert frame["key"].tolist() == ["000", "001", "002"]
    assert frame["caption"].tolist() == ["caption 0", "caption 1", "caption 2"]
    assert frame["size"].tolist() == [0.0, 1.5, 3.0]
    assert len(dataset) == 3
    done = TimmImageEmbedder(TINY_MODEL, autocast=False)(dataset).save_metadata()
    assert sorted(path.name for path in tmp_path.glob("*.parquet")) == ["a.parquet", "b.parquet"]
    assert done.metadata.compute()["image_embedding"].notna().all()


def test_a_stopped_run_over_tars_alone_can_go_on(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [sample(0, "000")])
    write_tar(tmp_path / "b.tar", [sample(1, "001")])
    TimmImageEmbedder(TINY_MODEL, autocast=False)(load(tmp_path)).save_metadata()
    (tmp_path / "b.parquet").unlink()
    done = TimmImageEmbedder(TINY_MODEL, autocast=False)(load(tmp_path)).save_metadata()
    assert done.metadata.compute()["key"].tolist() == ["000", "001"]
    assert done.run_totals is not None
    assert done.run_totals["shards"]["skipped"] == 1


def test_bad_utf8_captions_are_replaced(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("000", {"jpg": encoded(picture(0)), "txt": b"caf\xe9 \xff"})])
    assert load(tmp_path).metadata.compute()["caption"].tolist() == ["caf� �"]


def test_json_of_all_kinds_becomes_columns(tmp_path: Path) -> None:
    fields = [
        {"text": "half \ud83d a pair", "mixed": 1, "nested": {"a": [1, 2]}, "huge": 2**70},
        {"text": None, "mixed": "one", "nested": None, "huge": 1},
    ]
    samples = [(f"00{number}", {"jpg": b"x", "json": json.dumps(one).encode()}) for number, one in enumerate(fields)]
    write_tar(tmp_path / "a.tar", [*samples, ("002", {"jpg": b"x", "json": b"no json"})])
    frame = load(tmp_path).metadata.compute()
    assert frame["key"].tolist() == ["000", "001", "002"]
    assert frame["text"].iloc[0] == "half ? a pair"
    assert frame["mixed"].tolist()[:2] == ["1", "one"]
    assert frame["nested"].iloc[0] == {"a": [1, 2]}
    assert frame["huge"].tolist()[:2] == [str(2**70), "1"]
    assert frame.iloc[2].drop(["key", "shard"]).isna().all()


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        (pa.nulls(2), pa.array([1, None], pa.int64()), "int64"),
        (pa.array([1, 2], pa.int64()), pa.array([3.0, None]), "double"),
        (pa.array(["a", "b"]), pa.array(["a", "c"]).dictionary_encode(), "string"),
        (pa.array([1.5, 2.0]), pa.array([1, 2], pa.int32()), "double"),
    ],
)
def test_shards_whose_types_differ(tmp_path: Path, first: pa.Array, second: pa.Array, kind: str) -> None:
    for name, values in (("a", first), ("b", second)):
        write_tar(tmp_path / f"{name}.tar", [sample(0, "000"), sample(1, "001")])
        write_rows(tmp_path / f"{name}.parquet", pa.table({"key": ["000", "001"], "x": values}))
    done = load(tmp_path).save_metadata(tmp_path / "out")
    schemas = [pq.read_schema(path).remove_metadata() for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert schemas[0].equals(schemas[1])
    assert str(schemas[0].field("x").type) == kind
    values = [*first.to_pylist(), *second.to_pylist()]
    assert [None if value is pd.NA else value for value in done.metadata.compute()["x"]] == values


def test_values_that_do_not_fit_name_file_and_column(tmp_path: Path) -> None:
    for name, values in (("a", [1, 2]), ("b", ["x", "y"])):
        write_tar(tmp_path / f"{name}.tar", [sample(0, "000"), sample(1, "001")])
        write_rows(tmp_path / f"{name}.parquet", {"key": ["000", "001"], "x": values})
    with pytest.raises(RunError, match=r"b\.parquet: column 'x'"):
        load(tmp_path).save_metadata(tmp_path / "out", columns=["x"])


def test_sidecars_are_joined_by_id(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", {"a": 3, "b": 2})
    dataset = TimmImageEmbedder(TINY_MODEL, autocast=False)(load(tmp_path / "in"))
    dataset.save_metadata(tmp_path / "side", columns=["image_embedding"])
    table = pq.read_table(tmp_path / "side" / "a.parquet")
    assert sorted(table.column_names) == ["image_embedding", "image_error", "key", "shard"]
    pq.write_table(table.take([2, 0, 1]), tmp_path / "side" / "a.parquet")
    joined = load(tmp_path / "in", sidecars=[str(tmp_path / "side")]).metadata.compute()
    direct = dataset.metadata.compute()
    assert joined["image_embedding"].tolist() == direct["image_embedding"].tolist()
    with pytest.raises(ArgumentError, match="list of folders"):
        load(tmp_path / "in", sidecars=str(tmp_path / "side"))


def test_saved_metadata_opens_again_by_its_folder(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", {"a": 3})
    load(tmp_path / "in").save_metadata(tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.tar_files == [str(tmp_path / "in" / "a.tar")]
    assert len(again) == 3


def test_metadata_with_users_own_columns_in_place(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 3, "b": 2})
    dataset = load(tmp_path)
    dataset.metadata = dataset.metadata.assign(double=dataset.metadata["seed"] * 2)
    done = dataset.save_metadata()
    assert done.metadata.compute()["double"].tolist() == [0, 2, 4, 6, 8]
    dataset = load(tmp_path)
    metadata = dataset.metadata.assign(double=dataset.metadata["seed"] * 3)
    dataset.metadata = metadata[metadata["seed"] > 1]
    done = dataset.save_metadata()
    assert done.metadata.compute()["double"].tolist() == [0, 2, 6, 9, 12]


def test_a_frame_of_the_users_own_is_embedded_and_saved(tmp_path: Path) -> None:
    import dask.dataframe as dd

    write_tar(tmp_path / "a.tar", [sample(0, "000"), sample(1, "001")])
    write_tar(tmp_path / "b.tar", [sample(2, "000")])
    rows = pd.DataFrame({"key": ["000", "000", "001"], "shard": ["b", "a", "a"], "seed": [2, 0, 1]})
    tars = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    dataset = ImageTextPairDataset(tmp_path, dd.from_pandas(rows, npartitions=1), tars, "key")
    done = TimmImageEmbedder(TINY_MODEL, autocast=False)(dataset).save_metadata()
    frame = done.metadata.compute()
    assert frame[["shard", "key", "seed"]].astype(str).values.tolist() == [
        ["a", "000", "0"],
        ["a", "001", "1"],
        ["b", "000", "2"],
    ]
    assert frame["image_embedding"].notna().all()


def test_materialize_computes_once(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 3})
    lazy = TimmImageEmbedder(TINY_MODEL, autocast=False)(load(tmp_path))
    done = lazy.materialize()
    assert done.metadata.compute()["image_embedding"].notna().all()
    assert "image_embedding" not in pq.read_schema(tmp_path / "a.parquet").names
    again = lazy.materialize()
    assert again.run_totals is not None
    assert again.run_totals["shards"]["skipped"] == 1
    assert done.materialize() is done


def test_show(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 2})
    write_tar(
        tmp_path / "b.tar",
        [("x", {"jpg": b"broken", "txt": b"<script>alert(1)</script>", "json": json.dumps({}).encode()})],
    )
    write_rows(
        tmp_path / "b.parquet", {"key": ["x"], "caption": ["<script>alert(1)</script>"], "seed": [1], "score": [0.5]}
    )
    gallery = load(tmp_path).show(3)
    text = gallery._repr_html_()
    assert text.count("data:image/jpeg;base64,") == 2
    assert "<script>" not in text
    assert "unknown:" in text
    assert "picture number 1" in repr(gallery)
    with pytest.raises(ArgumentError, match="n must"):
        load(tmp_path).show(0)
