"""The writer with write_images=False: files of results alone, which join with their source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.errors import ArgumentError, DatasetError
from nemo_image.shards.files import identify
from nemo_image.shards.parquet import read_summary
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.tasks import ImageBatch
from nemo_image.stages.writer import ImageWriterStage
from tests.makers import make_dataset
from tests.stages.writing import Makes, Run, contents, in_batches, plain_tar, rows, tar_images

CLIP = {"image_embedding": {"operator": "clip"}}


def stage_of(folder: Path, **arguments: Any) -> ImageWriterStage:
    return ImageWriterStage(str(folder), write_images=False, **arguments)


def scored(folder: Path, shard: str) -> list[ImageObject]:
    """Return every other image of a shard, as if others had been filtered, with results."""
    images = tar_images(folder / f"{shard}.tar", rows(folder / f"{shard}.parquet"))[::2]
    for image in images:
        image.embedding = np.full(3, image.metadata["seed"], np.float32)
        image.metadata["language"] = f"l{image.metadata['seed']}"
    return images


def test_it_serves_as_a_sidecar_of_its_source(tmp_path: Path) -> None:
    source = make_dataset(tmp_path / "in", {"00000": 4, "00001": 3, "00002": 2})
    fields = pq.read_schema(source / "00000.parquet")
    images = {shard: scored(source, shard) for shard in ("00000", "00001", "00002")}
    images["00000"][1].image_error = "truncated: cut off"
    images["00000"][1].embedding = None
    out = tmp_path / "out"
    groups = {
        "x": [*in_batches(images["00000"], 1, fields), *in_batches(images["00001"], 5, fields)],
        "y": [*in_batches(images["00002"], 5, fields)],
    }
    run = Run(stage_of(out), groups, earlier=[Makes(**CLIP, aesthetic_score={})])
    assert run.said == {"shards": 3, "rows": 5, "output_dir": str(out), "rewritten keys": 0}
    assert run.records["x"].outputs[0].data == [f"{out}/00000.parquet", f"{out}/00001.parquet"]
    assert run.records["x"].outputs[0].metadata["remainder"] is None
    assert run.stage.outputs_intact(run.records["x"].outputs)
    assert {*contents(out)} == {"00000.parquet", "00001.parquet", "00002.parquet", "_nemo_image/pipeline.json"}

    summary = read_summary(str(out / "00000.parquet"))
    assert summary.schema.names == [
        *("shard", "key", "language", "width", "height", "image_embedding", "aesthetic_score", "image_error"),
    ]
    assert summary.footer is not None
    assert summary.footer.source == identify(source / "00000.tar").to_dict()

    dataset = ImageTextPairDataset.from_webdataset(source, sidecars=[str(out)])
    assert dataset.provenance == {**CLIP, "aesthetic_score": {}}
    frame = dataset.metadata.compute()
    assert frame["seed"].tolist() == list(range(9))
    kept = {0, 4, 6, 7}
    assert [row[0] if isinstance(row, list) else None for row in frame["image_embedding"].tolist()] == [
        seed if seed in kept else None for seed in range(9)
    ]
    assert frame["language"].dropna().tolist() == ["l0", "l2", "l4", "l6", "l7"]
    assert frame["image_error"].dropna().tolist() == ["truncated: cut off"]
    assert frame["width"].notna().sum() == 4


def test_a_source_without_parquet(tmp_path: Path) -> None:
    images = plain_tar(tmp_path / "in" / "s.tar", ["a", "b", "c"])
    images = tar_images(tmp_path / "in" / "s.tar", held=("json",))
    images[1].metadata["added"] = 1
    images[2].caption = "changed"
    out = tmp_path / "out"
    Run(stage_of(out), {"g": in_batches(images, 2)})
    assert pq.read_schema(out / "s.parquet").names == [
        *("shard", "key", "new_caption", "added", "width", "height", "image_error"),
    ]
    frame = ImageTextPairDataset.from_webdataset(tmp_path / "in", sidecars=[str(out)]).metadata.compute()
    assert frame["new_caption"].tolist()[2] == "changed"
    assert frame["caption"].tolist() == ["caption 0", "caption 1", "caption 2"]
    assert frame["new_caption"].isna().tolist() == [True, True, False]
    assert frame["added"].tolist()[1] == 1


def test_what_the_source_has_is_not_repeated_but_results_are_never_left_out(tmp_path: Path) -> None:
    metadata = {"key": "k", "width": 1, "caption": "x", "nsfw_score": 0.5, "phash": "old", "new_caption": "taken"}
    fields = pa.schema([(name, pa.array([value]).type) for name, value in metadata.items()])
    image = ImageObject(image_id="k", image_bytes=b"x", caption="y", metadata=metadata, shard="s")
    image.original_caption = "x"
    image.nsfw_score, image.image_error = 0.25, "unknown: x"
    metadata["phash"] = "new"
    out = tmp_path / "out"
    Run(stage_of(out), {"g": [ImageBatch([image], fields=fields)]}, earlier=[Makes(phash={})])
    assert rows(out / "s.parquet") == [
        {
            "shard": "s",
            "key": "k",
            "new_caption_": "y",
            "phash": "new",
            "height": None,
            "nsfw_score": 0.25,
            "image_error": "unknown: x",
        }
    ]


def test_shards_in_folders(tmp_path: Path) -> None:
    groups = {}
    for name in ("p/q", "p/r"):
        images = plain_tar(tmp_path / "in" / f"{name}.tar", ["a", "b"])
        for image in images:
            image.shard = name
        groups[name.replace("/", "_")] = in_batches(images, 2)
    out = tmp_path / "out"
    Run(stage_of(out), groups)
    assert {*contents(out)} == {"p/q.parquet", "p/r.parquet", "_nemo_image/pipeline.json"}
    Run(stage_of(out), {"p_r": groups["p_r"]})
    assert {*contents(out)} == {"p/r.parquet", "_nemo_image/pipeline.json"}
    (out / "p" / "theirs.parquet").write_bytes(b"x")
    with pytest.raises(DatasetError, match="p/theirs"):
        Run(stage_of(out, replace=True), groups, token="other")
    (out / "p" / "theirs.parquet").unlink()
    # Also for a pipeline that writes no folders itself.
    Run(ImageWriterStage(str(out), images_per_tar=4, replace=True), groups, token="other")
    assert [name for name in contents(out) if not name.startswith("_")] == [
        *("packed-00000.idx", "packed-00000.parquet", "packed-00000.tar"),
    ]


def test_images_must_come_shard_by_shard(tmp_path: Path) -> None:
    one, two = (plain_tar(tmp_path / "in" / f"{name}.tar", ["a", "b"]) for name in "xy")
    with pytest.raises(ArgumentError, match=r"'b'.*other shards than its own, 'x'"):
        Run(stage_of(tmp_path / "out"), {"g": [ImageBatch([one[0], two[0], one[1]])]})
    with pytest.raises(ArgumentError, match=r"'k'.*says no shard"):
        Run(stage_of(tmp_path / "out"), {"g": [ImageBatch([ImageObject(image_id="k", image_bytes=b"x")])]})


def test_one_batch_written_by_hand(tmp_path: Path) -> None:
    images = plain_tar(tmp_path / "in" / "x.tar", ["a", "b"])
    made = stage_of(tmp_path / "out").process(ImageBatch(images))
    assert made.data == [f"{tmp_path}/out/x.parquet"]
    assert len(rows(tmp_path / "out" / "x.parquet")) == 2
