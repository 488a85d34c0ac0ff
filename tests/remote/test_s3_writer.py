"""The pipeline's writer on an S3 server: the same bytes as on a local disk, uploads that fail, few requests."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.errors import DatasetError
from nemo_image.shards import atomic
from nemo_image.stages.tasks import ImageBatch
from nemo_image.stages.writer import ImageWriterStage
from tests.remote.servers import Front
from tests.stages.writing import Run, contents, in_batches, plain_tar


@pytest.fixture
def groups(tmp_path: Path) -> dict[str, list[ImageBatch]]:
    """Two groups of 5 images."""
    made = {}
    for number, name in enumerate("ab"):
        images = plain_tar(tmp_path / "in" / f"{name}.tar", [f"{name}{place}" for place in range(5)], 10 * number)
        made[name] = in_batches(images, 2)
    return made


def stored(bucket: str) -> dict[str, bytes]:
    import s3fs

    fs = s3fs.S3FileSystem(use_listings_cache=False)
    inside = bucket.removeprefix("s3://") + "/out/"
    return {path.removeprefix(inside): fs.cat_file(path) for path in fs.find(inside)}


def test_the_same_bytes_as_on_a_local_disk(
    groups: dict[str, list[ImageBatch]], bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = ImageWriterStage(f"{bucket}/out", images_per_tar=3)
    here = ImageWriterStage(str(tmp_path / "out"), images_per_tar=3)
    Run(here, groups)
    Run(there, groups)
    assert stored(bucket) == contents(tmp_path / "out")
    # Again, with uploads in several parts, and a checkpoint that keeps the remainders.
    monkeypatch.setattr(atomic, "ONE_REQUEST", 1000)
    again = Run(there, groups, checkpoint="somewhere")
    Run(here, groups, checkpoint="somewhere")
    assert stored(bucket) == contents(tmp_path / "out")
    assert "_nemo_image/remainders/a.tar" in stored(bucket)
    assert again.stage.outputs_intact(again.records["a"].outputs)
    assert len(ImageTextPairDataset.from_webdataset(f"{bucket}/out")) == 10

    fewer = {"b": groups["b"]}
    Run(there, fewer)
    Run(here, fewer)
    assert stored(bucket) == contents(tmp_path / "out")
    with pytest.raises(DatasetError, match="another pipeline"):
        Run(there, fewer, token="other")
    Run(ImageWriterStage(f"{bucket}/out", images_per_tar=3, replace=True), fewer, token="other")
    Run(ImageWriterStage(str(tmp_path / "other"), images_per_tar=3), fewer, token="other")
    assert stored(bucket) == contents(tmp_path / "other")


def test_an_upload_that_is_given_up_leaves_nothing(
    groups: dict[str, list[ImageBatch]], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "ONE_REQUEST", 1000)
    groups["b"].insert(1, ZeroDivisionError("no"))  # type: ignore[arg-type]
    run = Run(ImageWriterStage(f"{bucket}/out", images_per_tar=3), groups)
    assert run.records["b"].status == "failed"
    assert {name.rpartition("/")[2][0] for name in stored(bucket) if name.endswith(".tar")} == {"a", "p"}
    assert len(ImageTextPairDataset.from_webdataset(f"{bucket}/out")) == 5


@pytest.mark.parametrize("kinds", [("503",), ("503", "drop")])
def test_what_fails_for_a_moment_is_tried_again(
    kinds: tuple[str, ...], groups: dict[str, list[ImageBatch]], bucket: str, s3: Front, tmp_path: Path
) -> None:
    for token in ("one", "other"):
        Run(ImageWriterStage(str(tmp_path / "out"), images_per_tar=3, replace=True), groups, token=token)
        s3.every(5, *kinds)
        Run(ImageWriterStage(f"{bucket}/out", images_per_tar=3, replace=True), groups, token=token)
        s3.every(10**9, "503")
        assert stored(bucket) == contents(tmp_path / "out")


def test_results_alone(groups: dict[str, list[ImageBatch]], bucket: str, s3: Front) -> None:
    for image in groups["a"][0].data:
        image.shard = "deep/a"
    run = Run(ImageWriterStage(f"{bucket}/out", write_images=False), groups)
    assert run.said["shards"] == 3
    s3.every(5, "503")
    Run(ImageWriterStage(f"{bucket}/out", write_images=False), {"b": groups["b"]})
    s3.every(10**9, "503")
    assert {*stored(bucket)} == {"b.parquet", "_nemo_image/pipeline.json"}
