"""An image object: where its bytes and pixels come from, and what travels between processes."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nemo_image.errors import ArgumentError, ImageError
from nemo_image.shards.index import index_tar
from nemo_image.stages.image_object import ImageObject, SampleSource
from nemo_image.stages.tasks import ImageBatch
from tests.makers import encoded, picture, sample, write_tar


@pytest.fixture
def stored(tmp_path: Path) -> ImageObject:
    """An image that lies in a tar."""
    write_tar(tmp_path / "a.tar", [sample(3, "x", "a caption")])
    (found,) = index_tar(str(tmp_path / "a.tar")).samples
    source = SampleSource(str(tmp_path / "a.tar"), found)
    return ImageObject("a.tar/x.jpg", "x", caption="a caption", shard="a", source=source)


def test_bytes_and_pixels_are_had_when_asked_for(stored: ImageObject) -> None:
    data = encoded(picture(3), quality=90)
    assert stored.image_bytes == data
    assert not stored.holds_pixels
    pixels = stored.image_data
    assert pixels is not None
    assert pixels.shape == (48, 64, 3)
    import io

    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert stored.holds_pixels
    assert not stored.has_own_pixels


def test_decoded_pixels_cannot_be_written_to(stored: ImageObject) -> None:
    pixels = stored.image_data
    assert pixels is not None
    with pytest.raises(ValueError, match="read-only"):
        pixels[0, 0, 0] = 1


def test_assigned_pixels_count_until_they_are_dropped(stored: ImageObject) -> None:
    stored.prepared["model"] = object()
    own = np.zeros((2, 3, 3), np.uint8)
    stored.image_data = own
    assert stored.image_data is own
    assert stored.has_own_pixels
    assert not stored.prepared
    stored.drop_pixels()
    assert not stored.has_own_pixels
    assert stored.image_data is not None
    assert stored.image_data.shape == (48, 64, 3)


def test_none_drops_pixels(stored: ImageObject) -> None:
    assert stored.image_data is not None
    stored.image_data = None
    assert not stored.holds_pixels


@pytest.mark.parametrize("pixels", [np.zeros((2, 3), np.uint8), np.zeros((2, 3, 4), np.uint8), np.zeros((2, 3, 3))])
def test_other_arrays_are_refused(stored: ImageObject, pixels: np.ndarray) -> None:
    with pytest.raises(ArgumentError, match="image_data of 'x' must be uint8 of shape"):
        stored.image_data = pixels


def test_assigned_bytes_replace_the_picture(stored: ImageObject) -> None:
    assert stored.image_data is not None
    assert stored.stored_size() == (64, 48)
    stored.image_bytes = encoded(picture(4, 10, 20), "PNG")
    assert stored.image_data.shape == (20, 10, 3)
    assert stored.stored_size() == (10, 20)
    assert stored.files["jpg"].startswith(b"\x89PNG")


def test_little_travels(stored: ImageObject) -> None:
    stored.files["jpg"] = stored.image_bytes or b""
    assert stored.image_data is not None
    stored.prepared["model"] = np.zeros(1_000_000)
    stored.embedding = np.ones(4, np.float32)
    text = pickle.dumps(stored)
    assert len(text) < 2_000
    other = pickle.loads(text)
    assert not other.holds_pixels
    assert not other.files
    assert other.image_bytes == stored.image_bytes
    assert np.array_equal(other.image_data, stored.image_data)
    assert np.array_equal(other.embedding, stored.embedding)
    assert (other.caption, other.shard, other.image_id) == ("a caption", "a", "x")


def test_what_a_stage_made_travels(stored: ImageObject) -> None:
    stored.image_bytes = encoded(picture(4, 10, 20), "PNG")
    assert pickle.loads(pickle.dumps(stored)).image_bytes == stored.image_bytes
    own = ImageObject(image_id="y", image_data=np.full((2, 2, 3), 7, np.uint8))
    assert np.array_equal(pickle.loads(pickle.dumps(own)).image_data, own.image_data)
    made = ImageObject(image_id="z", image_bytes=b"bytes")
    assert pickle.loads(pickle.dumps(made)).image_bytes == b"bytes"


def test_an_image_of_nothing_and_a_bad_one() -> None:
    assert ImageObject().image_data is None
    assert ImageObject().stored_size() is None
    bad = ImageObject(image_bytes=b"no picture")
    with pytest.raises(ImageError, match="unknown"):
        _ = bad.image_data
    assert str(bad.image_error).startswith("unknown:")
    assert bad.image_data is None


def test_size_of_pixels_without_a_file() -> None:
    assert ImageObject(image_data=np.zeros((2, 5, 3), np.uint8)).stored_size() == (5, 2)


def test_repr_says_what_is_known(stored: ImageObject) -> None:
    stored.aesthetic_score = 5.5
    assert repr(stored) == "ImageObject(image_path='a.tar/x.jpg', image_id='x', aesthetic_score=5.5)"


def test_a_batch_with_other_images(stored: ImageObject) -> None:
    task = ImageBatch([stored, ImageObject()], "id", "name", {"a": 1})
    other = task.with_images([stored])
    assert (other.task_id, other.dataset_name, other.metadata, other.num_items) == ("id", "name", {"a": 1}, 1)
    assert task.num_items == 2
