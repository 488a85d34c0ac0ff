"""Filters that need no model."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from nemo_image.errors import ArgumentError, MissingColumnError
from nemo_image.stages.filters import CaptionFilterStage, ExpressionFilterStage, ImageFilterStage, ImageSizeFilterStage
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.tasks import ImageBatch
from tests.makers import encoded, picture


def image(
    name: str = "x", caption: str | None = None, size: tuple[int, int] | None = None, **metadata: Any
) -> ImageObject:
    data = None if size is None else encoded(picture(0, *size))
    return ImageObject(image_id=name, caption=caption, metadata=metadata, image_bytes=data)


def kept(stage: ImageFilterStage, *images: ImageObject, fields: pa.Schema | None = None) -> list[str]:
    return [one.image_id for one in stage.process(ImageBatch(list(images), fields=fields or pa.schema([]))).data]


def test_a_filter_of_ones_own_is_one_method() -> None:
    class Long(ImageFilterStage):
        def keep(self, image: ImageObject) -> bool:
            return len(image.image_id) > 1

    assert kept(Long(), image("a"), image("bb"), image("ccc")) == ["bb", "ccc"]
    assert Long().name == "long"


def test_bad_images_go_unless_the_filter_keeps_them() -> None:
    class All(ImageFilterStage):
        def keep(self, image: ImageObject) -> bool:
            assert image.image_error is None
            return True

    bad = image("bad")
    bad.image_error = "truncated: x"
    assert kept(All(), image("a"), bad) == ["a"]
    tolerant = All()
    tolerant.keeps_bad_images = True
    assert kept(tolerant, image("a"), bad) == ["a", "bad"]


def test_an_image_that_turns_out_to_be_bad_stops_nothing() -> None:
    class Bright(ImageFilterStage):
        def keep(self, image: ImageObject) -> bool:
            assert image.image_data is not None
            return bool(image.image_data.mean() >= 0)

    bad = ImageObject(image_id="bad", image_bytes=b"no picture")
    assert kept(Bright(), image("a", size=(8, 8)), bad, image("b", size=(8, 8))) == ["a", "b"]
    assert str(bad.image_error).startswith("unknown:")


def test_a_filter_without_keep_says_so() -> None:
    class Nothing(ImageFilterStage):
        pass

    with pytest.raises(NotImplementedError, match=r"Nothing must override keep\(image\)"):
        kept(Nothing(), image())


def test_captions() -> None:
    images = [
        image("none"),
        image("blank", "  \n"),
        image("one", "word"),
        image("two", " two words "),
        image("long", "a b c d e f"),
    ]
    assert kept(CaptionFilterStage(), *images) == ["one", "two", "long"]
    assert kept(CaptionFilterStage(min_length=0), *images) == ["none", "blank", "one", "two", "long"]
    assert kept(CaptionFilterStage(min_length=9), *images) == ["two", "long"]
    assert kept(CaptionFilterStage(max_length=9), *images) == ["one", "two"]
    assert kept(CaptionFilterStage(min_words=2, max_words=5), *images) == ["two"]


def test_sizes() -> None:
    images = [
        image("wide", size=(400, 100)),
        image("square", size=(100, 100)),
        image("tall", size=(50, 100)),
        image("none"),
    ]
    assert kept(ImageSizeFilterStage(), *images) == ["wide", "square", "tall"]
    assert kept(ImageSizeFilterStage(min_width=100), *images) == ["wide", "square"]
    assert kept(ImageSizeFilterStage(max_width=100, min_height=100), *images) == ["square", "tall"]
    assert kept(ImageSizeFilterStage(max_aspect_ratio=2), *images) == ["square", "tall"]
    assert kept(ImageSizeFilterStage(max_aspect_ratio=4, max_height=99), *images) == []


def test_sizes_need_no_decoding() -> None:
    cut = encoded(picture(1, 64, 48))[:700]
    bad = ImageObject(image_id="cut", image_bytes=cut)
    assert kept(ImageSizeFilterStage(min_width=64), bad) == ["cut"]
    assert not bad.holds_pixels
    assert kept(ImageSizeFilterStage(), ImageObject(image_id="no picture", image_bytes=b"nothing of the kind")) == []


def test_expressions() -> None:
    images = [image("a", "a dog", (64, 48), score=3), image("b", None, (32, 48), score=5), image("c", "cat", (64, 64))]
    images[0].aesthetic_score = 6.0
    assert kept(ExpressionFilterStage("width >= 64"), *images) == ["a", "c"]
    assert kept(ExpressionFilterStage("score > 2 and not contains(caption, 'x')"), *images) == ["a"]
    assert kept(ExpressionFilterStage("aesthetic_score is None"), *images) == ["b", "c"]
    assert kept(ExpressionFilterStage("key in ['a', 'c']"), *images) == ["a", "c"]
    assert ExpressionFilterStage("score > 2").keep(images[1])


def test_a_name_that_nothing_has_is_an_error_and_one_that_is_null_is_not() -> None:
    fields = pa.schema([("score", pa.int64())])
    assert kept(ExpressionFilterStage("score > 2"), image("a"), fields=fields) == []
    assert kept(ExpressionFilterStage("score is None"), image("a"), fields=fields) == ["a"]
    with pytest.raises(MissingColumnError, match="'scoer'"):
        kept(ExpressionFilterStage("scoer > 2"), image("a", score=3))
    assert kept(ExpressionFilterStage("scoer > 2")) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CaptionFilterStage(min_length=-1), "min_length"),
        (lambda: CaptionFilterStage(min_words=3, max_words=2), "min_words=3 is more than max_words=2"),
        (lambda: ImageSizeFilterStage(min_width=1.5), "min_width must be a whole number"),  # type: ignore[arg-type]
        (lambda: ImageSizeFilterStage(max_aspect_ratio=0.5), "max_aspect_ratio"),
        (lambda: ExpressionFilterStage("import os"), "not an expression"),
        (lambda: ExpressionFilterStage("__import__('os')"), "not allowed"),
    ],
)
def test_arguments(make: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()
