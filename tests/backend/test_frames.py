"""Metadata in cuDF's frames: the same files as with pandas, whatever is done to them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from nemo_image import backend
from nemo_image.classifiers import ImageClassifier
from nemo_image.datasets import ImageTextPairDataset, read_clip_retrieval, write_clip_retrieval
from nemo_image.dedup import ExactDedup, SemanticDedup
from nemo_image.embedders import TimmImageEmbedder
from tests.backend import frames_like_cudf
from tests.makers import TINY_MODEL, make_dataset

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is a random network.*"),
    pytest.mark.in_process("the stand-in for cuDF lives in this process"),
]

Job = Callable[[Path, Path], None]


class Mean(ImageClassifier):
    """Scores an embedding by its mean."""

    def __init__(self, size: int) -> None:
        super().__init__("mean", "image_embedding", "mean", "float32", -1, size)

    def load_model(self, device: str) -> Any:
        return lambda vectors: vectors.mean(dim=1)


def embedded(folder: Path, **options: Any) -> ImageTextPairDataset:
    dataset = ImageTextPairDataset.from_webdataset(folder)
    return TimmImageEmbedder(TINY_MODEL, autocast=False, **options)(dataset)


def enrich(folder: Path, out: Path) -> None:
    embedded(folder).save_metadata(out / "saved")
    embedded(folder, embedding_dtype="float16").save_metadata()


def filter_and_score(folder: Path, out: Path) -> None:
    dataset = embedded(folder)
    dataset.metadata = dataset.metadata[dataset.metadata["seed"].isin([0, 1, 4, 5, 6, 8, 9, 11])]
    dataset = Mean(embedding_size(folder))(dataset)
    assert len(dataset) == 8
    dataset.save_metadata(out / "saved")


def regroup(folder: Path, out: Path) -> None:
    dataset = embedded(folder)
    dataset.metadata = dataset.metadata.repartition(npartitions=1)
    dataset.save_metadata(out / "saved")


def export(folder: Path, out: Path) -> None:
    dataset = embedded(folder).save_metadata(out / "saved")
    dataset.metadata = dataset.metadata.assign(chosen=dataset.metadata["seed"] > 4)
    dataset.to_webdataset(out / "exported", "chosen", samples_per_shard=3)


def deduplicate(folder: Path, out: Path) -> None:
    dataset = ExactDedup()(ImageTextPairDataset.from_webdataset(folder))
    dataset = TimmImageEmbedder(TINY_MODEL, autocast=False)(dataset)
    SemanticDedup(n_clusters=2, eps=0.2)(dataset).save_metadata(out / "saved")


def clip_folders(folder: Path, out: Path) -> None:
    write_clip_retrieval(embedded(folder).save_metadata(out / "saved"), out / "clip", dtype="float32")
    plain = ImageTextPairDataset.from_webdataset(folder)
    read_clip_retrieval(plain, out / "clip").save_metadata(out / "read")


def own_frame(folder: Path, out: Path) -> None:
    dataset = ImageTextPairDataset.from_webdataset(folder)
    frame = dataset.metadata.drop(columns=["shard"])
    ImageTextPairDataset(folder, frame, dataset.tar_files, "key").save_metadata(out / "saved")


JOBS: list[Job] = [enrich, filter_and_score, regroup, export, deduplicate, clip_folders, own_frame]


def embedding_size(folder: Path) -> int:
    return len(embedded(folder).head(1)["image_embedding"].iloc[0])


def run(job: Job, folder: Path) -> dict[str, Any]:
    """Do a job in a folder; return what it has written: tables without their footers, which name the frame's plan."""
    source = make_dataset(folder / "in", {"a": 7, "b": 5})
    job(source, folder / "out")
    written = {
        str(path.relative_to(folder)): content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "_nemo_image" not in path.parts
    }
    shutil.rmtree(folder)
    return written


@pytest.mark.parametrize("frames", ["like cudf", pytest.param("cudf", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
def test_the_same_files(job: Job, frames: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "work"  # the same one: files name it
    # Models on the CPU both times: it is the frames that differ.
    with dask.config.set({backend.BACKEND_KEY: "cpu"}):
        with_pandas = run(job, folder)
        if frames == "cudf":
            pytest.importorskip("dask_cudf", reason="needs RAPIDS, of the extra 'image_cuda13' (or image_cuda12)")
            monkeypatch.setattr("nemo_image.datasets.image_text_pair.new_frames", lambda: "cudf")
        else:
            frames_like_cudf.install(monkeypatch)
        with_cudf = run(job, folder)
    assert list(with_cudf) == list(with_pandas)
    assert [name for name, data in with_cudf.items() if data != with_pandas[name]] == []


def content(path: Path) -> Any:
    table = pq.read_table(path).replace_schema_metadata() if path.suffix == ".parquet" else None
    return path.read_bytes() if table is None else table


def test_what_the_user_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames_like_cudf.install(monkeypatch)
    dataset = embedded(make_dataset(tmp_path / "in", {"a": 3}))
    assert backend.is_cudf(dataset.metadata._meta)
    computed = dataset.metadata.compute()
    assert backend.is_cudf(computed)
    assert type(dataset.head()) is pd.DataFrame
    assert dataset.head()["key"].tolist() == backend.to_pandas(computed)["key"].tolist()
    saved = dataset.save_metadata()
    assert backend.is_cudf(saved.metadata._meta)
    assert "<img" in saved.show(2)._repr_html_()


def test_only_the_columns_that_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames_like_cudf.install(monkeypatch)
    dataset = ImageTextPairDataset.from_webdataset(make_dataset(tmp_path / "in", {"a": 3}))
    read: list[list[str]] = []
    real = frames_like_cudf.DataFrame.from_arrow.__func__  # type: ignore[attr-defined]

    def noted(cls: Any, table: Any) -> Any:
        read.append(table.column_names)
        return real(cls, table)

    monkeypatch.setattr(frames_like_cudf.DataFrame, "from_arrow", classmethod(noted))
    assert len(dataset.metadata[dataset.metadata["seed"] > 0][["key"]].compute()) == 2
    assert [sorted(names) for names in read if names] == [["key", "seed"]]


def test_rows_keep_their_labels() -> None:
    frame = pd.DataFrame({"a": pd.Series([1, 2], dtype="int64[pyarrow]")}, index=[7, 3])
    assert backend.to_pandas(frame) is frame
    assert backend.like(frame, frame) is frame
    assert not backend.is_cudf(frame)


@pytest.mark.gpu
def test_real_frames() -> None:
    cudf = pytest.importorskip("cudf", reason="needs cuDF, of the extra 'image_cuda13' (or image_cuda12)")
    frame = pd.DataFrame(
        {
            "shard": pd.Categorical(["a", "b", "a"]),
            "text": pd.Series(["x", None, "ä"], dtype="string[pyarrow]"),
            "count": pd.Series([1, None, 2**40], dtype="int64[pyarrow]"),
            "vector": backend.to_column(np.eye(2, 3, dtype=np.float32), pd.RangeIndex(3), np.array([0, 2])),
        },
        index=[5, 9, 1],
    )
    made = backend.to_cudf(frame)
    assert isinstance(made, cudf.DataFrame)
    assert backend.is_cudf(made)
    assert backend.is_embedding_dtype(made["vector"].dtype)
    again = backend.to_pandas(made)
    assert again.index.tolist() == [5, 9, 1]
    for name in frame.columns:
        assert backend.arrow_values(again[name]).to_pylist() == backend.arrow_values(frame[name]).to_pylist(), name
