"""Semantic deduplication of datasets, against a brute force that shares no code with it."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pytest

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.dedup import DedupResult, SemanticDedup, kept_fraction
from nemo_image.dedup.clusters.settle import Settling
from nemo_image.dedup.exchange.rows import row_hashes
from nemo_image.errors import (
    ArgumentError,
    DatasetError,
    EmbeddingError,
    MissingColumnError,
    NemoImageError,
    RunError,
)
from tests.dedup.makers import clustered_vectors, computed, write_embeddings
from tests.dedup.oracle import all_pairs, expected, wrong_clusters

VERDICT = ["max_similarity", "duplicate_of", "duplicate_of_shard", "is_duplicate"]
ORDERS: list[Any] = ["hard", "easy", "random", ("score", False), ("score", True)]
ROWS = 600


def rank(seed: int, shard: str, name: Any) -> int:
    return int(row_hashes([shard], [name], seed)[0])


def oracle_frame(found: pd.DataFrame) -> pd.DataFrame:
    return found.rename(columns={"key": "id", "image_embedding": "embedding"})


def assert_as_brute_force(found: pd.DataFrame, eps: float, order: Any, representative: bool) -> None:
    wanted = expected(oracle_frame(found), eps, order, representative, 1234, rank)
    np.testing.assert_array_equal(found["is_duplicate"].to_numpy(bool), wanted["is_duplicate"].to_numpy(bool))
    np.testing.assert_array_equal(found["max_similarity"].to_numpy(np.float32), wanted["max_similarity"].to_numpy())
    for name in ("duplicate_of", "duplicate_of_shard"):
        ours = [None if pd.isna(value) else value for value in found[name]]
        assert ours == wanted[name].tolist(), name
    assert found["is_duplicate"].any(), "a case without duplicates shows nothing"


@pytest.fixture(scope="module")
def vectors() -> Any:
    return clustered_vectors(ROWS, 24, 40, 0.5)


@pytest.fixture(scope="module")
def scores() -> list[float | None]:
    rng = np.random.default_rng(5)
    values = rng.integers(0, 6, ROWS).astype(float)  # many ties
    return [None if row % 17 == 0 else float(values[row]) for row in range(ROWS)]


@pytest.fixture
def dataset(tmp_path: Path, vectors: Any, scores: Any) -> ImageTextPairDataset:
    return write_embeddings(tmp_path / "data", vectors, 4, score=scores)


@pytest.fixture
def loose(tmp_path: Path) -> ImageTextPairDataset:
    """Rows whose neighbours lie in other clusters too."""
    return write_embeddings(tmp_path / "loose", clustered_vectors(ROWS, 6, 4, 0.7, seed=3), 4)


# Equality with brute force --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("representative", [True, False])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_finds_what_brute_force_finds(dataset: ImageTextPairDataset, order: Any, representative: bool) -> None:
    dedup = SemanticDedup(n_clusters=6, eps=0.02, which_to_keep=order, representative=representative)

    found = computed(dedup(dataset))

    assert_as_brute_force(found, 0.02, order, representative)
    result = dedup.result_
    assert result is not None
    assert wrong_clusters(oracle_frame(found), np.load(Path(result.folder) / "kmeans_centroids.npy")) == {}
    assert (result.kept, result.removed) == ((~found["is_duplicate"]).sum(), found["is_duplicate"].sum())
    assert set(found.loc[found["is_duplicate"], "duplicate_tier"]) == {"semantic"}
    kept = found[~found["is_duplicate"]]
    assert kept[["duplicate_tier", "duplicate_of", "duplicate_of_shard"]].isna().to_numpy().all()


def test_every_removed_row_has_a_kept_twin_only_if_representative(dataset: ImageTextPairDataset) -> None:
    orphans = {}
    for representative in (True, False):
        found = computed(SemanticDedup(n_clusters=1, eps=0.1, representative=representative)(dataset))
        kept = set(found.loc[~found["is_duplicate"], "key"])
        orphans[representative] = (~found.loc[found["is_duplicate"], "duplicate_of"].isin(kept)).sum()
    assert orphans[True] == 0
    assert orphans[False] > 0


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_partitions_workers_and_blocks_change_nothing(
    dataset: ImageTextPairDataset, order: Any, scheduler: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = computed(SemanticDedup(n_clusters=5, eps=0.02, which_to_keep=order)(dataset))
    if scheduler is None:
        # Many small run files and buckets, instead of one.
        monkeypatch.setattr("nemo_image.dedup.clusters.clustering.BUCKET_BYTES", 5000)
        monkeypatch.setattr("nemo_image.dedup.exchange.scatter.RUN_BYTES", 5000)
        monkeypatch.setattr("nemo_image.dedup.exchange.gather.RANGE_ROWS", 100)
        monkeypatch.setattr("nemo_image.dedup.clusters.bucket.MEMORY_BYTES", 3000)
    for partitions in (1, 7):
        dataset.metadata = dataset.metadata.repartition(npartitions=partitions)
        dedup = SemanticDedup(n_clusters=5, eps=0.02, which_to_keep=order, batch_size=37)
        dedup.output_dir = str(tmp_path / f"out-{partitions}")
        again = computed(dedup(dataset))
        pd.testing.assert_frame_equal(again[first.columns], first)


def test_other_shards_give_the_same_for_unique_ids(tmp_path: Path, vectors: Any) -> None:
    rng = np.random.default_rng(9)
    found = []
    for shards in (1, 16):
        order = rng.permutation(ROWS)
        dataset = write_embeddings(tmp_path / str(shards), vectors, shards, order=order)
        # The sample is chosen by shard and id: given centroids keep the clusters as they are.
        dedup = SemanticDedup(eps=0.02, centroids=vectors[:7])
        found.append(computed(dedup(dataset)).drop(columns=["shard", "duplicate_of_shard", "image_embedding"]))
    pd.testing.assert_frame_equal(*found)


@pytest.mark.parametrize("ids", [range(1000, 1000 + ROWS), [f"id-{(row * 7919) % ROWS}" for row in range(ROWS)]])
def test_ids_may_be_numbers_or_text(tmp_path: Path, vectors: Any, ids: Any) -> None:
    found = computed(SemanticDedup(n_clusters=3, eps=0.02)(write_embeddings(tmp_path, vectors, 3, ids)))

    assert_as_brute_force(found, 0.02, "hard", True)
    assert found["duplicate_of"].dtype == found["key"].dtype


def test_ids_may_repeat_in_other_shards(tmp_path: Path, vectors: Any) -> None:
    ids = [row % 200 for row in range(ROWS)]

    found = computed(SemanticDedup(n_clusters=2, eps=0.02)(write_embeddings(tmp_path, vectors, 3, ids)))

    assert_as_brute_force(found, 0.02, "hard", True)
    assert (found["duplicate_of_shard"].dropna() != found.loc[found["is_duplicate"], "shard"]).any()


def test_another_column_may_name_the_rows(tmp_path: Path, vectors: Any) -> None:
    names = [f"https://example.org/{row}" for row in range(ROWS)]
    dataset = write_embeddings(tmp_path, vectors, 2, url=names)

    found = computed(SemanticDedup(n_clusters=2, eps=0.02, id_column="url")(dataset))

    assert_as_brute_force(found.assign(key=found["url"]), 0.02, "hard", True)
    assert found["duplicate_of"].dropna().str.startswith("https://").all()


# Thresholds -----------------------------------------------------------------------------------------------------------


def test_exact_copies_fall_at_eps_zero(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(100, 300)).astype(np.float32)
    vectors[60:] = vectors[:40]

    found = computed(SemanticDedup(n_clusters=3, eps=0.0)(write_embeddings(tmp_path, vectors)))

    assert found["is_duplicate"].sum() == 40
    assert (found.loc[found["is_duplicate"], "max_similarity"] == 1).all()


def test_the_curve_is_what_runs_give(dataset: ImageTextPairDataset) -> None:
    points = [0.0, 0.01, 0.05, 0.3, 1.0]
    for representative in (True, False):
        how = SemanticDedup(n_clusters=4, representative=representative)
        curve = kept_fraction(dataset, points, how)
        assert curve["eps"].tolist() == points
        for row in curve.itertuples():
            found = computed(SemanticDedup(n_clusters=4, eps=row.eps, representative=representative)(dataset))
            assert (row.kept, row.total) == ((~found["is_duplicate"]).sum(), ROWS)
            assert row.kept_fraction == row.kept / ROWS


@pytest.mark.parametrize("target", [0.3, 0.62, 0.8])
@pytest.mark.parametrize("representative", [True, False])
def test_a_target_chooses_eps(dataset: ImageTextPairDataset, target: float, representative: bool) -> None:
    dedup = SemanticDedup(n_clusters=2, target_keep=target, representative=representative)

    found = computed(dedup(dataset))

    kept = (~found["is_duplicate"]).mean()
    assert abs(kept - target) < 0.02
    assert dedup.result_ is not None
    assert_as_brute_force(found, dedup.result_.sweep[0].eps, "hard", representative)


def test_a_scale_that_is_not_known_shows_the_curve(
    dataset: ImageTextPairDataset, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nemo_image"):
        dedup = SemanticDedup(n_clusters=2, eps=0.02)
        dedup(dataset)

    assert "scale of 'image_embedding' is not known" in caplog.text
    curve = kept_fraction(dataset, [0.34], SemanticDedup(n_clusters=2)).iloc[0]
    assert f"({curve.kept:,.0f} of {ROWS:,})" in caplog.text


@pytest.mark.in_process("watches or changes this process")
def test_the_curve_may_be_of_some_clusters(
    dataset: ImageTextPairDataset, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_image.dedup.semantic_run.CURVE_ROWS", 250)
    found = computed(SemanticDedup(n_clusters=6, eps=0.34)(dataset))
    some = found[found["cluster"].isin([0, 3])]
    assert f"({(~some['is_duplicate']).sum()} of {len(some)})" in caplog.text
    caplog.clear()
    monkeypatch.setattr("nemo_image.dedup.clusters.solve.SAMPLED_CLUSTER_ROWS", 5)
    SemanticDedup(n_clusters=6, eps=0.33)(dataset)
    assert "none is small enough to sample" in caplog.text


# Files ----------------------------------------------------------------------------------------------------------------


def test_writes_ids_and_summary(dataset: ImageTextPairDataset, tmp_path: Path) -> None:
    dedup = SemanticDedup(n_clusters=4, eps=0.02, output_dir=tmp_path / "out")

    found = computed(dedup(dataset))

    removed = pyarrow.dataset.dataset(tmp_path / "out" / "duplicate_ids.parquet").to_table().to_pandas()
    wanted = found.loc[found["is_duplicate"], ["shard", "key", "duplicate_of", "duplicate_of_shard"]]
    ours = set(removed.astype(str)[list(wanted.columns)].itertuples(index=False, name=None))
    assert ours == set(wanted.astype(str).itertuples(index=False, name=None))
    with open(tmp_path / "out" / "dedup_summary.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"eps": "0.02", "kept": str(ROWS - len(wanted)), "removed": str(len(wanted)), "total": str(ROWS)}
    assert not list(dataset_files(dataset, "clusters-*")), "the rows by cluster are left"
    assert DedupResult.read(str(tmp_path / "out")) == dedup.result_


def dataset_files(dataset: ImageTextPairDataset, pattern: str) -> Any:
    return (Path(dataset.path) / "_nemo_image").glob(pattern)


def test_a_second_call_computes_nothing(dataset: ImageTextPairDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    first = computed(SemanticDedup(n_clusters=4, eps=0.02)(dataset))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr("nemo_image.dedup.semantic_run.cluster", refuse)
    again = computed(SemanticDedup(n_clusters=4, eps=0.02)(dataset))

    pd.testing.assert_frame_equal(again, first)
    with pytest.raises(AssertionError, match="computed again"):
        SemanticDedup(n_clusters=4, eps=0.03)(dataset)


def test_columns_are_saved_and_export_leaves_copies_out(dataset: ImageTextPairDataset, tmp_path: Path) -> None:
    found = SemanticDedup(n_clusters=4, eps=0.02)(dataset)

    saved = found.save_metadata(tmp_path / "saved")

    pd.testing.assert_frame_equal(computed(saved)[VERDICT], computed(found)[VERDICT])
    assert saved.provenance["is_duplicate"]["operator"] == "SemanticDedup"
    assert found.metadata[~found.metadata["is_duplicate"]].compute()["is_duplicate"].eq(False).all()


def test_an_interrupted_run_is_taken_up(
    dataset: ImageTextPairDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = computed(SemanticDedup(n_clusters=4, eps=0.02)(dataset))
    out = tmp_path / "out"
    for step in ("_fit", "scatter"):
        with monkeypatch.context() as patch:
            patch.setattr(f"nemo_image.dedup.clusters.clustering.{step}", interrupt)
            with pytest.raises(KeyboardInterrupt):
                SemanticDedup(n_clusters=4, eps=0.02, output_dir=out)(dataset)
    for step in ("run_all", "gather"):
        with monkeypatch.context() as patch:
            patch.setattr(f"nemo_image.dedup.semantic_run.{step}", interrupt)
            with pytest.raises(KeyboardInterrupt):
                SemanticDedup(n_clusters=4, eps=0.02, output_dir=out)(dataset)
    with pytest.raises(DatasetError, match="no finished deduplication"):
        DedupResult.read(str(out))

    pd.testing.assert_frame_equal(computed(SemanticDedup(n_clusters=4, eps=0.02, output_dir=out)(dataset)), clean)


def interrupt(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


# What was missed ------------------------------------------------------------------------------------------------------


def test_estimate_of_what_was_missed(loose: ImageTextPairDataset) -> None:
    """With fewer rows than the sample has, the estimate is the truth."""
    dedup = SemanticDedup(n_clusters=12, eps=0.1)
    found = computed(dedup(loose))

    assert dedup.result_ is not None
    missed = dedup.result_.missed
    assert missed is not None
    pairs = all_pairs(oracle_frame(found), 0.1)
    cluster = dict(zip(zip(found["shard"], found["key"], strict=True), found["cluster"], strict=True))
    compared = {pair for pair in pairs if len({cluster[row] for row in pair}) == 1}
    assert (missed.sampled, missed.pairs, missed.pairs_compared) == (ROWS, 2 * len(pairs), 2 * len(compared))
    assert missed.rows == len({row for pair in pairs for row in pair})
    assert missed.rows_compared == len({row for pair in compared for row in pair})
    assert 0 < len(compared) < len(pairs)
    assert f"{missed.pair_recall:.1%}" in str(dedup.result_)


def test_the_sample_is_the_first_rows_by_hash(loose: ImageTextPairDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer rows than there are: those with the smallest hashes, whatever the shards."""
    for name in ("sample.FIRST_ROWS", "missed.SAMPLED_ROWS"):
        monkeypatch.setattr(f"nemo_image.dedup.clusters.{name}", 50)
    monkeypatch.setattr("nemo_image.dedup.semantic_run.SAMPLED_ROWS", 50)
    dedup = SemanticDedup(n_clusters=12, eps=0.1)
    found = computed(dedup(loose))

    choice = row_hashes(found["shard"].tolist(), found["key"].tolist(), 1234 ^ 0x5EED)
    sampled = set(found.loc[np.argsort(choice)[:50], "key"])
    pairs = [{name for _, name in pair} for pair in all_pairs(oracle_frame(found), 0.1)]
    assert dedup.result_ is not None
    assert dedup.result_.missed is not None
    assert dedup.result_.missed.sampled == 50
    assert dedup.result_.missed.pairs == sum(len(pair & sampled) for pair in pairs) > 0


@pytest.mark.parametrize("representative", [True, False])
def test_probing_more_clusters_misses_less(loose: ImageTextPairDataset, representative: bool) -> None:
    recall, removed = [], []
    for n_probe in (1, 2, 12):
        dedup = SemanticDedup(n_clusters=12, eps=0.1, n_probe=n_probe, representative=representative)
        found = computed(dedup(loose))
        assert dedup.result_ is not None
        assert dedup.result_.missed is not None
        recall.append(dedup.result_.missed.pair_recall)
        removed.append(int(found["is_duplicate"].sum()))
        assert dedup.result_.removed == removed[-1]
        assert_consistent(found, 0.1, representative)
    assert recall[0] < recall[1] < recall[2] == 1  # type: ignore[operator]
    assert removed[0] < removed[1] <= removed[2]
    if not representative:
        # All clusters compared with all: as one cluster, in the same order.
        whole = expected(oracle_frame(found).assign(cluster=0), 0.1, "hard", representative)
        np.testing.assert_array_equal(found["is_duplicate"].to_numpy(bool), whole["is_duplicate"].to_numpy(bool))
        np.testing.assert_array_equal(found["max_similarity"].to_numpy(np.float32), whole["max_similarity"].to_numpy())


def test_a_row_that_became_a_twin_stays() -> None:
    """1 falls to 9, and 5, which fell to 1, gets 3 for a twin: so 3, which is like 9 too, must stay."""
    home = {1: (False, -1), 3: (False, -1), 5: (True, 1), 7: (False, -1)}
    settling = Settling(home, cross={1: 9, 3: 9, 5: 3, 7: 1}, dependants={1: [5]})
    settling.run([1, 3, 5, 7])
    assert settling.fallen == {1}  # and 7 stays too: its twin fell


def test_a_row_with_a_dependant_that_has_no_other_twin_stays() -> None:
    settling = Settling({1: (False, -1)}, cross={1: 9}, dependants={1: [5]})
    settling.run([1])
    assert settling.fallen == set()


def assert_consistent(found: pd.DataFrame, eps: float, representative: bool) -> None:
    """Every removed row's twin is there, as similar as is said, and kept where that is promised."""
    by_name = {(row.shard, row.key): row for row in found.itertuples()}
    for row in found.itertuples():
        assert bool(row.is_duplicate) == (row.max_similarity >= 1 - eps)
        if not row.is_duplicate:
            continue
        twin = by_name[(row.duplicate_of_shard, row.duplicate_of)]
        a, b = (np.asarray(one.image_embedding, np.float64) for one in (row, twin))
        assert np.float32(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) == pytest.approx(row.max_similarity, abs=1e-7)
        assert not (representative and twin.is_duplicate)


# Against an earlier result --------------------------------------------------------------------------------------------


def test_new_shards_against_old_survivors_equal_one_run(tmp_path: Path, vectors: Any) -> None:
    day = [row // 60 for row in range(ROWS)]  # the order of arrival: shard by shard
    whole = write_embeddings(tmp_path / "all", vectors, 10, day=day)
    settings: dict[str, Any] = {"eps": 0.05, "which_to_keep": ("day", True)}
    centroids = vectors[:5]
    at_once = computed(SemanticDedup(centroids=centroids, **settings)(whole))

    tars = [f"{tmp_path}/all/{number:05d}.tar" for number in range(10)]
    old, new, last = (ImageTextPairDataset.from_webdataset(part) for part in (tars[:6], tars[6:8], tars[8:]))
    out = [str(tmp_path / name) for name in ("old", "new", "last")]
    found = [SemanticDedup(centroids=centroids, output_dir=out[0], **settings)(old)]
    found.append(SemanticDedup(against=out[0], output_dir=out[1], **settings)(new))
    found.append(SemanticDedup(against=DedupResult.read(out[1]), output_dir=out[2], **settings)(last))

    in_steps = pd.concat([computed(part) for part in found]).sort_values("key").reset_index(drop=True)
    pd.testing.assert_frame_equal(in_steps[at_once.columns], at_once)
    assert in_steps.loc[in_steps["day"] >= 6, "duplicate_of_shard"].dropna().lt("00006").any()


def angles(*degrees: float) -> Any:
    return np.array([[np.cos(np.radians(one)), np.sin(np.radians(one))] for one in degrees], np.float32)


def test_old_rows_stay_whatever_eps_is_now(tmp_path: Path) -> None:
    old = write_embeddings(tmp_path / "old", angles(0, 15), 1, ["a", "b"])
    new = write_embeddings(tmp_path / "new", angles(30), 1, ["c"], first=1)
    SemanticDedup(n_clusters=1, eps=0.001, output_dir=tmp_path / "out")(old)
    # cos 15 degrees = 0.966: at this eps b would fall to a, and c would be left without a twin.
    found = computed(SemanticDedup(eps=0.04, against=str(tmp_path / "out"))(new))
    assert found["duplicate_of"].tolist() == ["b"]


def test_of_equally_near_old_rows_the_older_is_the_twin(tmp_path: Path) -> None:
    """Also if, in its own run, more rows were judged before it."""
    order: Any = ("key", True)
    steps = [[*[180.0] * 9, 0.0], [60.0], [30.0]]
    folder = None
    for number, degrees in enumerate(steps):
        names = [f"{number}-{row}" for row in range(len(degrees))]
        dataset = write_embeddings(tmp_path / str(number), angles(*degrees), 1, names, first=number)
        given: dict[str, Any] = {"against": folder} if folder else {"n_clusters": 1}
        folder = str(tmp_path / f"out-{number}")
        found = computed(SemanticDedup(eps=0.2, which_to_keep=order, output_dir=folder, **given)(dataset))
    assert found["duplicate_of"].tolist() == ["0-9"]
    assert found["max_similarity"].tolist() == pytest.approx([np.cos(np.radians(30))])


def test_rows_of_another_folder_are_named_by_it(tmp_path: Path, vectors: Any) -> None:
    old = write_embeddings(tmp_path / "old", vectors[:300], 2)
    new = write_embeddings(tmp_path / "new", vectors[:300], 2)
    SemanticDedup(n_clusters=2, eps=0.0, output_dir=tmp_path / "out")(old)

    found = computed(SemanticDedup(eps=0.0, against=str(tmp_path / "out"))(new))

    assert found["is_duplicate"].all()
    assert set(found["duplicate_of_shard"]) == {f"{tmp_path}/old/00000", f"{tmp_path}/old/00001"}


def test_unusable_earlier_results_are_named(dataset: ImageTextPairDataset, tmp_path: Path, vectors: Any) -> None:
    out = str(tmp_path / "out")
    SemanticDedup(n_clusters=2, output_dir=out)(dataset)
    with pytest.raises(ArgumentError, match="4 shards of this dataset were judged in"):
        SemanticDedup(against=out)(dataset)
    with pytest.raises(ArgumentError, match="no finished deduplication"):
        SemanticDedup(against=str(tmp_path / "nothing"))(dataset)
    numbers = write_embeddings(tmp_path / "numbers", vectors, 2, range(ROWS), first=50)
    with pytest.raises(ArgumentError, match="ids are string"):
        SemanticDedup(against=out)(numbers)
    with pytest.raises(ArgumentError, match="leave out centroids"):
        SemanticDedup(against=out, centroids=vectors[:2])
    short = write_embeddings(tmp_path / "short", vectors[:, :8], 2, first=60)
    with pytest.raises(NemoImageError, match=r"8 numbers, 24 are needed"):
        SemanticDedup(against=out)(short)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"eps": 1.5}, r"eps must lie in \[0, 1\], not 1.5"),
        ({"eps": -0.1}, "eps must lie"),
        ({"eps": float("nan")}, "eps must lie"),
        ({"target_keep": 0}, "target_keep must lie"),
        ({"n_clusters": 0}, "n_clusters must be a whole number"),
        ({"n_clusters": 2.5}, "n_clusters must be a whole number"),
        ({"which_to_keep": "best"}, "which_to_keep must be 'hard', 'easy', 'random', or"),
        ({"which_to_keep": ("score", "up")}, "which_to_keep"),
        ({"n_probe": 0}, "n_probe"),
        ({"batch_size": 0}, "batch_size"),
        ({"random_state": -1}, "random_state"),
        ({"random_state": 2**32}, "random_state"),
        ({"fit_rows": 0}, "fit_rows"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        SemanticDedup(**arguments)


def test_columns_that_are_not_there(dataset: ImageTextPairDataset) -> None:
    with pytest.raises(MissingColumnError, match="no column 'clip'; it has"):
        SemanticDedup(embedding_column="clip")(dataset)
    with pytest.raises(MissingColumnError, match="no column 'beauty'"):
        SemanticDedup(which_to_keep=("beauty", False))(dataset)
    with pytest.raises(ArgumentError, match="'score' holds double"):
        SemanticDedup(embedding_column="score")(dataset)
    with pytest.raises(ArgumentError, match="'image_embedding' holds list"):
        SemanticDedup(which_to_keep=("image_embedding", False))(dataset)


def test_more_clusters_than_rows(dataset: ImageTextPairDataset) -> None:
    with pytest.raises(ArgumentError, match="n_clusters=601 is more than the 600 rows"):
        SemanticDedup(n_clusters=601)(dataset)


def test_as_many_clusters_as_rows(tmp_path: Path) -> None:
    vectors = np.eye(12, dtype=np.float32)
    found = computed(SemanticDedup(n_clusters=12)(write_embeddings(tmp_path, vectors)))
    assert found["cluster"].nunique() == 12
    assert not found["is_duplicate"].any()


def test_one_row(tmp_path: Path) -> None:
    found = computed(SemanticDedup()(write_embeddings(tmp_path, [[1.0, 2.0]], 1)))
    assert found["is_duplicate"].tolist() == [False]
    assert found["max_similarity"].tolist() == [0.0]


def test_all_rows_equal_and_clusters_empty(tmp_path: Path) -> None:
    vectors = np.ones((50, 8), np.float32)
    dedup = SemanticDedup(n_clusters=5, eps=0.0)
    found = computed(dedup(write_embeddings(tmp_path, vectors)))
    assert found["is_duplicate"].sum() == 49
    assert found.loc[~found["is_duplicate"], "key"].tolist() == ["000000"]
    assert set(found["duplicate_of"].dropna()) == {"000000"}


def test_empty_partitions(dataset: ImageTextPairDataset) -> None:
    dataset.metadata = dataset.metadata[dataset.metadata["key"] < "000200"]
    found = computed(SemanticDedup(n_clusters=2, eps=0.02)(dataset))
    assert len(found) == 200
    assert_as_brute_force(found, 0.02, "hard", True)


def test_unusable_vectors_are_image_errors(tmp_path: Path, vectors: Any) -> None:
    rows: list[Any] = [row.copy() for row in vectors[:200]]
    rows[3][:] = 0
    rows[50][2] = np.nan
    rows[120][0] = np.inf
    rows[7] = None
    dedup = SemanticDedup(n_clusters=2, eps=0.02)

    found = computed(dedup(write_embeddings(tmp_path, rows)))

    bad = found.iloc[[3, 50, 120]]
    assert bad["image_error"].tolist() == [
        f"embedding: image_embedding is a vector of norm {norm}" for norm in ("0.0", "nan", "inf")
    ]
    assert found.iloc[[3, 7, 50, 120]][["is_duplicate", "max_similarity", "cluster"]].isna().to_numpy().all()
    assert found["image_error"].notna().sum() == 3
    assert dedup.result_ is not None
    assert (dedup.result_.bad_value, dedup.result_.without_value, dedup.result_.rows) == (3, 1, 200)
    good = found.drop(index=[3, 7, 50, 120]).reset_index(drop=True)
    assert_as_brute_force(good, 0.02, "hard", True)


def test_no_usable_vector_at_all(tmp_path: Path) -> None:
    with pytest.raises(EmbeddingError, match="'image_embedding' holds no usable embedding"):
        SemanticDedup()(write_embeddings(tmp_path, np.zeros((9, 4), np.float32)))


def test_embeddings_of_different_lengths(tmp_path: Path) -> None:
    write_embeddings(tmp_path, np.ones((4, 3), np.float32), 1)
    write_embeddings(tmp_path, np.ones((4, 5), np.float32), 1, [f"b{row}" for row in range(4)], first=1)
    with pytest.raises(EmbeddingError, match=r"3 numbers \(shard 00000\), 5 numbers \(shard 00001\)"):
        SemanticDedup()(ImageTextPairDataset.from_webdataset(str(tmp_path)))


def test_duplicate_and_missing_ids(tmp_path: Path, vectors: Any) -> None:
    doubled = [f"{row:03d}" for row in range(99)] + ["005"]
    with pytest.raises(NemoImageError, match=r"shard 00000, column 'key': 1 ids stand more than once, .*'005'"):
        SemanticDedup()(write_embeddings(tmp_path / "doubled", vectors[:100], 1, doubled))
    missing = [*range(99), None]
    with pytest.raises(NemoImageError, match="1 rows have no id"):
        SemanticDedup()(write_embeddings(tmp_path / "missing", vectors[:100], 1, missing))


def test_a_garbled_shard_is_named(dataset: ImageTextPairDataset) -> None:
    (Path(dataset.path) / "00002.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(NemoImageError, match=r"00002\.parquet"):
        SemanticDedup(n_clusters=2)(dataset)


def test_an_output_folder_with_something_else(dataset: ImageTextPairDataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(DatasetError, match=r"holds something else \(thesis.tex"):
        SemanticDedup(output_dir=out)(dataset)
    assert (out / "thesis.tex").read_text() == "years of work"
    used = tmp_path / "used"
    SemanticDedup(n_clusters=2, output_dir=used)(dataset)
    with pytest.raises(DatasetError, match="the result of another deduplication"):
        SemanticDedup(n_clusters=3, output_dir=used)(dataset)
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="is a file"):
        SemanticDedup(output_dir=tmp_path / "file")(dataset)


def test_a_target_out_of_reach_is_said(dataset: ImageTextPairDataset, caplog: pytest.LogCaptureFixture) -> None:
    found = computed(SemanticDedup(n_clusters=1, target_keep=0.99)(dataset))
    # Exact copies fall at any threshold.
    assert f"keeps {(~found['is_duplicate']).mean():.1%}" in caplog.text
    assert "target_keep=0.99 cannot be reached" in caplog.text


@pytest.mark.parametrize("centroids", [np.ones(3), np.full((2, 24), np.nan), np.array([["a"]]), "no/such/file.npy"])
def test_unusable_centroids(dataset: ImageTextPairDataset, centroids: Any) -> None:
    with pytest.raises((ArgumentError, RunError), match="centroids"):
        SemanticDedup(centroids=centroids)(dataset)


def test_centroids_from_a_file(dataset: ImageTextPairDataset, vectors: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "centroids.npy", vectors[:4])
    found = computed(SemanticDedup(centroids=str(tmp_path / "centroids.npy"), eps=0.02)(dataset))
    assert wrong_clusters(oracle_frame(found), vectors[:4]) == {}
    with pytest.raises(ArgumentError, match="n_clusters=9, but the centroids given are 4"):
        SemanticDedup(n_clusters=9, centroids=vectors[:4])(dataset)


# In a cascade ---------------------------------------------------------------------------------------------------------


def test_rows_that_enter_as_duplicates_are_passed_by(tmp_path: Path, vectors: Any) -> None:
    entered = [row % 5 == 0 for row in range(ROWS)]
    told = ["elsewhere" if one else None for one in entered]
    dataset = write_embeddings(
        tmp_path, vectors, 3, is_duplicate=entered, duplicate_of=told, duplicate_of_shard=told, duplicate_tier=told
    )
    dedup = SemanticDedup(n_clusters=3, eps=0.02)

    found = computed(dedup(dataset))

    passed = found[found["key"].astype(int) % 5 == 0]
    assert passed["is_duplicate"].all()
    assert (passed[["duplicate_of", "duplicate_of_shard", "duplicate_tier"]] == "elsewhere").to_numpy().all()
    assert passed[["cluster", "max_similarity"]].isna().to_numpy().all()
    judged = found[found["key"].astype(int) % 5 != 0].reset_index(drop=True)
    assert_as_brute_force(judged, 0.02, "hard", True)
    assert dedup.result_ is not None
    assert dedup.result_.passed_by == 120


def test_the_same_again_on_its_own_saved_result_changes_nothing(dataset: ImageTextPairDataset) -> None:
    saved = SemanticDedup(n_clusters=4, eps=0.02)(dataset).save_metadata()
    first = computed(saved)

    dedup = SemanticDedup(n_clusters=4, eps=0.02)
    again = computed(dedup(ImageTextPairDataset.from_webdataset(saved.path)))

    pd.testing.assert_frame_equal(again[first.columns], first)
    assert dedup.result_ is not None
    assert dedup.result_.passed_by == 0


def test_defaults_are_the_published_ones() -> None:
    dedup = SemanticDedup()
    assert (dedup.eps, dedup.which_to_keep, dedup.representative) == (0.01, "hard", True)
    assert (dedup.n_clusters, dedup.max_iter, dedup.random_state, dedup.n_probe) == (None, 100, 1234, 1)


def test_clusters_by_default(monkeypatch: pytest.MonkeyPatch, dataset: ImageTextPairDataset) -> None:
    monkeypatch.setattr("nemo_image.dedup.clusters.clustering.ROWS_A_CLUSTER", 250)
    dedup = SemanticDedup(eps=0.02)
    dedup(dataset)
    assert dedup.result_ is not None
    assert dedup.result_.n_clusters == 3  # ceil(600 / 250)


def test_hashes_choose_the_sample() -> None:
    """Pinned, so that a saved choice is found again: XXH3-64 of "shard NUL id" with the seed."""
    import xxhash

    hashes = row_hashes(["a/b", "c"], [7, "x"], 5)
    assert hashes.tolist() == [xxhash.xxh3_64_intdigest(b"a/b\x007", 5), xxhash.xxh3_64_intdigest(b"c\x00x", 5)]
    assert hashes.dtype == np.uint64
    assert pa.array(hashes).type == pa.uint64()
