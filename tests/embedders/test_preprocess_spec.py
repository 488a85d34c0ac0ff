"""Specifications and their integers against torchvision's, timm's and open_clip's own transforms."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.transforms import CenterCropOrPad, MaybeToTensor, ResizeKeepRatio
from timm.models import get_pretrained_cfg
from torchvision import transforms as tv

from nemo_image.embedders.preprocess import PreprocessSpec, ResizePlan, spec_from_transform
from nemo_image.embedders.preprocess.pillow_path import _window
from nemo_image.shards.decode import upright
from tests.makers import picture

HALF = (0.5, 0.5, 0.5)
NORMALIZE = tv.Normalize(HALF, HALF)


def spec(**fields: Any) -> PreprocessSpec:
    defaults: dict[str, Any] = {"resize": "shortest", "resize_size": (256, 256), "crop": (224, 224)}
    return PreprocessSpec(**{**defaults, "mean": HALF, "std": HALF, **fields})


# ------------------------------------------------------------------------------------------------------ conversion


def test_timms_default_transform() -> None:
    transform = create_transform((3, 224, 224), interpolation="bicubic", crop_pct=0.875, mean=HALF, std=HALF)
    assert spec_from_transform(transform) == spec()


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"crop_pct": 1.0}, {"resize_size": (224, 224)}),
        ({"crop_mode": "squash", "crop_pct": 0.9}, {"resize": "exact", "resize_size": (248, 248)}),
        (
            {"crop_mode": "border", "crop_pct": 0.9, "mean": (0.5, 0.25, 0.75)},
            {
                "resize": "ratio",
                "resize_size": (248, 248),
                "longest": 1.0,
                "fill": (128, 64, 191),
                "mean": (0.5, 0.25, 0.75),
            },
        ),
        ({"interpolation": "bilinear"}, {"interpolation": "bilinear"}),
        (
            {"input_size": (3, 128, 256), "crop_pct": 0.5},
            {"resize": "ratio", "resize_size": (256, 512), "crop": (128, 256)},
        ),
    ],
    ids=["whole", "squash", "border", "bilinear", "oblong"],
)
def test_timms_other_transforms(options: dict[str, Any], fields: dict[str, Any]) -> None:
    base = {"input_size": (3, 224, 224), "interpolation": "bicubic", "crop_pct": 0.875, "mean": HALF, "std": HALF}
    assert spec_from_transform(create_transform(**{**base, **options})) == spec(**fields)


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({}, {"resize_size": (224, 224)}),
        ({"resize_mode": "squash"}, {"resize": "exact", "resize_size": (224, 224)}),
        (
            {"resize_mode": "longest", "fill_color": 7},
            {"resize": "ratio", "resize_size": (224, 224), "longest": 1.0, "fill": (7, 7, 7)},
        ),
        ({"interpolation": "bilinear"}, {"resize_size": (224, 224), "interpolation": "bilinear"}),
    ],
    ids=["shortest", "squash", "longest", "bilinear"],
)
def test_open_clips_transforms(options: dict[str, Any], fields: dict[str, Any]) -> None:
    image_transform = pytest.importorskip("open_clip.transform").image_transform
    transform = image_transform(224, is_train=False, mean=HALF, std=HALF, **options)
    assert spec_from_transform(transform) == spec(**fields)


def test_every_pretrained_model_of_timms_converts() -> None:
    names = timm.list_models(pretrained=True)
    assert len(names) > 1000
    for name in names:
        config = resolve_data_config(pretrained_cfg=get_pretrained_cfg(name).to_dict())
        found = spec_from_transform(create_transform(**config))
        assert found is not None, name
        assert found.crop == config["input_size"][1:], name
        assert found.interpolation == config["interpolation"], name
        assert np.allclose([found.mean, found.std], [config["mean"], config["std"]], atol=1e-7), name


RESIZE, CROP = tv.Resize(256), tv.CenterCrop(224)


class OwnCrop(tv.CenterCrop):
    """A subclass may do something else."""


@pytest.mark.parametrize(
    "steps",
    [
        [RESIZE, CROP, tv.ToTensor()],
        [RESIZE, tv.ToTensor(), NORMALIZE],
        [CROP, RESIZE, tv.ToTensor(), NORMALIZE],
        [RESIZE, CROP, NORMALIZE, tv.ToTensor()],
        [RESIZE, CROP, tv.PILToTensor(), NORMALIZE],
        [RESIZE, CROP, tv.ToTensor(), NORMALIZE, NORMALIZE],
        [RESIZE, OwnCrop(224), tv.ToTensor(), NORMALIZE],
        [RESIZE, CROP, tv.Lambda(lambda image: image), tv.ToTensor(), NORMALIZE],
        [RESIZE, CROP, tv.Grayscale(3), tv.ToTensor(), NORMALIZE],
        [tv.Resize(256, max_size=300), CROP, tv.ToTensor(), NORMALIZE],
        [tv.Resize(256, tv.InterpolationMode.NEAREST_EXACT), CROP, tv.ToTensor(), NORMALIZE],
        [ResizeKeepRatio(256, interpolation="random"), CROP, tv.ToTensor(), NORMALIZE],
        [ResizeKeepRatio(256, random_scale_prob=0.5), CROP, tv.ToTensor(), NORMALIZE],
        [RESIZE, CenterCropOrPad(224, padding_mode="reflect"), tv.ToTensor(), NORMALIZE],
        [RESIZE, CROP, tv.ToTensor(), tv.Normalize([0.5], [0.5])],
        [],
    ],
)
def test_unknown_steps_do_not_convert(steps: list[Any]) -> None:
    assert spec_from_transform(tv.Compose(steps)) is None


def test_what_is_no_composition_does_not_convert() -> None:
    assert spec_from_transform(tv.ToTensor()) is None
    assert spec_from_transform(lambda image: image) is None
    training = create_transform((3, 224, 224), is_training=True)
    assert spec_from_transform(training) is None


def test_a_spec_is_a_key_and_json() -> None:
    assert {spec(): 1}[spec()] == 1
    assert hash(spec()) != hash(spec(fill=(1, 1, 1)))
    record = json.loads(json.dumps(spec().to_dict()))
    assert PreprocessSpec(**{key: tuple(v) if isinstance(v, list) else v for key, v in record.items()}) == spec()


# --------------------------------------------------------------------------------------------------------- integers

SIDES = st.integers(1, 700)
RULES = {
    "shortest": lambda size, longest: tv.Resize(size[0], tv.InterpolationMode.NEAREST),
    "exact": lambda size, longest: tv.Resize(size, tv.InterpolationMode.NEAREST),
    "ratio": lambda size, longest: ResizeKeepRatio(size, longest=longest, interpolation="nearest"),
}


@given(
    rule=st.sampled_from(sorted(RULES)),
    width=SIDES,
    height=SIDES,
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    crop=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    longest=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_the_plan_is_what_the_transform_does(
    rule: Any, width: int, height: int, size: tuple[int, int], crop: tuple[int, int], longest: float
) -> None:
    if rule == "shortest":
        size = (size[0], size[0])
    plan = spec(resize=rule, resize_size=size, crop=crop, longest=longest).plan(width, height)
    assume(plan.resize_w * plan.resize_h < 10**6)
    # A picture whose pixels say where they are: what is cut out of it shows the offsets.
    resized = RULES[rule](size, longest)(Image.new("I", (width, height))) if min(plan.resize_w, plan.resize_h) else None
    assume(resized is not None)
    assert resized.size == (plan.resize_w, plan.resize_h)
    places = np.arange(1, plan.resize_w * plan.resize_h + 1, dtype=np.int32).reshape(plan.resize_h, plan.resize_w)
    expected = np.asarray(tv.CenterCrop(crop)(Image.fromarray(places)))
    left, top = plan.crop_left, plan.crop_top
    framed = np.pad(places, ((max(-top, 0), plan.crop_h), (max(-left, 0), plan.crop_w)))
    found = framed[max(top, 0) :, max(left, 0) :][: plan.crop_h, : plan.crop_w]
    assert (found == expected).all()


@given(st.integers(1, 400), st.integers(1, 400), st.booleans())
def test_crop_or_pad_fills_as_timm_does(width: int, height: int, border: bool) -> None:
    image = Image.new("RGB", (width, height), (1, 2, 3))
    resize = ResizeKeepRatio((60, 60), longest=float(border), interpolation="nearest")
    transform = tv.Compose([resize, CenterCropOrPad((50, 55), fill=[9, 8, 7]), MaybeToTensor(), NORMALIZE])
    found = spec_from_transform(transform)
    assert found is not None
    plan = found.plan(width, height)
    assume(min(plan.resize_w, plan.resize_h) > 0 and plan.resize_w * plan.resize_h < 10**6)
    expected = transform.transforms[1](resize(image))
    assert (np.asarray(_window(image, plan, found)) == np.asarray(expected)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("width", "height"), [(40, 30), (33, 50), (10, 9)])
def test_the_stored_pictures_window_is_turned_into_the_plans(orientation: int, width: int, height: int) -> None:
    # 9 and 20 are an odd and an even number of pixels away from some of the sizes, on either side.
    plan = ResizePlan(width, height, crop_left=(width - 20) // 2, crop_top=(height - 9) // 3, crop_w=20, crop_h=9)
    stored = torch.from_numpy(np.array(picture(3, *((height, width) if orientation >= 5 else (width, height)))))
    stored = stored.permute(2, 0, 1)
    before = plan.before_orientation(orientation)
    assert (before.resize_h, before.resize_w) == tuple(stored.shape[1:])
    expected = _cut(upright(stored, orientation), plan)
    assert torch.equal(upright(_cut(stored, before), orientation), expected)


def _cut(pixels: torch.Tensor, plan: ResizePlan) -> torch.Tensor:
    pad = 30
    framed = torch.nn.functional.pad(pixels, (pad, pad, pad, pad))
    top, left = plan.crop_top + pad, plan.crop_left + pad
    return framed[:, top : top + plan.crop_h, left : left + plan.crop_w]


def test_known_integers() -> None:
    # 640 x 480 to 256: int(256 * 640 / 480) = 341, and (341 - 224) / 2 = 58.5 rounds to the even 58
    assert spec().plan(640, 480) == ResizePlan(341, 256, 58, 16, 224, 224)
    assert spec().plan(480, 640) == ResizePlan(256, 341, 16, 58, 224, 224)
    assert spec(resize_size=(100, 100)).plan(640, 480) == ResizePlan(133, 100, -45, -62, 224, 224)
    assert spec(resize="ratio", resize_size=(224, 224), longest=1.0).plan(100000, 1).resize_h == 0
