"""Bad input: each a one-line error that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import dask.dataframe as dd
import pandas as pd
import pyarrow as pa
import pytest

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import TimmImageEmbedder
from nemo_image.errors import (
    ArgumentError,
    DatasetError,
    MissingColumnError,
    RunError,
    TooManyFailuresError,
    UnknownModelError,
    WeightsError,
)
from tests.makers import TINY_MODEL, make_dataset, sample, write_rows, write_tar


def load(path: Path, **options: object) -> ImageTextPairDataset:
    return ImageTextPairDataset.from_webdataset(str(path), **options)  # type: ignore[arg-type]


def one_line(raised: pytest.ExceptionInfo[BaseException], *said: str) -> None:
    text = str(raised.value)
    assert "\n" not in text
    for part in said:
        assert part in text, text


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as raised:
        load(tmp_path / "nothing")
    one_line(raised, "nothing", "no such folder")


def test_folder_without_tars(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as raised:
        load(tmp_path)
    one_line(raised, str(tmp_path), "no .tar file", "give the folder")


def test_folder_of_compressed_tars(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(DatasetError) as raised:
        load(tmp_path)
    one_line(raised, "a.tar.gz", "decompress")


def test_tar_without_parquet_among_others(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "b.parquet").unlink()
    with pytest.raises(DatasetError) as raised:
        load(tmp_path)
    one_line(raised, "b.tar", "without its Parquet")


def test_parquet_without_tar(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "b.tar").unlink()
    with pytest.raises(DatasetError) as raised:
        load(tmp_path)
    one_line(raised, "b.parquet", "without its tar")


def test_missing_id_col(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 1})
    with pytest.raises(MissingColumnError) as raised:
        load(tmp_path, id_col="uid")
    one_line(raised, "uid", "key", "a.parquet")


def test_ids_that_match_nothing(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 3})
    dataset = TimmImageEmbedder(TINY_MODEL, autocast=False)(load(tmp_path, id_col="caption"))
    with pytest.raises(RunError) as raised:
        dataset.save_metadata()
    one_line(raised, "caption", "picture number 0", "000000", "give id_col")


def test_a_filter_that_leaves_only_failed_downloads_is_no_mismatch(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [sample(0, "000")])
    write_rows(tmp_path / "a.parquet", {"key": ["000", "001"], "status": ["success", "failed"]})
    dataset = load(tmp_path)
    dataset.metadata = dataset.metadata[dataset.metadata["status"] == "failed"]
    done = TimmImageEmbedder(TINY_MODEL, autocast=False)(dataset).save_metadata(tmp_path / "out")
    assert done.metadata.compute()["image_error"].str.startswith("missing:").tolist() == [True]


def test_duplicate_ids(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [sample(0, "000"), sample(1, "001")])
    write_rows(tmp_path / "a.parquet", {"key": ["000", "001", "001"]})
    dataset = TimmImageEmbedder(TINY_MODEL, autocast=False)(load(tmp_path))
    with pytest.raises(RunError) as raised:
        dataset.save_metadata()
    one_line(raised, "'001'", "more than once", "a.parquet")


def test_unreadable_tar_fails_its_shard_and_no_other(tmp_path: Path, scheduler: object) -> None:
    make_dataset(tmp_path, {"a": 2, "b": 2, "c": 2})
    (tmp_path / "b.tar").write_bytes(b"this is no tar" * 100)
    dataset = TimmImageEmbedder(TINY_MODEL, autocast=False)(load(tmp_path))
    with pytest.raises(RunError) as raised:
        dataset.save_metadata()
    one_line(raised, "1 of 3 shards failed", "b.tar")
    assert list(raised.value.failures) == ["b"]
    assert "image_embedding" in pd.read_parquet(tmp_path / "a.parquet")
    assert "image_embedding" in pd.read_parquet(tmp_path / "c.parquet")
    assert "image_embedding" not in pd.read_parquet(tmp_path / "b.parquet")


def test_unreadable_tar_in_a_repartitioned_frame(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 2, "b": 2, "c": 2})
    (tmp_path / "b.tar").write_bytes(b"this is no tar" * 100)
    dataset = load(tmp_path)
    dataset.metadata = dataset.metadata.repartition(npartitions=1)
    with pytest.raises(RunError) as raised:
        TimmImageEmbedder(TINY_MODEL, autocast=False)(dataset).save_metadata()
    assert list(raised.value.failures) == ["b"]
    assert "image_embedding" in pd.read_parquet(tmp_path / "c.parquet")


def test_garbled_parquet_names_the_file(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(RunError) as raised:
        TimmImageEmbedder(TINY_MODEL, autocast=False)(load(tmp_path)).save_metadata()
    one_line(raised, "b.parquet")
    assert (tmp_path / "b.parquet").read_bytes() == b"PAR1 but not really"


def test_many_failures_stop_the_run(tmp_path: Path) -> None:
    make_dataset(tmp_path, {f"{number:02d}": 1 for number in range(20)})
    for tar in tmp_path.glob("*.tar"):
        tar.write_bytes(b"")
    with pytest.raises(TooManyFailuresError) as raised:
        TimmImageEmbedder(TINY_MODEL, autocast=False)(load(tmp_path)).save_metadata(max_failure_ratio=0.1)
    assert 2 < len(raised.value.failures) < 20


def test_unknown_model_names_near_ones(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 1})
    with pytest.raises(UnknownModelError) as raised:
        TimmImageEmbedder("tf_efficientnet_lite00")(load(tmp_path))
    one_line(raised, "tf_efficientnet_lite0")
    with pytest.raises(UnknownModelError) as raised:
        TimmImageEmbedder("tf_efficientnet_lite0.nosuchtag")(load(tmp_path))
    one_line(raised, "nosuchtag")


def html_page(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def other_model(path: Path) -> None:
    import timm
    import torch

    torch.save(timm.create_model("test_resnet").state_dict(), path)


@pytest.mark.parametrize("write", [html_page, nothing, other_model])
def test_weights_that_are_none(tmp_path: Path, write: Callable[[Path], None]) -> None:
    make_dataset(tmp_path, {"a": 1})
    write(tmp_path / "weights.pth")
    with pytest.raises(WeightsError) as raised:
        TimmImageEmbedder(TINY_MODEL, weights=tmp_path / "weights.pth")(load(tmp_path))
    one_line(raised, "weights.pth")


def test_weights_file_that_is_not_there(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 1})
    with pytest.raises(WeightsError, match="no such file"):
        TimmImageEmbedder(TINY_MODEL, weights="/nowhere/weights.pth")(load(tmp_path))


def test_pretrained_offline_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    make_dataset(tmp_path, {"a": 1})
    with pytest.raises(WeightsError) as raised:
        TimmImageEmbedder("test_efficientnet.r160_in1k", pretrained=True)(load(tmp_path))
    one_line(raised, "weights=", str(huggingface_hub.constants.HF_HUB_CACHE))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"num_threads_per_worker": 0}, "num_threads_per_worker"),
        ({"embedding_dtype": "int8"}, "embedding_dtype"),
        ({"decoder": "magic"}, "decoder"),
        ({"pretrained": True, "weights": "x"}, "not both"),
    ],
)
def test_unusable_embedder_arguments(tmp_path: Path, options: dict[str, object], said: str) -> None:
    make_dataset(tmp_path, {"a": 1})
    with pytest.raises(ArgumentError, match=said):
        TimmImageEmbedder(TINY_MODEL, **options)(load(tmp_path))  # type: ignore[arg-type]


def test_constructor_frame_without_shard(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 2, "b": 2})
    tars = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    frame = pd.DataFrame({"key": [f"{one:06d}" for one in range(4)]}).astype(pd.ArrowDtype(pa.string()))
    with pytest.raises(ArgumentError, match="one partition a tar file"):
        ImageTextPairDataset(tmp_path, dd.from_pandas(frame, npartitions=1), tars, "key")
    dataset = ImageTextPairDataset(tmp_path, dd.from_pandas(frame, npartitions=2), tars, "key")
    assert dataset.metadata.compute()["shard"].tolist() == ["a", "a", "b", "b"]
    assert len(dataset) == 4
    dataset.metadata = dataset.metadata[dataset.metadata["key"] != "000001"]
    assert dataset.metadata.compute()[["shard", "key"]].astype(str).values.tolist() == [
        ["a", "000000"],
        ["b", "000002"],
        ["b", "000003"],
    ]


@pytest.mark.parametrize("ratio", [-0.1, 1.5])
def test_max_failure_ratio_out_of_range(tmp_path: Path, ratio: float) -> None:
    make_dataset(tmp_path, {"a": 1})
    with pytest.raises(ArgumentError, match="max_failure_ratio"):
        load(tmp_path).save_metadata(max_failure_ratio=ratio)


def test_columns_needs_a_path(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 1})
    with pytest.raises(ArgumentError, match="path"):
        load(tmp_path).save_metadata(columns=["caption"])
    with pytest.raises(MissingColumnError, match="nosuch"):
        load(tmp_path).save_metadata(tmp_path / "out", columns=["nosuch"])


def test_a_foreign_shard_column_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [sample(0, "000")])
    write_rows(tmp_path / "a.parquet", {"key": ["000"], "shard": [17]})
    with pytest.raises(DatasetError, match="rename it"):
        load(tmp_path)


@pytest.mark.parametrize(("mode", "rows"), [("null", 2), ("drop", 1)])
def test_on_mismatch(tmp_path: Path, mode: str, rows: int) -> None:
    write_tar(tmp_path / "a.tar", [sample(0, "000")])
    write_rows(tmp_path / "a.parquet", {"key": ["000", "001"]})
    done = load(tmp_path, on_mismatch=mode).save_metadata(tmp_path / "out")
    assert len(done.metadata.compute()) == rows
    assert done.run_totals is not None
    assert done.run_totals["losses"] == ({} if mode == "null" else {"without_sample": 1})


def test_on_mismatch_raise(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [sample(0, "000")])
    write_rows(tmp_path / "a.parquet", {"key": ["000", "001"]})
    with pytest.raises(RunError) as raised:
        load(tmp_path, on_mismatch="raise").save_metadata(tmp_path / "out")
    one_line(raised, "'001'", "on_mismatch")
    with pytest.raises(ArgumentError, match="on_mismatch"):
        load(tmp_path, on_mismatch="ignore")
