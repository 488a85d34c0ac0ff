"""Stages without a model, against the operators of the same names and plain Python; in pipelines and in YAML."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.errors import ArgumentError, MissingColumnError
from nemo_image.filters import CaptionStats, ImageQualityStats
from nemo_image.pipeline import Pipeline, build_pipeline
from nemo_image.stages import (
    BlocklistFilterStage,
    CaptionFilterStage,
    ExpressionFilterStage,
    FilePartitioningStage,
    ImageQualityFilterStage,
    ImageReaderStage,
    ImageStatsStage,
    ImageWriterStage,
)
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.tasks import ImageBatch
from tests.makers import encoded, make_dataset, picture


def image(name: str = "x", caption: str | None = None, data: bytes | None = None, **metadata: Any) -> ImageObject:
    return ImageObject(image_id=name, caption=caption, metadata=metadata, image_bytes=data)


def kept(stage: Any, *images: ImageObject, fields: pa.Schema | None = None) -> list[str]:
    return [one.image_id for one in stage.process(ImageBatch(list(images), fields=fields or pa.schema([]))).data]


FLAT = encoded(picture(1).resize((2, 2)).resize((64, 48)))
SHARP = encoded(picture(1, 16, 12).resize((64, 48), 0))


def test_captions_by_what_they_are_made_of() -> None:
    images = [image("a", "a plain caption"), image("b", "!!! ??? $$$ ..."), image("c", None), image("d", "हिन्दी में")]
    assert kept(CaptionFilterStage(min_alphanumeric=0.7), *images) == ["a", "d"]
    with pytest.raises(ArgumentError, match="min_alphanumeric"):
        CaptionFilterStage(min_alphanumeric=70)
    with pytest.raises(ArgumentError, match="without languages"):
        CaptionFilterStage(min_language_score=0.5)
    with pytest.raises(ArgumentError, match="list of codes"):
        CaptionFilterStage(languages="en")


def test_captions_by_language() -> None:
    pytest.importorskip("py3langid", reason="the extra 'language' is not installed")
    images = [
        image("en", "A man is riding a bicycle through the streets of the old town"),
        image("de", "Ein Mann fährt mit dem Fahrrad durch die Straßen der Altstadt"),
        image("none", ""),
    ]
    assert kept(CaptionFilterStage(languages=["de"]), *images) == ["de"]
    assert kept(CaptionFilterStage(languages=["de", "en"], min_language_score=0.9), *images) == ["en", "de"]
    assert kept(ExpressionFilterStage("caption_language == 'en'"), *images) == ["en"]


def test_pictures_by_blur_and_brightness() -> None:
    bad = image("bad", data=b"no picture")
    images = [image("flat", data=FLAT), image("sharp", data=SHARP), bad]
    assert kept(ImageQualityFilterStage(min_blur=100), *images) == ["sharp"]
    assert str(bad.image_error).startswith("unknown")
    dark = image("dark", data=encoded(picture(1).point(lambda value: value // 8)))
    assert kept(ImageQualityFilterStage(min_brightness=40, max_brightness=250), dark, images[0]) == ["flat"]
    for settings in ({"min_blur": -1}, {"min_brightness": 200, "max_brightness": 100}, {"min_brightness": 300}):
        with pytest.raises(ArgumentError):
            ImageQualityFilterStage(**settings)


def test_an_expression_measures_what_is_not_there() -> None:
    images = [image("a", "one two three", SHARP), image("b", "one", SHARP), image("c", "one two three", FLAT)]
    assert kept(ExpressionFilterStage("caption_words > 2 and blur > 100 and aspect_ratio < 2"), *images) == ["a"]
    given = [image("x", "one", caption_words=9), image("y", "one two", caption_words=1)]
    assert kept(ExpressionFilterStage("caption_words > 2"), *given) == ["x"]  # what the metadata says counts
    bad = image("bad", "one two three", b"no picture")
    assert kept(ExpressionFilterStage("blur > 100"), bad, images[0]) == ["a"]
    assert str(bad.image_error).startswith("unknown")
    with pytest.raises(MissingColumnError, match="caption_count"):
        kept(ExpressionFilterStage("caption_count > 1"), images[0])


def test_a_quantile_is_an_error_at_build() -> None:
    with pytest.raises(ArgumentError, match=r"KeepWorkflow.*filters\.keep"):
        ExpressionFilterStage("clip_score in top 30%")
    config = {"stages": [{"_target_": "nemo_image.stages.ExpressionFilterStage", "expression": "x in top 3"}]}
    with pytest.raises(ArgumentError, match="depends on all rows"):
        build_pipeline(config)


def test_lists_of_ids_fields_and_bytes(tmp_path: Path) -> None:
    images = [image("a", data=SHARP, url="u1"), image("b", data=FLAT, url="u2"), image("c", url=None)]
    lists = str(tmp_path / "lists")
    assert kept(BlocklistFilterStage(["b", "z"], lists), *images) == ["a", "c"]
    assert kept(BlocklistFilterStage(["u1"], lists, column="url"), *images) == ["b", "c"]
    digest = hashlib.sha256(FLAT).hexdigest()
    assert kept(BlocklistFilterStage([digest], lists, content_hash="sha256"), *images) == ["a", "c"]
    (tmp_path / "l.txt").write_text("a\nc\n")
    assert kept(BlocklistFilterStage(str(tmp_path / "l.txt"), lists), *images) == ["b"]
    with pytest.raises(ArgumentError, match="md5"):
        BlocklistFilterStage(["x"], lists, content_hash="md5")


def run_pipeline(source: Path, out: Path, *stages: Any) -> Any:
    pipeline = Pipeline(name="cheap")
    pipeline.add_stage(FilePartitioningStage(file_paths=str(source), file_extensions=[".tar"]))
    pipeline.add_stage(ImageReaderStage(batch_size=4, num_threads=1, num_gpus_per_worker=0))
    for stage in stages:
        pipeline.add_stage(stage)
    pipeline.add_stage(ImageWriterStage(output_dir=str(out), images_per_tar=10))
    pipeline.run()
    return ImageTextPairDataset.from_webdataset(out).metadata.compute()


def test_a_pipeline_says_what_the_operators_say(tmp_path: Path, cluster: Any) -> None:
    make_dataset(tmp_path / "in", {"a": 5, "b": 3})
    names = ["width", "aspect_ratio", "blur", "brightness", "caption_length", "caption_words", "caption_alphanumeric"]
    with cluster.as_current():
        written = run_pipeline(
            tmp_path / "in", tmp_path / "out", ImageStatsStage(names),
            BlocklistFilterStage(["000003"], str(tmp_path / "lists")), ExpressionFilterStage("seed > 0"),
        )  # fmt: skip
    dataset = ImageTextPairDataset.from_webdataset(tmp_path / "in")
    said = CaptionStats()(ImageQualityStats(sizes=True)(dataset)).metadata.compute().set_index("seed")
    assert written["seed"].tolist() == [1, 2, 4, 5, 6, 7]
    for name in names:
        assert written[name].tolist() == said[name].loc[written["seed"]].tolist()
        assert written.dtypes[name] == said.dtypes[name]


def test_measures_that_there_are(tmp_path: Path) -> None:
    for columns in ([], ["nosuch"], ["caption_count"]):
        with pytest.raises(ArgumentError, match="measure"):
            ImageStatsStage(columns)
    stage = ImageStatsStage(["blur"])
    bad = image("bad", data=b"no picture")
    made = stage.process(ImageBatch([bad, image("good", data=SHARP)]))
    assert [one.metadata["blur"] is None for one in made.data] == [True, False]
    assert made.fields.field("blur").type == pa.float32()


def test_yaml_names_them(tmp_path: Path) -> None:
    stages = [
        {"_target_": "nemo_image.stages.FilePartitioningStage", "file_paths": str(tmp_path)},
        {"_target_": "nemo_image.stages.ImageReaderStage"},
        {"_target_": "nemo_image.stages.ImageStatsStage", "columns": ["blur", "caption_words"]},
        {"_target_": "nemo_image.stages.ImageQualityFilterStage", "min_blur": 50},
        {"_target_": "nemo_image.stages.CaptionFilterStage", "min_words": 2, "min_alphanumeric": 0.4},
        {"_target_": "nemo_image.stages.BlocklistFilterStage", "entries": ["a"], "list_dir": str(tmp_path / "l")},
        {"_target_": "nemo_image.stages.ExpressionFilterStage", "expression": "brightness > 20 and width > 8"},
    ]
    described = build_pipeline({"stages": stages}).describe()
    for name in ("image_stats", "image_quality_filter", "blocklist_filter", "expression_filter"):
        assert name in described
