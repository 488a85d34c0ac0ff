"""One pass over the metadata finds what sorting all of it would."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from nemo_image import schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.show import groups, picks
from nemo_image.datasets.show import survey as survey_module
from nemo_image.datasets.show.groups import GroupSizes
from nemo_image.datasets.show.pieces import duplicate_groups
from nemo_image.datasets.show.plan import plan_of
from nemo_image.datasets.show.survey import Survey, survey
from nemo_image.datasets.show.thumbnails import thumbnails
from tests.makers import make_dataset, write_rows

SIZES = {"a": 40, "b": 70, "c": 3}


def write_scores(folder: Path) -> pd.DataFrame:
    """Write three shards with scores that repeat, nulls, errors, clusters and copies; return all rows."""
    make_dataset(folder, SIZES)
    rng = np.random.default_rng(4)
    parts = []
    for name in SIZES:
        table = pd.read_parquet(folder / f"{name}.parquet")
        n = len(table)
        table["aesthetic_score"] = rng.integers(0, 40, n).astype(np.float32) / 4
        table.loc[rng.random(n) < 0.1, "aesthetic_score"] = None
        table["image_error"] = np.where(table["aesthetic_score"].isna(), "truncated: at byte 7", None)
        table["cluster"] = rng.integers(0, 5, n).astype(np.int32)
        table["is_duplicate"] = rng.random(n) < 0.4
        table["duplicate_of"] = np.where(table["is_duplicate"], rng.integers(0, 6, n).astype(str), None)
        table["duplicate_of"] = table["duplicate_of"].where(
            table["duplicate_of"].isna(), table["duplicate_of"].str.zfill(6)
        )
        table["duplicate_of_shard"] = np.where(table["is_duplicate"], "a", None)
        table["duplicate_tier"] = np.where(table["is_duplicate"], rng.choice(["exact", "semantic"], n), None)
        write_rows(folder / f"{name}.parquet", pa.Table.from_pandas(table, preserve_index=False))
        parts.append(table.assign(shard=name))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture
def rows(tmp_path: Path) -> pd.DataFrame:
    return write_scores(tmp_path)


def surveyed(dataset: ImageTextPairDataset, n: int = 4) -> Survey:
    plan = plan_of(dataset.metadata, dataset.id_col, {"aesthetic_score": [5.0]}, n)
    return survey(dataset.state, plan)


def values(rows: pd.DataFrame, names: Any) -> list[float]:
    scores = rows.set_index(["shard", "key"])["aesthetic_score"]
    return [float(scores[name.shard, name.id]) for name in names]


def test_it_finds_what_sorting_would(tmp_path: Path, rows: pd.DataFrame, scheduler: Any) -> None:
    found = surveyed(ImageTextPairDataset.from_webdataset(tmp_path))
    scores = rows["aesthetic_score"].dropna()
    assert found.rows == len(rows)
    assert found.not_below["aesthetic_score", 5.0] == (scores >= 5).sum()
    assert found.distributions["aesthetic_score"].nulls == rows["aesthetic_score"].isna().sum()
    assert found.reasons == {"truncated": rows["image_error"].notna().sum()}
    assert found.clusters == Counter(rows["cluster"].tolist())
    assert (found.duplicates, found.kept) == (rows["is_duplicate"].sum(), (~rows["is_duplicate"]).sum())
    assert found.tiers == Counter(rows["duplicate_tier"].dropna())
    assert sorted(found.groups.copies) == sorted(rows["duplicate_of"].value_counts())
    ordered = sorted(scores)
    assert values(rows, found.extremes("aesthetic_score", 4, greatest=False)) == ordered[:4]
    assert values(rows, found.extremes("aesthetic_score", 4, greatest=True)) == ordered[::-1][:4]
    below, above = found.around("aesthetic_score", 5.0, 4)
    assert values(rows, below) == sorted(scores[scores < 5])[::-1][:4]
    assert values(rows, above) == sorted(scores[scores >= 5])[:4]
    assert len(set(found.sample(20))) == 20
    assert len(found.with_reason("truncated", 3)) == 3


def test_partitions_do_not_show(tmp_path: Path, rows: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows are drawn from one partition, three, or eleven that cut across shards."""
    for module in (picks, survey_module):
        monkeypatch.setattr(module, "SAMPLE_ROWS", 16)
    found = []
    for count in (None, 1, 11):
        dataset = ImageTextPairDataset.from_webdataset(tmp_path)
        if count is not None:
            whole = dataset.metadata.compute()
            import dask.dataframe as dd

            dataset.metadata = dd.from_pandas(whole.reset_index(drop=True), npartitions=count)
        found.append(surveyed(dataset))
    first = found[0]
    for other in found[1:]:
        assert other.sample(9) == first.sample(9)
        assert other.extremes("aesthetic_score", 4, greatest=True) == first.extremes(
            "aesthetic_score", 4, greatest=True
        )
        assert other.around("aesthetic_score", 5.0, 4) == first.around("aesthetic_score", 5.0, 4)
        assert other.groups.choose(4) == first.groups.choose(4)
        assert other.reasons == first.reasons
    assert len(first.near("aesthetic_score", 5.0, 99)) <= 16


def test_a_sample_is_uniform(tmp_path: Path) -> None:
    """Of 5,000 rows in two shards, 512 are drawn: each shard by its share (three standard deviations)."""
    keys = [f"{number:06d}" for number in range(5000)]
    frame = pd.DataFrame({"shard": ["a"] * 1000 + ["b"] * 4000, "key": keys})
    priority = picks.priorities(frame, "key")
    drawn = np.argsort(priority)[:512]
    share = (drawn < 1000).mean()
    assert abs(share - 0.2) < 3 * (0.2 * 0.8 / 512) ** 0.5
    assert len(np.unique(priority)) == 5000


def test_groups_beyond_the_limit_are_sampled_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "GROUPS", 64)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({schema.DUPLICATE_OF: rng.integers(0, 1000, 6000), schema.DUPLICATE_OF_SHARD: "a"})
    cuts = [0, 30, 1200, 2400, 4800, 6000]  # the first part has few groups: none of its own is left out
    parts = [GroupSizes.of(frame.iloc[start:stop]) for start, stop in itertools.pairwise(cuts)]
    assert parts[0].is_exact
    whole = GroupSizes.merged(parts)
    assert not whole.is_exact
    assert len(whole.hashes) <= 64
    assert whole.count == pytest.approx(frame[schema.DUPLICATE_OF].nunique(), rel=0.5)
    _, hashes = groups.group_hashes(frame)
    true = Counter(hashes.tolist())
    assert all(true[int(one)] == n for one, n in zip(whole.hashes, whole.copies, strict=True))
    again = GroupSizes.merged([GroupSizes.merged(parts[3:]), GroupSizes.merged(parts[:3])])
    assert np.array_equal(again.hashes, whole.hashes)
    assert np.array_equal(again.copies, whole.copies)


def test_groups_side_by_side_are_those_of_the_columns(tmp_path: Path, rows: pd.DataFrame) -> None:
    dataset = ImageTextPairDataset.from_webdataset(tmp_path)
    shown = duplicate_groups(dataset.state, surveyed(dataset), thumbnails, 6, 50).groups
    true = {
        f"a/{of}": {f"{row.shard}/{row.key}" for row in some.itertuples()} for of, some in rows.groupby("duplicate_of")
    }
    assert {one.kept.title: {card.title for card in one.copies} for one in shown if one.kept} == true
    sizes = [len(one.copies) for one in shown[:3]]
    assert sizes == sorted(map(len, true.values()), reverse=True)[:3]
    assert all(one.more == 0 and one.kept and one.kept.jpeg for one in shown)


def test_an_unreadable_shard_is_named_and_the_others_are_counted(tmp_path: Path, rows: pd.DataFrame) -> None:
    (tmp_path / "b.parquet").write_bytes(b"no Parquet")
    found = surveyed(ImageTextPairDataset.from_webdataset(tmp_path))
    assert found.rows == SIZES["a"] + SIZES["c"]
    assert list(found.failures) == ["b"]
    assert "b.parquet" in found.failures["b"]


def test_a_filter_counts(tmp_path: Path, rows: pd.DataFrame) -> None:
    dataset = ImageTextPairDataset.from_webdataset(tmp_path)
    dataset.metadata = dataset.metadata[dataset.metadata["aesthetic_score"] > 6]
    found = surveyed(dataset)
    assert found.rows == (rows["aesthetic_score"] > 6).sum()
    assert min(values(rows, found.extremes("aesthetic_score", 4, greatest=False))) > 6
