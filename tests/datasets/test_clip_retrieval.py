"""clip-retrieval's folders: each embedding belongs to the row of its id, whatever the files' order."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_image.datasets import ImageTextPairDataset, read_clip_retrieval, write_clip_retrieval
from nemo_image.errors import (
    ArgumentError,
    DatasetError,
    EmbeddingError,
    IdMismatchError,
    MetadataFileError,
    MissingColumnError,
    NemoImageError,
    RunError,
)
from tests.makers import TINY_MODEL, make_dataset, sample, write_rows, write_tar

SIZES = {"a": 5, "b": 4, "c": 3}
SHUFFLED = [[11, 2, 7, 0, 9], [3, 10, 5, 1], [8, 4, 6]]
"""The pictures of each file of a folder, by seed: no file is a shard, and no row is in a shard's order."""
WITHOUT = [seeds[1:] for seeds in SHUFFLED]  # lacks 11, 3 and 8


def vectors(size: int = 6, seed: int = 0) -> np.ndarray:
    """Return an embedding for each of twelve pictures."""
    return np.random.default_rng(seed).standard_normal((12, size))


def key(seed: int) -> str:
    return f"{seed:06d}"


def write_folder(
    folder: Path,
    files: Sequence[Sequence[int]] = SHUFFLED,
    dtype: str = "float16",
    ids: Mapping[str, Callable[[int], Any]] | None = None,
    text: np.ndarray | None = None,
) -> Path:
    """Write a folder as clip-inference does, with its names and its float16, from rows of `vectors`."""
    digits = int(math.log10(len(files))) + 1
    for number, seeds in enumerate(files):
        for kind, matrix in (("img_emb", vectors()), ("text_emb", text)):
            if matrix is not None:
                (folder / kind).mkdir(parents=True, exist_ok=True)
                np.save(folder / kind / f"{kind}_{str(number).zfill(digits)}", matrix[seeds].astype(dtype))
        (folder / "metadata").mkdir(parents=True, exist_ok=True)
        columns = {name: [make(seed) for seed in seeds] for name, make in (ids or {"image_path": key}).items()}
        write_rows(folder / "metadata" / f"metadata_{str(number).zfill(digits)}.parquet", columns)
    return folder


def load(path: Path, **options: Any) -> ImageTextPairDataset:
    return ImageTextPairDataset.from_webdataset(str(path), **options)


def belongs(frame: pd.DataFrame, oracle: np.ndarray, column: str = "image_embedding") -> bool:
    """Tell whether every row's embedding is its own picture's, as float16, and null where there is none."""
    wanted = [np.nan_to_num(oracle[seed].astype("float16"), nan=-9).tolist() for seed in frame["seed"].astype(int)]
    missing = [-9] * oracle.shape[1]
    found = [missing if null else one for null, one in zip(frame[column].isna(), frame[column], strict=True)]
    return wanted == [np.asarray(one).astype("float16").tolist() for one in found]


def masked(oracle: np.ndarray, present: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the embeddings with nan for pictures that no file has."""
    kept = np.full_like(oracle, np.nan)
    seeds = [seed for one in present for seed in one]
    kept[seeds] = oracle[seeds]
    return kept


# Reading --------------------------------------------------------------------------------------------------------------


def test_a_shuffled_folder_pairs_by_id_and_rows_it_lacks_are_null(tmp_path: Path, scheduler: Any) -> None:
    dataset = load(make_dataset(tmp_path / "in", SIZES))
    before = dataset.metadata.compute()
    read = read_clip_retrieval(dataset, write_folder(tmp_path / "clip", WITHOUT))
    frame = read.metadata.compute()
    assert belongs(frame, masked(vectors(), WITHOUT))
    pd.testing.assert_frame_equal(frame[before.columns], before)
    assert read.metadata.npartitions == 3
    assert "image_embedding" not in dataset.metadata.columns


def test_a_control_with_swapped_metadata_fails_the_pairing_check(tmp_path: Path) -> None:
    dataset = load(make_dataset(tmp_path / "in", SIZES))
    swapped = [[2, 11, *SHUFFLED[0][2:]], *SHUFFLED[1:]]
    folder = write_folder(tmp_path / "clip", SHUFFLED)
    assert belongs(read_clip_retrieval(dataset, folder).metadata.compute(), vectors())
    write_rows(folder / "metadata" / "metadata_0.parquet", {"image_path": [key(seed) for seed in swapped[0]]})
    frame = read_clip_retrieval(dataset, folder).metadata.compute()
    assert not belongs(frame, vectors())
    assert belongs(frame[~frame["seed"].isin([2, 11])], vectors())
    # What pairing by position would give.
    frame["image_embedding"] = list(vectors()[np.concatenate(SHUFFLED)].astype("float16"))
    assert not belongs(frame, vectors())


def test_opening_reads_one_header_and_one_footer(tmp_path: Path) -> None:
    dataset = load(make_dataset(tmp_path / "in", SIZES))
    folder = write_folder(tmp_path / "clip")
    (folder / "img_emb" / "img_emb_1.npy").write_bytes(b"not looked at")
    (folder / "metadata" / "metadata_2.parquet").write_bytes(b"not looked at")
    read = read_clip_retrieval(dataset, folder)
    assert read.metadata[["score"]].compute()["score"].tolist() == [seed / 10 for seed in range(12)]
    assert len(read) == 12


@pytest.mark.parametrize(
    ("stored", "column"), [("float16", "float16"), ("float32", "float32"), ("float64", "float32"), (">f4", "float32")]
)
def test_number_types(tmp_path: Path, stored: str, column: str) -> None:
    dataset = load(make_dataset(tmp_path / "in", SIZES))
    read = read_clip_retrieval(dataset, write_folder(tmp_path / "clip", dtype=stored), image_embedding_column="clip")
    kinds = {"float16": pa.float16(), "float32": pa.float32()}
    assert read.metadata["clip"].dtype == pd.ArrowDtype(pa.list_(kinds[column]))
    frame = read.metadata.compute()
    assert frame["clip"].dtype == read.metadata["clip"].dtype
    assert np.array_equal(np.stack(frame["clip"].tolist()), vectors().astype(stored).astype(column))


def test_text_embeddings_come_too_where_they_are_asked_for(tmp_path: Path) -> None:
    dataset = load(make_dataset(tmp_path / "in", SIZES))
    folder = write_folder(tmp_path / "clip", text=vectors(size=4, seed=1))
    assert "text_embedding" not in read_clip_retrieval(dataset, folder).metadata.columns
    frame = read_clip_retrieval(dataset, folder, text_embedding_column="text_embedding").metadata.compute()
    assert belongs(frame, vectors())
    assert belongs(frame, vectors(size=4, seed=1), "text_embedding")


@pytest.mark.parametrize(
    ("dataset_ids", "folder_ids"),
    [
        (lambda seed: seed, lambda seed: f"{seed:09d}"),
        (float, lambda seed: f"{seed:09d}"),
        (lambda seed: f"{seed:09d}", lambda seed: seed),
        (lambda seed: seed - 3, lambda seed: seed - 3),
    ],
)
def test_integers_match_zero_padded_numbers(tmp_path: Path, dataset_ids: Any, folder_ids: Any) -> None:
    seeds = list(range(12))
    write_tar(tmp_path / "in" / "a.tar", [sample(seed, key(seed)) for seed in seeds])
    write_rows(tmp_path / "in" / "a.parquet", {"uid": [dataset_ids(seed) for seed in seeds], "seed": seeds})
    ids = {"image_path": lambda seed: f"/pictures/{seed}.jpg", "uid": folder_ids}
    folder = write_folder(tmp_path / "clip", ids=ids)
    read = read_clip_retrieval(load(tmp_path / "in", id_col="uid"), folder, id_col="uid")
    assert belongs(read.metadata.compute(), vectors())


def test_texts_match_only_their_equals(tmp_path: Path) -> None:
    dataset = load(make_dataset(tmp_path / "in", SIZES))
    folder = write_folder(tmp_path / "clip", ids={"image_path": lambda seed: key(seed) if seed else "0"})
    assert belongs(read_clip_retrieval(dataset, folder).metadata.compute(), masked(vectors(), [range(1, 12)]))


def test_users_changes_before_and_after(tmp_path: Path, scheduler: Any) -> None:
    dataset = load(make_dataset(tmp_path / "in", SIZES))
    metadata = dataset.metadata.repartition(npartitions=2)
    dataset.metadata = metadata[metadata["seed"] != 4]
    read = read_clip_retrieval(dataset, write_folder(tmp_path / "clip"))
    assert read.metadata.npartitions == 2
    read.metadata["double"] = read.metadata["seed"] * 2
    read.metadata = read.metadata[read.metadata["seed"] >= 2]
    frame = read.metadata.compute()
    assert frame["seed"].tolist() == [2, 3, 5, 6, 7, 8, 9, 10, 11]
    assert belongs(frame, vectors())
    done = read.save_metadata(tmp_path / "out", columns=["seed", "double", "image_embedding"])
    saved = done.metadata.compute()
    assert saved["double"].tolist() == [seed * 2 for seed in frame["seed"]]
    assert belongs(saved, vectors())


def test_saving_in_place_and_again_after_the_folder_changed(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", SIZES)
    folder = write_folder(tmp_path / "clip", WITHOUT)
    assert belongs(
        read_clip_retrieval(load(tmp_path / "in"), folder).save_metadata().metadata.compute(),
        masked(vectors(), WITHOUT),
    )
    read = read_clip_retrieval(load(tmp_path / "in"), folder)
    read.save_metadata(tmp_path / "out")
    write_folder(folder, SHUFFLED)
    done = read_clip_retrieval(load(tmp_path / "in"), folder).save_metadata(tmp_path / "out")
    assert belongs(done.metadata.compute(), vectors())


@pytest.mark.filterwarnings("ignore:.*is a random network.*")
def test_a_replaced_column_is_no_longer_the_embedders(tmp_path: Path) -> None:
    from nemo_image.embedders import TimmImageEmbedder

    dataset = TimmImageEmbedder(TINY_MODEL, autocast=False)(load(make_dataset(tmp_path / "in", SIZES)))
    read = read_clip_retrieval(dataset, write_folder(tmp_path / "clip"))
    assert "image_embedding" in dataset.provenance
    assert "image_embedding" not in read.provenance
    done = read.save_metadata(tmp_path / "out", columns=["seed", "image_embedding"])
    assert belongs(done.metadata.compute(), vectors())


def test_rows_that_the_user_doubled_are_not_ambiguous(tmp_path: Path, scheduler: Any) -> None:
    import dask.dataframe as dd

    dataset = load(make_dataset(tmp_path / "in", SIZES))
    dataset.metadata = dd.concat([dataset.metadata, dataset.metadata])
    frame = read_clip_retrieval(dataset, write_folder(tmp_path / "clip")).metadata.compute()
    assert sorted(frame["seed"]) == sorted([*range(12), *range(12)])
    assert belongs(frame, vectors())


def test_a_frame_with_known_divisions(tmp_path: Path) -> None:
    import dask.dataframe as dd

    dataset = load(make_dataset(tmp_path / "in", SIZES))
    rows = pd.DataFrame({"seed": range(12), "key": [key(seed) for seed in range(12)], "shard": list("aaaaabbbbccc")})
    dataset.metadata = dd.from_pandas(rows, npartitions=2)
    read = read_clip_retrieval(dataset, write_folder(tmp_path / "clip"))
    assert belongs(read.metadata.loc[2:9].compute(), vectors())


@pytest.mark.parametrize(("order", "dtype"), [("C", "float16"), ("F", "float16"), ("C", ">f4")])
@pytest.mark.in_process("watches or changes this process")
def test_a_remote_folder_is_read_by_ranges(tmp_path: Path, order: Any, dtype: str) -> None:
    dataset = load(make_dataset(tmp_path / "in", SIZES))
    folder = write_folder(tmp_path / "clip", WITHOUT, dtype)
    for path in folder.glob("img_emb/*"):
        np.save(path, np.array(np.load(path), order=order))
    remote = fsspec.filesystem("memory")
    remote.put(f"{folder}/", f"{tmp_path}/", recursive=True)
    frame = read_clip_retrieval(dataset, f"memory://{tmp_path}/").metadata.compute()
    remote.rm(str(tmp_path), recursive=True)
    assert belongs(frame, masked(vectors().astype(dtype).astype("float64"), WITHOUT))


# Folders that cannot be read ------------------------------------------------------------------------------------------


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def pickled(path: Path) -> None:
    np.save(path, np.array([[{"a": 1}]] * 5, dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (lambda at: (at / "img_emb").rename(at / "other"), DatasetError, r"img_emb: no such folder"),
        (lambda at: [one.unlink() for one in at.glob("img_emb/*")], DatasetError, r"holds no img_emb_<number>\.npy"),
        (lambda at: (at / "img_emb/img_emb_1.npy").unlink(), DatasetError, r"no img_emb_1\.npy"),
        (lambda at: (at / "metadata/metadata_1.parquet").unlink(), DatasetError, r"no metadata_1\.parquet"),
        (lambda at: (at / "img_emb/other.npy").touch(), DatasetError, r"other\.npy is not named img_emb_<number>"),
        (lambda at: pickled(at / "img_emb/img_emb_0.npy"), EmbeddingError, r"img_emb_0\.npy holds object"),
        (lambda at: shorten(at / "img_emb/img_emb_0.npy"), EmbeddingError, r"img_emb_0\.npy is cut short"),
        (lambda at: np.save(at / "img_emb/img_emb_0", np.zeros(5)), EmbeddingError, r"of shape \(5,\)"),
        (lambda at: (at / "img_emb/img_emb_0.npy").write_bytes(b"\x80\x04K\x01."), EmbeddingError, r"is no \.npy file"),
        (lambda at: (at / "metadata/metadata_0.parquet").write_bytes(b""), MetadataFileError, r"metadata_0\.parquet"),
        (lambda at: write_rows(at / "metadata/metadata_0.parquet", {"x": [1]}), MissingColumnError, r"'image_path'"),
    ],
)
def test_what_is_wrong_at_once(tmp_path: Path, spoil: Any, error: type[NemoImageError], said: str) -> None:
    dataset = load(make_dataset(tmp_path / "in", SIZES))
    folder = write_folder(tmp_path / "clip")
    read_clip_retrieval(dataset, folder)
    spoil(folder)
    with pytest.raises(error, match=said):
        read_clip_retrieval(dataset, folder)


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (lambda at: np.save(at / "img_emb/img_emb_1", np.zeros((3, 6), "f2")), EmbeddingError, r"3 rows.* has 4"),
        (lambda at: np.save(at / "img_emb/img_emb_1", np.zeros((4, 5), "f2")), EmbeddingError, r"5 numbers.*0\.npy 6"),
        (lambda at: np.save(at / "img_emb/img_emb_1", np.zeros((4, 6), "f4")), EmbeddingError, r"float32.* float16"),
        (lambda at: pickled(at / "img_emb/img_emb_1.npy"), EmbeddingError, r"img_emb_1\.npy holds object"),
        (lambda at: shorten(at / "img_emb/img_emb_2.npy"), EmbeddingError, r"img_emb_2\.npy is cut short"),
        (lambda at: (at / "metadata/metadata_2.parquet").write_bytes(b""), MetadataFileError, r"metadata_2\.parquet"),
        (
            lambda at: write_rows(
                at / "metadata/metadata_1.parquet", {"image_path": [key(one) for one in (3, 2, 5, 1)]}
            ),
            IdMismatchError,
            r"ids .* '000002', which is in metadata_0\.parquet row 1 and metadata_1\.parquet row 1, .* in a:",
        ),
    ],
)
def test_what_is_wrong_on_computing(
    tmp_path: Path, scheduler: Any, spoil: Any, error: type[NemoImageError], said: str
) -> None:
    dataset = load(make_dataset(tmp_path / "in", SIZES))
    folder = write_folder(tmp_path / "clip")
    spoil(folder)
    read = read_clip_retrieval(dataset, folder)
    with pytest.raises(error, match=said):
        read.metadata.compute()


def test_missing_text_embeddings(tmp_path: Path) -> None:
    dataset = load(make_dataset(tmp_path / "in", SIZES))
    folder = write_folder(tmp_path / "clip")
    with pytest.raises(DatasetError, match="text_emb: no such folder"):
        read_clip_retrieval(dataset, folder, text_embedding_column="text_embedding")
    with pytest.raises(ArgumentError, match="name two columns"):
        read_clip_retrieval(dataset, folder, text_embedding_column="image_embedding")
    with pytest.raises(ArgumentError, match="'key' says which row"):
        read_clip_retrieval(dataset, folder, image_embedding_column="key")
    with pytest.raises(DatasetError, match="no such folder"):
        read_clip_retrieval(dataset, tmp_path / "nowhere")


def test_a_folder_of_other_ids(tmp_path: Path, scheduler: Any) -> None:
    dataset = load(make_dataset(tmp_path / "in", SIZES))
    folder = write_folder(tmp_path / "clip", ids={"image_path": lambda seed: f"/{seed}.jpg"})
    read = read_clip_retrieval(dataset, folder)
    with pytest.raises(DatasetError, match="no 'image_path' of its metadata is a 'key' of the dataset"):
        read.metadata.compute()
    nothing = load(tmp_path / "in")
    nothing.metadata = nothing.metadata[nothing.metadata["seed"] < 0]
    assert read_clip_retrieval(nothing, folder).metadata.compute()["image_embedding"].tolist() == []


def repeated_keys(folder: Path) -> ImageTextPairDataset:
    """Make two shards of three samples each, whose keys are the same."""
    for shard, seeds in {"x": [0, 1, 2], "y": [3, 4, 5]}.items():
        write_tar(folder / f"{shard}.tar", [sample(seed, key(seed % 3)) for seed in seeds])
        write_rows(folder / f"{shard}.parquet", {"key": [key(seed % 3) for seed in seeds], "seed": seeds})
    return load(folder)


def test_ids_that_repeat_across_shards_are_refused(tmp_path: Path, scheduler: Any) -> None:
    dataset = repeated_keys(tmp_path / "in")
    read = read_clip_retrieval(dataset, write_folder(tmp_path / "clip", [[1], [7]]))
    with pytest.raises(IdMismatchError, match=r"'000001', which is in metadata_0\.parquet row 0, .* in x and y:"):
        read.metadata.compute()
    # The same ids in one shard alone mean one row each.
    dataset.metadata = dataset.metadata[dataset.metadata["shard"] == "x"]
    frame = read_clip_retrieval(dataset, tmp_path / "clip").metadata.compute()
    assert belongs(frame, masked(vectors(), [[1]]))


# Writing --------------------------------------------------------------------------------------------------------------


def with_embeddings(
    folder: Path, sizes: Mapping[str, int] = SIZES, lacking: Sequence[int] = ()
) -> ImageTextPairDataset:
    """Make a dataset whose Parquet files hold `vectors` as float32, and a second embedding of two numbers."""
    make_dataset(folder, sizes)
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path)
        seeds = table["seed"].to_pylist()
        image = [None if seed in lacking else vectors()[seed % 12].astype("f4") for seed in seeds]
        table = table.append_column("image_embedding", pa.array(image, pa.list_(pa.float32())))
        text = [None if seed == 1 else np.array([seed, -seed], "f4") for seed in seeds]
        pq.write_table(table.append_column("text_embedding", pa.array(text, pa.list_(pa.float32()))), path)
    return load(folder)


def read_written(folder: Path) -> tuple[np.ndarray, pd.DataFrame]:
    """Read a folder as clip-retrieval's index and back end do: both kinds of files in the order of their names."""
    arrays = [np.load(path) for path in sorted(folder.glob("img_emb/*"))]
    tables = [pd.read_parquet(path) for path in sorted(folder.glob("metadata/*"))]
    assert [len(one) for one in arrays] == [len(one) for one in tables]
    return np.concatenate(arrays), pd.concat(tables, ignore_index=True)


def test_round_trip(tmp_path: Path, scheduler: Any) -> None:
    dataset = with_embeddings(tmp_path / "in")
    totals = write_clip_retrieval(dataset, tmp_path / "out")
    matrix, rows = read_written(tmp_path / "out")
    assert matrix.dtype == np.float16
    assert np.array_equal(matrix, vectors().astype("f4").astype("f2"))
    assert list(rows) == ["image_path", "caption", "key", "seed", "score", "shard"]
    assert rows["image_path"].tolist() == [key(seed) for seed in range(12)]
    assert rows["caption"].tolist() == [f"picture number {seed}" for seed in range(12)]
    assert rows["shard"].tolist() == ["a"] * 5 + ["b"] * 4 + ["c"] * 3
    assert (totals["rows_in"], totals["rows_out"], totals["losses"]) == (12, 12, {})
    assert totals["results"] == {"image_embedding": 12}
    bare = load(make_dataset(tmp_path / "bare", SIZES))
    assert belongs(read_clip_retrieval(bare, tmp_path / "out").metadata.compute(), vectors().astype("f4"))


@pytest.mark.parametrize("count", [9, 10, 12])
def test_numbers_are_padded_as_clip_inference_pads_them(tmp_path: Path, count: int) -> None:
    dataset = with_embeddings(tmp_path / "in", {f"s{number:02d}": 1 for number in range(count)})
    write_clip_retrieval(dataset, tmp_path / "out")
    digits = int(math.log10(count)) + 1
    wanted = [f"img_emb_{str(number).zfill(digits)}.npy" for number in range(count)]
    assert sorted(path.name for path in tmp_path.glob("out/img_emb/*")) == sorted(wanted)
    assert np.array_equal(read_written(tmp_path / "out")[0], vectors()[:count].astype("f4").astype("f2"))


def test_rows_without_an_embedding_are_left_out_and_counted(tmp_path: Path, scheduler: Any) -> None:
    dataset = with_embeddings(tmp_path / "in", lacking=[0, 3, 5, 6, 7, 8])
    totals = write_clip_retrieval(dataset, tmp_path / "out")
    matrix, rows = read_written(tmp_path / "out")
    assert rows["seed"].tolist() == [1, 2, 4, 9, 10, 11]
    assert np.array_equal(matrix, vectors()[rows["seed"]].astype("f4").astype("f2"))
    # An empty file would shift the back end's rows.
    assert sorted(path.name for path in tmp_path.glob("out/*/*_1.*")) == []
    assert (totals["rows_in"], totals["rows_out"], totals["losses"]) == (12, 6, {"without_embedding": 6})
    lines = [json.loads(line) for line in Path(totals["ledger"]).read_text().splitlines()]
    assert [(line["shard"], line["rows_out"], line["losses"]) for line in lines[:3]] == [
        ("a", 3, {"without_embedding": 2}),
        ("b", 0, {"without_embedding": 4}),
        ("c", 3, {}),
    ]


def test_text_embeddings_stay_in_step(tmp_path: Path) -> None:
    dataset = with_embeddings(tmp_path / "in", lacking=[10])
    totals = write_clip_retrieval(
        dataset, tmp_path / "out", text_embedding_column="text_embedding", columns=["score"], dtype="float32"
    )
    matrix, rows = read_written(tmp_path / "out")
    seeds = [0, 2, 3, 4, 5, 6, 7, 8, 9, 11]
    assert list(rows) == ["image_path", "caption", "score", "shard"]
    assert rows["image_path"].tolist() == [key(seed) for seed in seeds]
    assert np.array_equal(matrix, vectors()[seeds].astype("f4"))
    text = np.concatenate([np.load(path) for path in sorted(tmp_path.glob("out/text_emb/*"))])
    assert text.tolist() == [[seed, -seed] for seed in seeds]
    assert totals["losses"] == {"without_embedding": 2}


def test_changed_frames_are_written_in_the_sources_order(tmp_path: Path, scheduler: Any) -> None:
    dataset = with_embeddings(tmp_path / "in")
    metadata = dataset.metadata[dataset.metadata["seed"] != 2].shuffle("seed", npartitions=2)
    dataset.metadata = metadata
    totals = write_clip_retrieval(dataset, tmp_path / "out")
    matrix, rows = read_written(tmp_path / "out")
    assert rows["seed"].tolist() == [seed for seed in range(12) if seed != 2]
    assert np.array_equal(matrix, vectors()[rows["seed"]].astype("f4").astype("f2"))
    assert (totals["rows_in"], totals["rows_filtered"], totals["rows_out"]) == (12, 1, 11)
    only = with_embeddings(tmp_path / "in")
    only.metadata = only.metadata.get_partition(1)
    totals = write_clip_retrieval(only, tmp_path / "only")
    assert (totals["rows_in"], totals["rows_filtered"], totals["rows_out"]) == (12, 8, 4)


def test_a_folder_of_our_own_tells_shards_of_equal_ids_apart(tmp_path: Path, scheduler: Any) -> None:
    dataset = repeated_keys(tmp_path / "in")
    ids = {"image_path": lambda seed: f"{seed % 3:06d}", "shard": lambda seed: "y" if seed > 2 else "x"}
    folder = write_folder(tmp_path / "foreign", [[0, 1, 2], [3, 4, 5]], ids=ids)
    with pytest.raises(IdMismatchError, match=r"ids may mean several rows.*, and in the dataset in x and y:"):
        # A foreign folder's `shard` is whatever it is.
        read_clip_retrieval(dataset, folder).metadata.compute()
    for name in ("x", "y"):
        path = tmp_path / "in" / f"{name}.parquet"
        table = pq.read_table(path)
        image = [None if seed == 4 else vectors()[seed] for seed in table["seed"].to_pylist()]
        pq.write_table(table.append_column("image_embedding", pa.array(image, pa.list_(pa.float32()))), path)
    write_clip_retrieval(load(tmp_path / "in"), tmp_path / "out")
    frame = read_clip_retrieval(dataset, tmp_path / "out").metadata.compute()
    assert belongs(frame, masked(vectors().astype("f4"), [[0, 1, 2, 3, 5]]))


def test_a_rerun_gives_the_same_bytes_and_removes_what_is_left_over(tmp_path: Path) -> None:
    dataset = with_embeddings(tmp_path / "in", lacking=[5, 6, 7, 8])
    write_clip_retrieval(dataset, tmp_path / "out")
    files = {path: path.read_bytes() for path in tmp_path.glob("out/*_emb/*")}
    files |= {path: path.read_bytes() for path in tmp_path.glob("out/metadata/*")}
    # As if an earlier run had been killed, and had found embeddings in shard b.
    for path in files:
        if path.stem.endswith("_2"):
            path.unlink()
    np.save(tmp_path / "out/img_emb/img_emb_1.npy", np.zeros((4, 6)))
    (tmp_path / f"out/img_emb/.nemo-image-tmp-{'0' * 32}-img_emb_2.npy").write_bytes(b"half")
    write_clip_retrieval(dataset, tmp_path / "out")
    there = [*tmp_path.glob("out/*_emb/*"), *tmp_path.glob("out/metadata/*")]
    assert {path: path.read_bytes() for path in there} == files


@pytest.mark.filterwarnings("ignore:.*is a random network.*")
def test_embeddings_still_to_compute_are_computed_once(tmp_path: Path) -> None:
    from nemo_image.embedders import TimmImageEmbedder

    dataset = TimmImageEmbedder(TINY_MODEL, autocast=False)(load(make_dataset(tmp_path / "in", {"a": 2, "b": 1})))
    totals = write_clip_retrieval(dataset, tmp_path / "out")
    matrix, _ = read_written(tmp_path / "out")
    done = dataset.materialize()
    assert done.run_totals is not None
    assert done.run_totals["shards"]["skipped"] == 2
    wanted = np.stack(done.metadata.compute()["image_embedding"].tolist())
    assert np.array_equal(matrix, wanted.astype("f2"))
    assert totals["made_by"]["image_embedding"]["model"] == TINY_MODEL


def test_folders_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    dataset = with_embeddings(tmp_path / "in")
    with pytest.raises(DatasetError, match=r"in holds something else \(a\.parquet"):
        write_clip_retrieval(dataset, tmp_path / "in")
    with pytest.raises(DatasetError, match="holds something else"):
        write_clip_retrieval(dataset, write_folder(tmp_path / "clip"))
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DatasetError, match="holds something else"):
        write_clip_retrieval(dataset, tmp_path / "file")
    write_clip_retrieval(dataset, tmp_path / "out")
    with pytest.raises(DatasetError, match="other rows or settings"):
        write_clip_retrieval(dataset, tmp_path / "out", dtype="float32")
    dataset.metadata = dataset.metadata[dataset.metadata["seed"] > 3]
    with pytest.raises(DatasetError, match="other rows or settings"):
        write_clip_retrieval(dataset, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"dtype": "float64"}, ArgumentError, "dtype must be"),
        ({"columns": "score"}, ArgumentError, r"\['score'\]"),
        ({"columns": ["nothing"]}, MissingColumnError, "'nothing'"),
        ({"columns": ["image_path"]}, ArgumentError, "holds the id, 'key'"),
        ({"image_embedding_column": "score"}, EmbeddingError, "'score' holds double"),
        ({"text_embedding_column": "nothing"}, MissingColumnError, "'nothing'"),
        ({"text_embedding_column": "image_embedding"}, ArgumentError, "name two columns"),
    ],
)
def test_arguments(tmp_path: Path, options: Any, error: type[NemoImageError], said: str) -> None:
    dataset = with_embeddings(tmp_path / "in")
    dataset.metadata["image_path"] = "mine"
    with pytest.raises(error, match=said):
        write_clip_retrieval(dataset, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_ids_become_text_and_take_the_place_of_a_users_image_path(tmp_path: Path) -> None:
    with_embeddings(tmp_path / "in")
    dataset = load(tmp_path / "in", id_col="seed")
    dataset.metadata["image_path"] = "mine"
    write_clip_retrieval(dataset, tmp_path / "out")
    assert read_written(tmp_path / "out")[1]["image_path"].tolist() == [str(seed) for seed in range(12)]
    frame = read_clip_retrieval(load(tmp_path / "in", id_col="seed"), tmp_path / "out").metadata.compute()
    assert belongs(frame, vectors().astype("f4"))


def rewrite(path: Path, embeddings: Sequence[Any]) -> None:
    table = pq.read_table(path)
    column = pa.array(embeddings, pa.list_(pa.float32()))
    pq.write_table(table.set_column(table.column_names.index("image_embedding"), "image_embedding", column), path)


def test_shards_that_cannot_be_written_fail_alone(tmp_path: Path) -> None:
    dataset = with_embeddings(tmp_path / "in")
    rewrite(tmp_path / "in" / "b.parquet", [[1e6, 0, 0, 0, 0, 0]] * 4)
    with pytest.raises(RunError, match="too large for float16: write dtype='float32'") as caught:
        write_clip_retrieval(dataset, tmp_path / "out")
    assert list(caught.value.failures) == ["b"]
    assert read_written(tmp_path / "out")[1]["shard"].unique().tolist() == ["a", "c"]
    write_clip_retrieval(dataset, tmp_path / "wide", dtype="float32")
    assert read_written(tmp_path / "wide")[0][5, 0] == 1e6


def test_sizes_that_differ_and_nothing_to_write(tmp_path: Path) -> None:
    dataset = with_embeddings(tmp_path / "in")
    rewrite(tmp_path / "in" / "b.parquet", [[1, 2]] * 4)
    with pytest.raises(EmbeddingError, match="2 numbers in b, 6 numbers in"):
        write_clip_retrieval(dataset, tmp_path / "out")
    none = with_embeddings(tmp_path / "none", lacking=range(12))
    with pytest.raises(DatasetError, match="no row has a value in image_embedding"):
        write_clip_retrieval(none, tmp_path / "empty")


def test_ids_that_repeat_within_a_shard_are_not_written(tmp_path: Path) -> None:
    dataset = with_embeddings(tmp_path / "in")
    dataset.metadata = dataset.metadata.assign(key=dataset.metadata["key"].where(dataset.metadata["seed"] != 6, key(7)))
    with pytest.raises(RunError, match=r"b: the frame's rows of shard b: 1 ids stand more than once") as caught:
        write_clip_retrieval(dataset, tmp_path / "out")
    assert list(caught.value.failures) == ["b"]
