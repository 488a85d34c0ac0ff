"""The open_clip embedder against open_clip's own pipeline, on real photographs with their captions.

Each check is also made with a mistake put in on purpose, which it must find.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import OpenClipImageEmbedder
from nemo_image.embedders.forward import on_device
from nemo_image.embedders.open_clip import PreparedOpenClipEmbedder
from nemo_image.engine import threads
from tests.conftest import SHARED
from tests.images import PHOTOGRAPHS, photograph
from tests.makers import encoded, write_tar

open_clip = pytest.importorskip("open_clip")

PIXEL_TOLERANCE = 1.0 + 1e-3  # of 255
OUTPUT_TOLERANCE = 1e-5
SCORE_TOLERANCE = 1e-4

Pairs = list[tuple[bytes, list[str]]]

CASES = ["ViT-S-32-alt", "RN50", *os.environ.get("NEMO_IMAGE_TEST_MODELS", "").split()]
"""open_clip's names; the variable adds others, such as ``ViT-L-14-quickgelu``, which take minutes."""


@dataclass
class Both:
    """The same weights twice: in open_clip's own pipeline, and in our embedder."""

    theirs: Any
    transform: Any
    tokenize: Any
    ours: PreparedOpenClipEmbedder


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Let torch's threads not wait for each other on a busy machine."""
    with threads.torch_threads(1):
        yield


@pytest.fixture(scope="module", params=CASES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    name = request.param
    weights = tmp_path_factory.mktemp("weights") / "weights.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        torch.save(open_clip.create_model(name).state_dict(), weights)
    theirs, _, transform = open_clip.create_model_and_transforms(name, pretrained=str(weights))
    ours = OpenClipImageEmbedder(name, weights=weights, autocast=False, captions="json:captions").load()
    return Both(theirs.eval(), transform, open_clip.get_tokenizer(name), ours)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    """Photographs, each with several captions: shared ones, or else scikit-image's."""
    folder = SHARED / "data" / "photos"
    if (folder / "captions.jsonl").is_file():
        lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
        return [((folder / one["file"]).read_bytes(), one["captions"][:3]) for one in lines[:6]]
    names = [Path(name).stem.replace("_", " ") for name in PHOTOGRAPHS]
    captions = [[f"a photo of {name}", f"{name}, seen from afar in the evening", name] for name in names]
    return [(encoded(photograph(name), quality=95), some) for name, some in zip(PHOTOGRAPHS, captions, strict=True)]


# The checks ----------------------------------------------------------------------------------------------------------


def their_pixels(both: Both, pairs: Pairs) -> torch.Tensor:
    return torch.stack([both.transform(Image.open(io.BytesIO(blob))) for blob, _ in pairs])


def our_pixels(both: Both, pairs: Pairs) -> torch.Tensor:
    prepare = both.ours.preprocessor("cpu", 2)
    return on_device(prepare, prepare([blob for blob, _ in pairs]), "cpu")


def check_pixels(both: Both, made: torch.Tensor, wanted: torch.Tensor) -> None:
    std = torch.tensor(both.ours.preprocessor("cpu", 1).spec.std).view(3, 1, 1)  # type: ignore[union-attr]
    assert float(((made - wanted).abs() * std * 255).max()) <= PIXEL_TOLERANCE


def check_tokens(both: Both, made: torch.Tensor, texts: Sequence[str]) -> None:
    wanted = both.tokenize(list(texts))
    assert made.shape == wanted.shape
    assert torch.equal(made, wanted)


def check_outputs(made: np.ndarray, wanted: torch.Tensor) -> None:
    unit = torch.nn.functional.normalize(wanted, dim=1).numpy()
    assert np.abs(made - unit).max() <= OUTPUT_TOLERANCE


def check_scores(made: Sequence[float], wanted: Sequence[float]) -> None:
    assert np.abs(np.array(made) - np.array(wanted)).max() <= SCORE_TOLERANCE


def unit_rows(made: np.ndarray) -> np.ndarray:
    return made / np.linalg.norm(made, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def their_scores(both: Both, pairs: Pairs) -> list[float]:
    """The best of open_clip's cosines, one pair at a time."""
    found = []
    for blob, captions in pairs:
        with torch.inference_mode():
            picture = both.theirs.encode_image(both.transform(Image.open(io.BytesIO(blob)))[None], normalize=True)
            texts = both.theirs.encode_text(both.tokenize(captions), normalize=True)
        found.append(float((texts @ picture[0]).max()))
    return found


def our_tokens(both: Both, texts: Sequence[str]) -> torch.Tensor:
    tokenizer = both.ours.tokenizer
    return tokenizer([tokenizer.clean(text) for text in texts])


def our_scores(both: Both, pairs: Pairs, folder: Path) -> list[float]:
    """Run the whole way: a tar in, the column out."""
    samples = [
        (f"{number:03d}", {"jpg": blob, "json": json.dumps({"captions": captions}).encode()})
        for number, (blob, captions) in enumerate(pairs)
    ]
    write_tar(folder / "a.tar", samples)
    settings = {"weights": both.ours.weights, "autocast": False, "captions": "json:captions"}
    embedder = OpenClipImageEmbedder(both.ours.model_name, **settings)
    frame = embedder(ImageTextPairDataset.from_webdataset(folder)).metadata.compute()
    assert frame["image_error"].isna().all()
    return frame["clip_score"].tolist()


# The same ------------------------------------------------------------------------------------------------------------


def test_preprocessed_pictures(both: Both, pairs: Pairs) -> None:
    check_pixels(both, our_pixels(both, pairs), their_pixels(both, pairs))


def test_tokens(both: Both, pairs: Pairs) -> None:
    texts = [text for _, captions in pairs for text in captions]
    check_tokens(both, our_tokens(both, texts), texts)


def test_outputs_on_the_same_input(both: Both, pairs: Pairs) -> None:
    pixels = their_pixels(both, pairs[:4])
    texts = [captions[0] for _, captions in pairs[:4]]
    with torch.inference_mode():
        check_outputs(unit_rows(both.ours.embed(pixels)), both.theirs.encode_image(pixels))
        check_outputs(both.ours.embed_text(texts), both.theirs.encode_text(both.tokenize(texts)))


def test_clip_score(both: Both, pairs: Pairs, their_scores: list[float], tmp_path: Path) -> None:
    check_scores(our_scores(both, pairs, tmp_path), their_scores)


def test_single_pictures_and_texts(both: Both, pairs: Pairs, their_scores: list[float]) -> None:
    pictures = both.ours.embed_pictures([blob for blob, _ in pairs])
    texts = [both.ours.embed_text(captions) for _, captions in pairs]
    check_scores([float((some @ one).max()) for some, one in zip(texts, pictures, strict=True)], their_scores)


# Mistakes that the checks must find ----------------------------------------------------------------------------------


def fails(check: Callable[[], None]) -> None:
    with pytest.raises(AssertionError):
        check()


def test_another_resize_is_found(both: Both, pairs: Pairs) -> None:
    wrong = OpenClipImageEmbedder(both.ours.model_name, image_interpolation="bilinear").preprocessor("cpu", 2)
    made = on_device(wrong, wrong([blob for blob, _ in pairs]), "cpu")
    fails(lambda: check_pixels(both, made, their_pixels(both, pairs)))


def test_pictures_that_are_not_normalised_are_found(both: Both, pairs: Pairs) -> None:
    made = both.ours.preprocessor("cpu", 2)([blob for blob, _ in pairs]).pixels / 255
    fails(lambda: check_pixels(both, made, their_pixels(both, pairs)))


def test_another_context_length_is_found(both: Both, pairs: Pairs) -> None:
    texts = [text for _, captions in pairs for text in captions]
    fails(lambda: check_tokens(both, open_clip.get_tokenizer(both.ours.model_name, context_length=64)(texts), texts))
    short = torch.nn.functional.pad(open_clip.get_tokenizer(both.ours.model_name, context_length=8)(texts), (0, 69))
    fails(lambda: check_tokens(both, short, texts))


def test_embeddings_that_are_not_normalised_are_found(both: Both, pairs: Pairs, their_scores: list[float]) -> None:
    pixels = their_pixels(both, pairs[:2])
    with torch.inference_mode():
        fails(lambda: check_outputs(both.ours.embed(pixels), both.theirs.encode_image(pixels)))
        pictures = both.theirs.encode_image(their_pixels(both, pairs))
        texts = [both.theirs.encode_text(both.tokenize(captions)) for _, captions in pairs]
    products = [float((some @ picture).max()) for some, picture in zip(texts, pictures, strict=True)]
    fails(lambda: check_scores(products, their_scores))


def test_the_first_caption_for_the_best_is_found(
    both: Both, pairs: Pairs, their_scores: list[float], tmp_path: Path
) -> None:
    first = [(blob, captions[:1]) for blob, captions in pairs]
    fails(lambda: check_scores(our_scores(both, first, tmp_path), their_scores))


def test_another_activation_is_found(both: Both, pairs: Pairs) -> None:
    if both.ours.fingerprint()["quick_gelu"] or both.ours.model_name == "RN50":
        pytest.skip("the model has QuickGELU already, or a tower of ReLUs")
    wrong = OpenClipImageEmbedder(both.ours.model_name, weights=both.ours.weights, force_quick_gelu=True).load()
    pixels = their_pixels(both, pairs[:2])
    with torch.inference_mode():
        fails(lambda: check_outputs(unit_rows(wrong.embed(pixels)), both.theirs.encode_image(pixels)))
