"""Shares of a run, what is left of it, the quarantine, and trying again what failed."""

from __future__ import annotations

import itertools
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import TimmImageEmbedder
from nemo_image.errors import ArgumentError, DatasetError, RunError
from tests.makers import TINY_MODEL, make_dataset, sample, write_tar

SIZES = {"a": 3, "b": 2, "c": 4, "d": 1, "e": 2}


def embedded(folder: Path) -> ImageTextPairDataset:
    return TimmImageEmbedder(TINY_MODEL, autocast=False)(ImageTextPairDataset.from_webdataset(folder))


def parquets(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def damage(folder: Path, shard: str = "b") -> dict[str, bytes]:
    """Replace a shard's tar by one whose second picture is cut off; return that sample as it should be."""
    path = folder / f"{shard}.tar"
    keys = pq.read_table(folder / f"{shard}.parquet")["key"].to_pylist()
    samples = [sample(int(key), key, f"picture number {int(key)}") for key in keys]
    good = samples[1][1]
    write_tar(path, [samples[0], (keys[1], {**good, "jpg": good["jpg"][:50]}), *samples[2:]])
    return good


@pytest.mark.parametrize("order", list(itertools.permutations([1, 2])))
def test_parts_make_what_one_run_makes(tmp_path: Path, order: tuple[int, int]) -> None:
    make_dataset(tmp_path / "in", SIZES)
    lazy = embedded(tmp_path / "in")
    lazy.save_metadata(tmp_path / "whole")
    shards = set()
    for done, number in enumerate(order):
        assert len(lazy.pending_shards(tmp_path / "parts")) == (5 if not done else {1: 2, 2: 3}[order[0]])
        part = lazy.save_metadata(tmp_path / "parts", part=(number, 2))
        assert part.run_totals is not None
        assert part.run_totals["shards"] == {"done": len(part.shards), "skipped": 0, "failed": 0}
        assert len(part) == sum(SIZES[shard] for shard in part.shards)
        shards |= set(part.shards)
    assert shards == set(SIZES)
    assert lazy.pending_shards(tmp_path / "parts") == []
    assert parquets(tmp_path / "parts") == parquets(tmp_path / "whole")


def test_more_parts_than_shards(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", {"a": 1, "b": 1})
    lazy = embedded(tmp_path / "in")
    totals = [lazy.save_metadata(tmp_path / "out", part=(number, 3)).run_totals for number in (1, 2, 3)]
    assert [one["rows_out"] for one in totals if one is not None] == [1, 1, 0]


@pytest.mark.parametrize("part", [(0, 2), (3, 2), (-1, 1)])
def test_no_such_part(tmp_path: Path, part: tuple[int, int]) -> None:
    with pytest.raises(ArgumentError, match="parts count from 1"):
        embedded(make_dataset(tmp_path, {"a": 1})).save_metadata(part=part)


def test_quarantine_names_bad_images_and_keeps_their_bytes(tmp_path: Path) -> None:
    make_dataset(tmp_path, SIZES)
    damage(tmp_path)
    lazy = embedded(tmp_path)
    saved = lazy.save_metadata(tmp_path / "out")
    found = saved.quarantine()
    assert found[["shard", "key"]].to_numpy().tolist() == [["b", "000004"]]
    assert found["image_error"][0].startswith("truncated: ")
    assert found["member"][0] == "000004.jpg"
    blob = (tmp_path / "b.tar").read_bytes()[found["offset"][0] :][: found["size"][0]]
    assert len(blob) == 50
    assert "image_bytes" not in found
    # The same run again, with bytes: nothing is computed for it.
    again = lazy.save_metadata(tmp_path / "out", quarantine_bytes=True)
    assert again.run_totals is not None
    assert again.run_totals["shards"] == {"done": 0, "skipped": 5, "failed": 0}
    assert again.quarantine()["image_bytes"].tolist() == [blob]


def test_quarantine_that_was_lost_is_made_again(tmp_path: Path) -> None:
    make_dataset(tmp_path, SIZES)
    damage(tmp_path)
    lazy = embedded(tmp_path)
    lazy.save_metadata()
    path = tmp_path / "_nemo_image/quarantine/b.parquet"
    before = path.read_bytes()
    path.unlink()
    assert len(lazy.save_metadata().quarantine()) == 1
    assert path.read_bytes() == before


def test_quarantine_of_a_mended_tar_is_empty(tmp_path: Path) -> None:
    make_dataset(tmp_path, SIZES)
    good = damage(tmp_path)
    assert len(embedded(tmp_path).save_metadata().quarantine()) == 1
    write_tar(tmp_path / "b.tar", [sample(3, "000003", "picture number 3"), ("000004", good)])
    saved = embedded(tmp_path).save_metadata()
    assert list(saved.quarantine().columns) == ["shard", "key", "image_error", "member", "offset", "size"]
    assert len(saved.quarantine()) == 0
    assert saved.head(12, npartitions=-1)["image_error"].notna().sum() == 0


@pytest.mark.in_process("watches or changes this process")
def test_retry_takes_failed_shards_and_bad_images_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path / "in", SIZES)
    good_tar = (tmp_path / "in/c.tar").read_bytes()
    (tmp_path / "in/c.tar").write_bytes(good_tar[:700])
    damage(tmp_path / "in")
    out = tmp_path / "out"
    with pytest.raises(RunError, match="1 of 5 shards failed"):
        embedded(tmp_path / "in").save_metadata(out, max_failure_ratio=1)
    (out / "d.parquet").unlink()  # as if the run had not come so far
    before = parquets(out)
    (tmp_path / "in/c.tar").write_bytes(good_tar)
    tried = watch_embedding(monkeypatch)
    saved = embedded(tmp_path / "in").save_metadata(out, retry_failed=True)
    assert sorted(tried) == [("b", 1), ("c", 4)]
    assert saved.run_totals is not None
    assert saved.run_totals["shards"] == {"done": 2, "skipped": 3, "failed": 0}
    after = parquets(out)
    assert after.keys() == {"a.parquet", "b.parquet", "c.parquet", "e.parquet"}
    # The picture is as bad as before, so its shard's file is too.
    assert {name: data for name, data in after.items() if name != "c.parquet"} == before
    assert embedded(tmp_path / "in").pending_shards(out) == ["d"]


def test_retry_where_nothing_failed_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path, SIZES)
    embedded(tmp_path).save_metadata()
    tried = watch_embedding(monkeypatch)
    saved = embedded(tmp_path).save_metadata(retry_failed=True)
    assert tried == []
    assert saved.run_totals is not None
    assert saved.run_totals["shards"]["skipped"] == 5


def test_retry_and_no_resume_contradict(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="retry_failed keeps"):
        embedded(make_dataset(tmp_path, {"a": 1})).save_metadata(retry_failed=True, resume=False)


def watch_embedding(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return a list that fills with the shard and the number of rows of each call of an embedder."""
    from nemo_image.embedders.timm import PreparedTimmEmbedder

    seen: list[tuple[str, int]] = []
    original = PreparedTimmEmbedder.embed_rows

    def watched(self, source, shard, ids):  # type: ignore[no-untyped-def]
        seen.append((shard, len(ids)))
        return original(self, source, shard, ids)

    monkeypatch.setattr(PreparedTimmEmbedder, "embed_rows", watched)
    return seen


# -------------------------------------------------------------------------------------------------------- the export


def exported(folder: Path, target: Path, least: int, replace: bool = False) -> ImageTextPairDataset:
    dataset = ImageTextPairDataset.from_webdataset(folder)
    dataset.metadata["keep"] = dataset.metadata["seed"] >= least
    return dataset.to_webdataset(target, "keep", samples_per_shard=3, replace=replace)


def test_another_export_is_replaced_on_demand(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", SIZES)
    exported(tmp_path / "in", tmp_path / "out", 0)
    exported(tmp_path / "in", tmp_path / "clean", 5)
    with pytest.raises(DatasetError, match="replace=True"):
        exported(tmp_path / "in", tmp_path / "out", 5)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 4
    new = exported(tmp_path / "in", tmp_path / "out", 5, replace=True)
    assert len(new) == 7
    names = sorted(path.name for path in (tmp_path / "clean").iterdir() if path.is_file())
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_file()) == names
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "clean" / name).read_bytes() for name in names)


def test_an_export_of_values_that_changed_is_not_taken_for_finished(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", SIZES)
    ImageTextPairDataset.from_webdataset(tmp_path / "in").save_metadata(tmp_path / "saved")
    exported(tmp_path / "saved", tmp_path / "out", 0)
    dataset = ImageTextPairDataset.from_webdataset(tmp_path / "saved")
    dataset.metadata["score"] = dataset.metadata["score"] + 1
    dataset.save_metadata()
    with pytest.raises(DatasetError, match="holds another export"):
        exported(tmp_path / "saved", tmp_path / "out", 0)
