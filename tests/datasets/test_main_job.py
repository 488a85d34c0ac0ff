"""The main job on pictures that the test makes: whatever happens to the frame, each embedding is its own image's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_image.backend import to_matrix
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import TimmImageEmbedder
from tests.makers import TINY_MODEL, encoded, make_dataset, picture, sample, write_rows, write_tar

pytestmark = pytest.mark.filterwarnings("ignore:.*is a random network.*")


def embedder(**options: Any) -> TimmImageEmbedder:
    return TimmImageEmbedder(TINY_MODEL, autocast=False, **options)


@pytest.fixture(scope="module")
def alone() -> Any:
    """Embed one picture alone, by timm's own transform and model: the oracle for every row."""
    import timm
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(TINY_MODEL, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    known: dict[int, np.ndarray] = {}

    def embed(seed: int) -> np.ndarray:
        if seed not in known:
            from io import BytesIO

            from PIL import Image

            image = Image.open(BytesIO(encoded(picture(seed), quality=90))).convert("RGB")
            with torch.inference_mode():
                vector = model(transform(image)[None])[0].double().numpy()
            known[seed] = vector / np.linalg.norm(vector)
        return known[seed]

    return embed


def belongs(frame: pd.DataFrame, alone: Any, seeds: list[int] | None = None) -> bool:
    """Tell whether every row's embedding is that of the picture of its `seed`, and of no other."""
    matrix, rows = to_matrix(frame["image_embedding"])
    assert len(rows) == len(frame), frame["image_error"].dropna().tolist()
    seeds = frame["seed"].astype(int).tolist() if seeds is None else seeds
    oracle = np.stack([alone(seed) for seed in seeds])
    closeness = matrix.astype(np.float64) @ oracle.T
    best = closeness.argmax(axis=1)
    # Random networks put all pictures close together, so nearest and equal are both asked for.
    return bool((best == np.arange(len(frame))).all() and np.allclose(np.diag(closeness), 1, atol=1e-5))


def saved(folder: Path) -> pd.DataFrame:
    parts = [pq.read_table(path).to_pandas(types_mapper=pd.ArrowDtype) for path in sorted(folder.glob("*.parquet"))]
    return pd.concat(parts, ignore_index=True)


SIZES = {"00000": 9, "00001": 4, "00002": 13}


def test_enrich_in_place_keeps_rows_and_columns_and_pairs_every_image(
    tmp_path: Path, alone: Any, scheduler: Any
) -> None:
    make_dataset(tmp_path, SIZES)
    before = saved(tmp_path)
    dataset = ImageTextPairDataset.from_webdataset(str(tmp_path))
    done = embedder(batch_size=4)(dataset).save_metadata()
    after = saved(tmp_path)
    pd.testing.assert_frame_equal(after[before.columns], before)
    assert belongs(after, alone)
    assert after["width"].tolist() == [64] * 26
    assert after["height"].tolist() == [48] * 26
    assert after["image_error"].isna().all()
    assert len(done) == 26
    assert done.run_totals is not None
    assert done.run_totals["results"]["image_embedding"] == 26
    assert done.run_totals["samples"] == 26


def test_a_control_with_shuffled_ids_fails_the_pairing_check(tmp_path: Path, alone: Any) -> None:
    make_dataset(tmp_path, SIZES)
    done = embedder()(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata()
    frame = done.metadata.compute()
    assert belongs(frame, alone)
    assert not belongs(frame, alone, seeds=frame["seed"].astype(int).tolist()[::-1])


def test_enriching_twice_computes_nothing_the_second_time(tmp_path: Path, scheduler: Any) -> None:
    make_dataset(tmp_path, SIZES)
    embedder()(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata()
    first = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.glob("*.parquet")}
    again = embedder()(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata()
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.glob("*.parquet")} == first
    assert again.run_totals is not None
    assert again.run_totals["shards"] == {"done": 0, "skipped": 3, "failed": 0}


def test_resume_false_computes_again(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"00000": 3})
    embedder()(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata()
    stamp = (tmp_path / "00000.parquet").stat().st_mtime_ns
    again = embedder()(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata(resume=False)
    assert again.run_totals is not None
    assert again.run_totals["shards"]["done"] == 1
    assert (tmp_path / "00000.parquet").stat().st_mtime_ns > stamp


def test_another_model_is_computed_anew(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"00000": 3})
    embedder()(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata()
    one = saved(tmp_path)["image_embedding"].tolist()
    TimmImageEmbedder("test_resnet", autocast=False)(
        ImageTextPairDataset.from_webdataset(str(tmp_path))
    ).save_metadata()
    other = saved(tmp_path)["image_embedding"].tolist()
    assert len(one[0]) != len(other[0])


def test_a_changed_tar_is_computed_anew(tmp_path: Path, alone: Any) -> None:
    make_dataset(tmp_path, {"00000": 3})
    embedder()(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata()
    write_tar(tmp_path / "00000.tar", [sample(seed + 50, f"{seed:06d}") for seed in range(3)])
    done = embedder()(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata()
    assert belongs(done.metadata.compute(), alone, seeds=[50, 51, 52])


def test_filter_then_embed_decodes_only_what_is_left(tmp_path: Path, alone: Any, scheduler: Any) -> None:
    make_dataset(tmp_path, SIZES)
    dataset = ImageTextPairDataset.from_webdataset(str(tmp_path))
    dataset.metadata = dataset.metadata[dataset.metadata["score"] > 1.05]
    done = embedder()(dataset).save_metadata()
    frame = done.metadata.compute()
    kept = frame[frame["score"] > 1.05]
    assert len(frame) == 26
    assert belongs(kept, alone)
    rest = frame[frame["score"] <= 1.05]
    assert rest["image_embedding"].isna().all()
    assert rest["image_error"].isna().all()


def test_filter_embed_save_then_unfiltered_fills_the_rest(tmp_path: Path, alone: Any) -> None:
    make_dataset(tmp_path, SIZES)
    dataset = ImageTextPairDataset.from_webdataset(str(tmp_path))
    dataset.metadata = dataset.metadata[dataset.metadata["score"] > 1.05]
    embedder()(dataset).save_metadata()
    before = saved(tmp_path)["image_embedding"]
    done = embedder()(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata()
    frame = done.metadata.compute()
    assert belongs(frame, alone)
    known = before.notna().to_numpy()
    old, _ = to_matrix(before)
    new, _ = to_matrix(frame["image_embedding"].reset_index(drop=True)[known])
    assert (old == new).all()


@pytest.mark.parametrize("npartitions", [1, 2, 5])
def test_repartition_then_embed(tmp_path: Path, alone: Any, scheduler: Any, npartitions: int) -> None:
    make_dataset(tmp_path, SIZES)
    before = saved(tmp_path)
    dataset = ImageTextPairDataset.from_webdataset(str(tmp_path))
    dataset.metadata = dataset.metadata.repartition(npartitions=npartitions)
    done = embedder()(dataset).save_metadata()
    after = saved(tmp_path)
    assert belongs(after, alone)
    pd.testing.assert_frame_equal(after[before.columns], before)
    assert belongs(done.metadata.compute(), alone)
    assert not list((tmp_path / "_nemo_image").glob("pieces-*"))


def test_join_then_embed(tmp_path: Path, alone: Any, scheduler: Any) -> None:
    import dask.dataframe as dd

    make_dataset(tmp_path / "in", SIZES)
    dataset = ImageTextPairDataset.from_webdataset(str(tmp_path / "in"))
    extra = pd.DataFrame({"key": [f"{seed:06d}" for seed in range(0, 26, 2)], "even": True})
    extra["key"] = extra["key"].astype(pd.ArrowDtype(pa.string()))
    dataset.metadata = dataset.metadata.merge(dd.from_pandas(extra, npartitions=2), on="key", how="inner")
    done = embedder()(dataset).save_metadata(tmp_path / "out")
    frame = done.metadata.compute()
    assert belongs(frame, alone)
    assert sorted(frame["seed"]) == list(range(0, 26, 2))
    assert done.run_totals is not None
    assert done.run_totals["rows_in"] == 26
    assert done.run_totals["rows_filtered"] == 13
    assert done.run_totals["rows_out"] == 13


def test_ids_unsorted_integers_in_json_only_and_repeated_across_shards(tmp_path: Path, alone: Any) -> None:
    rng = np.random.default_rng(7)
    for shard in range(2):
        seeds = [shard * 10 + number for number in range(8)]
        # The same ids in both shards; keys count up, and as numbers they name other samples than the ids do.
        ids = [int(one) for one in rng.permutation(8)]
        samples = [sample(seed, f"{place:05d}", uid=ids[place]) for place, seed in enumerate(seeds)]
        write_tar(tmp_path / f"s{shard}.tar", samples)
        order = rng.permutation(8)
        write_rows(
            tmp_path / f"s{shard}.parquet", {"uid": [ids[one] for one in order], "seed": [seeds[one] for one in order]}
        )
    dataset = ImageTextPairDataset.from_webdataset(str(tmp_path), id_col="uid")
    done = embedder(batch_size=3)(dataset).save_metadata()
    frame = done.metadata.compute()
    assert sorted(frame["uid"]) == sorted([*range(8), *range(8)])
    assert belongs(frame, alone)


def test_integer_ids_match_padded_keys(tmp_path: Path, alone: Any) -> None:
    write_tar(tmp_path / "a.tar", [sample(seed, f"{seed:09d}") for seed in range(6)])
    write_rows(tmp_path / "a.parquet", {"id": pa.array([5, 3, 1, 0, 2, 4], pa.int32()), "seed": [5, 3, 1, 0, 2, 4]})
    done = embedder()(ImageTextPairDataset.from_webdataset(str(tmp_path), id_col="id")).save_metadata()
    assert belongs(done.metadata.compute(), alone)


def test_bad_images_and_missing_samples_are_values(tmp_path: Path, alone: Any, scheduler: Any) -> None:
    good = [sample(seed, f"{seed:03d}") for seed in range(4)]
    bad = [
        ("004", {"jpg": b""}),
        ("005", {"jpg": encoded(picture(5))[:300]}),
        ("006", {"png": bytes(range(256)) * 4}),
        ("007", {"txt": b"caption alone"}),
    ]
    write_tar(tmp_path / "a.tar", [*good, *bad, sample(9, "extra")])
    write_rows(tmp_path / "a.parquet", {"key": [f"{one:03d}" for one in range(8)] + ["999"], "seed": range(9)})
    done = embedder()(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata()
    frame = done.metadata.compute()
    assert belongs(frame.iloc[:4], alone)
    assert frame["image_embedding"].iloc[4:].isna().all()
    categories = [reason.split(":")[0] for reason in frame["image_error"].iloc[4:]]
    assert categories == ["empty", "truncated", "unknown", "missing", "missing"]
    totals = done.run_totals
    assert totals is not None
    assert totals["failures"] == {"empty": 1, "missing": 2, "truncated": 1, "unknown": 1}
    assert totals["rows_without_sample"] == 1
    assert totals["samples_without_row"] == 1
    lines = [json.loads(line) for line in Path(totals["ledger"]).read_text().splitlines()]
    assert lines[0]["rows_without_sample"]["first"] == ["999"]
    assert lines[0]["samples_without_row"]["first"] == ["extra"]


def test_partition_that_is_empty_after_a_filter(tmp_path: Path, alone: Any) -> None:
    make_dataset(tmp_path / "in", SIZES)
    dataset = ImageTextPairDataset.from_webdataset(str(tmp_path / "in"))
    dataset.metadata = dataset.metadata[dataset.metadata["seed"] < 9]
    done = embedder()(dataset).save_metadata(tmp_path / "out")
    frame = done.metadata.compute()
    assert len(frame) == 9
    assert belongs(frame, alone)
    assert pq.read_schema(tmp_path / "out" / "00001.parquet").field("image_embedding").type == pa.list_(pa.float32())


def test_float16_embeddings(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 2})
    embedder(embedding_dtype="float16")(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata()
    assert pq.read_schema(tmp_path / "a.parquet").field("image_embedding").type == pa.list_(pa.float16())


def test_saved_files_need_no_shim(tmp_path: Path) -> None:
    import subprocess
    import sys

    make_dataset(tmp_path, {"a": 2})
    embedder()(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata()
    code = f"import pandas as pd; print(len(pd.read_parquet({str(tmp_path / 'a.parquet')!r})['image_embedding'][0]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 10


def test_columns_assigned_in_place_are_the_users(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 3})
    dataset = embedder()(ImageTextPairDataset.from_webdataset(str(tmp_path)))
    dataset.metadata["double"] = dataset.metadata["seed"] * 2
    dataset.metadata["width"] = dataset.metadata["seed"] + 1000
    done = dataset.save_metadata()
    frame = done.metadata.compute()
    assert frame["double"].tolist() == [0, 2, 4]
    assert frame["width"].tolist() == [1000, 1001, 1002]
    assert "width" not in done.provenance
    assert "image_embedding" in done.provenance
    # Changed again, and saved again: what the user says is written, and nothing is embedded twice.
    again = embedder()(ImageTextPairDataset.from_webdataset(str(tmp_path)))
    again.metadata["double"] = again.metadata["seed"] * 5
    assert again.save_metadata().metadata.compute()["double"].tolist() == [0, 5, 10]


def test_an_exported_dataset_is_not_computed_again(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", SIZES)
    dataset = embedder()(ImageTextPairDataset.from_webdataset(str(tmp_path / "in")))
    dataset.metadata["keep"] = dataset.metadata["seed"] > 3
    out = dataset.to_webdataset(tmp_path / "out", "keep", samples_per_shard=10)
    again = embedder()(ImageTextPairDataset.from_webdataset(str(tmp_path / "out"))).save_metadata()
    assert again.run_totals is not None
    assert again.run_totals["results"]["image_embedding"] == 22
    before, _ = to_matrix(out.metadata.compute()["image_embedding"])
    after, _ = to_matrix(again.metadata.compute()["image_embedding"])
    assert (before == after).all()


def test_some_partitions_in_another_order(tmp_path: Path, alone: Any) -> None:
    make_dataset(tmp_path / "in", SIZES)
    dataset = ImageTextPairDataset.from_webdataset(str(tmp_path / "in"))
    dataset.metadata = dataset.metadata.partitions[[2, 0]]
    done = embedder()(dataset).save_metadata(tmp_path / "out")
    assert done.shards == ["00000", "00002"]
    assert belongs(done.metadata.compute(), alone)
    totals = done.run_totals
    assert totals is not None
    assert (totals["rows_in"], totals["rows_out"], totals["rows_filtered"]) == (26, 22, 4)
    again = embedder()(dataset).save_metadata()
    frame = again.metadata.compute()
    assert frame[frame["shard"].astype(str) == "00001"]["image_embedding"].isna().all()
    assert belongs(frame[frame["shard"].astype(str) != "00001"], alone)


def test_a_persisted_frame_and_one_with_an_aggregate(tmp_path: Path, alone: Any) -> None:
    make_dataset(tmp_path / "in", SIZES)
    for number in range(2):
        dataset = ImageTextPairDataset.from_webdataset(str(tmp_path / "in"))
        metadata = dataset.metadata
        dataset.metadata = metadata.persist() if number else metadata[metadata["score"] > metadata["score"].mean()]
        done = embedder()(dataset).save_metadata(tmp_path / f"out{number}")
        frame = done.metadata.compute()
        assert len(frame) == (26 if number else 13)
        assert belongs(frame, alone)
