"""CLIP image towers against open_clip's implementation of them, holding the same seeded random weights.

Each check is also made with a mistake put in on purpose, which it must find.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_image.embedders import timm_models
from nemo_image.embedders.preprocess import TorchvisionPreprocessor, normalize, spec_from_transform
from tests.conftest import SHARED
from tests.images import PHOTOGRAPHS, photograph
from tests.makers import encoded

open_clip = pytest.importorskip("open_clip")

OUTPUT_TOLERANCE = 1e-5
PIXEL_TOLERANCE = 1.0 + 1e-3  # of 255


@dataclass
class Towers:
    """The same tower twice: open_clip's, and ours made from its saved weights."""

    theirs: Any
    theirs_transform: Any
    ours: Any
    ours_transform: Any
    weights: Path
    name: str
    gelu_name: str
    size: int


CASES = [
    # timm crops OpenAI's B/32 to 0.9 of the picture; for MetaCLIP's both libraries use the whole.
    pytest.param(("ViT-B-32-quickgelu", "vit_base_patch32_clip_quickgelu_224.metaclip_400m", 512), id="B-32"),
    pytest.param(
        ("ViT-L-14-quickgelu", "vit_large_patch14_clip_quickgelu_224.openai", 768), id="L-14", marks=pytest.mark.slow
    ),
]


@pytest.fixture(scope="module", params=CASES)
def towers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Towers:
    theirs_name, ours_name, size = request.param
    config = open_clip.get_model_config(theirs_name)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        # The text tower has no part in this, and is half of the parameters.
        theirs = open_clip.model._build_vision_tower(
            config["embed_dim"], open_clip.CLIPVisionCfg(**config["vision_cfg"]), quick_gelu=True
        ).eval()
    weights = tmp_path_factory.mktemp("weights") / "visual.pt"
    torch.save({f"visual.{name}": value for name, value in theirs.state_dict().items()}, weights)
    ours = timm_models.create_model(ours_name, pretrained=False, weights=str(weights))
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    transform = open_clip.image_transform(224, is_train=False, mean=mean, std=std)
    _, ours_transform = timm_models.describe(ours_name)
    gelu_name = ours_name.partition(".")[0].replace("_quickgelu", "") + ".openai"
    return Towers(theirs, transform, ours, ours_transform, weights, ours_name, gelu_name, size)


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    """Real photographs: the shared ones where they are there, scikit-image's elsewhere."""
    folder = SHARED / "data" / "photos"
    if folder.is_dir():
        return [path.read_bytes() for path in sorted(folder.glob("*.jpg"))[:60]]
    return [encoded(photograph(name), quality=95) for name in PHOTOGRAPHS]


def reference(transform: Any, blobs: list[bytes]) -> torch.Tensor:
    from io import BytesIO

    from PIL import Image

    return torch.stack([transform(Image.open(BytesIO(blob))) for blob in blobs])


def worst_level(made: torch.Tensor, wanted: torch.Tensor, std: Any) -> float:
    """Return the largest difference of two normalised batches, in levels of 255."""
    return float(((made - wanted).abs() * torch.tensor(std).view(3, 1, 1) * 255).max())


def prepared(spec: Any, blobs: list[bytes]) -> torch.Tensor:
    batch = TorchvisionPreprocessor(spec, 2)(blobs)
    assert batch.errors == [None] * len(blobs)
    return normalize(batch.pixels, spec)


def test_preprocessed_tensors_agree(towers: Towers, pictures: list[bytes]) -> None:
    spec = spec_from_transform(towers.ours_transform)
    assert spec is not None
    wanted = reference(towers.theirs_transform, pictures)
    assert worst_level(prepared(spec, pictures), wanted, spec.std) <= PIXEL_TOLERANCE


def test_a_bilinear_resize_is_found(towers: Towers, pictures: list[bytes]) -> None:
    spec = spec_from_transform(towers.ours_transform)
    assert spec is not None
    wrong = replace(spec, interpolation="bilinear")
    wanted = reference(towers.theirs_transform, pictures)
    assert worst_level(prepared(wrong, pictures), wanted, spec.std) > 10 * PIXEL_TOLERANCE


def test_imagenet_mean_and_std_are_found(towers: Towers, pictures: list[bytes]) -> None:
    spec = spec_from_transform(towers.ours_transform)
    assert spec is not None
    wrong = replace(spec, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    wanted = reference(towers.theirs_transform, pictures)
    assert worst_level(prepared(wrong, pictures), wanted, spec.std) > 10 * PIXEL_TOLERANCE


def outputs(model: Any, pixels: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        made = model(pixels)
    return (made / made.norm(dim=1, keepdim=True)).double().numpy()


def test_outputs_on_identical_input_agree(towers: Towers, pictures: list[bytes]) -> None:
    pixels = reference(towers.theirs_transform, pictures[:4])
    ours, theirs = outputs(towers.ours, pixels), outputs(towers.theirs, pixels)
    assert ours.shape == (4, towers.size)
    assert np.abs(ours - theirs).max() <= OUTPUT_TOLERANCE
    # The pictures differ by far more than the tolerance, so agreement says something.
    assert np.abs(theirs[0] - theirs[1]).max() > 100 * OUTPUT_TOLERANCE


def test_gelu_for_quickgelu_is_found(towers: Towers, pictures: list[bytes]) -> None:
    wrong = timm_models.create_model(towers.gelu_name, pretrained=False, weights=str(towers.weights))
    pixels = reference(towers.theirs_transform, pictures[:2])
    assert np.abs(outputs(wrong, pixels) - outputs(towers.theirs, pixels)).max() > 10 * OUTPUT_TOLERANCE


def test_projection_head_is_kept(towers: Towers) -> None:
    assert timm_models.keeps_head(towers.name)
    assert timm_models.describe(towers.name)[0] == towers.size


@pytest.mark.parametrize(
    ("name", "kept", "size"),
    [
        ("vit_base_patch32_clip_224.laion2b_ft_in1k", False, 768),
        ("vit_base_patch32_clip_224.laion2b", True, 512),
        ("convnext_base.clip_laion2b", True, 640),
        ("convnext_base.fb_in1k", False, 1024),
        ("resnet50_clip.openai", True, 1024),
        ("tf_efficientnet_lite0", False, 1280),
        ("vit_base_patch16_siglip_224.webli", False, 768),
    ],
)
def test_which_models_keep_a_head(name: str, kept: bool, size: int) -> None:
    assert timm_models.keeps_head(name) is kept
    assert timm_models.describe(name)[0] == size


def test_random_weights_are_the_same_everywhere() -> None:
    one = timm_models.create_model("test_vit", pretrained=False, weights=None).state_dict()
    two = timm_models.create_model("test_vit", pretrained=False, weights=None).state_dict()
    assert timm_models.state_sha256(one) == timm_models.state_sha256(two)
    two["pos_embed"][..., 0] += 1
    assert timm_models.state_sha256(one) != timm_models.state_sha256(two)
