from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_image.classifiers.heads import AestheticHead, NsfwHead, load_head
from nemo_image.engine.weights import load_state_dict
from nemo_image.errors import WeightsError
from tests.classifiers.makers import aesthetic_state, nsfw_state, numpy_aesthetic, numpy_nsfw, unit_vectors

HEADS = [
    pytest.param(AestheticHead, aesthetic_state, numpy_aesthetic, id="aesthetic"),
    pytest.param(NsfwHead, nsfw_state, numpy_nsfw, id="nsfw"),
]
PUBLISHED = [
    pytest.param(AestheticHead, "sac+logos+ava1-l14-linearMSE.pth", numpy_aesthetic, id="aesthetic"),
    pytest.param(NsfwHead, "clip_autokeras_binary_nsfw.pth", numpy_nsfw, id="nsfw"),
]
Numpy = Callable[[Any, np.ndarray], np.ndarray]


def scores(head: torch.nn.Module, vectors: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return head(torch.tensor(vectors))[:, 0].double().numpy()


@pytest.mark.parametrize(("head_class", "make_state", "oracle"), HEADS)
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_numpy(head_class: Any, make_state: Any, oracle: Numpy, seed: int) -> None:
    vectors = unit_vectors(200, seed=seed)
    state = make_state(seed)
    wanted = oracle(state, vectors)
    assert wanted.std() > 0.05  # else agreeing would say little
    found = scores(load_head(head_class, state, "state"), vectors)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("head_class", "name", "oracle"), PUBLISHED)
def test_published_weights_agree_with_numpy(shared: Path, head_class: Any, name: str, oracle: Numpy) -> None:
    ratings = [np.load(shared / f"weights/clip_l14_rating_embeddings/rating{number}.npy") for number in range(10)]
    vectors = np.concatenate([*ratings, unit_vectors(500)])
    state = load_state_dict(shared / "weights" / name)
    found = scores(load_head(head_class, state, name), vectors)
    np.testing.assert_allclose(found, oracle(state, vectors), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("head_class", "make_state", "slip"),
    [
        (AestheticHead, aesthetic_state, lambda head: head.layers.insert(2, torch.nn.ReLU())),
        (NsfwHead, nsfw_state, lambda head: head.norm.variance.sqrt_()),
        (NsfwHead, nsfw_state, lambda head: head.norm.mean.zero_()),
    ],
    ids=["activation", "variance for its root", "no mean"],
)
def test_a_slip_in_the_network_would_be_seen(head_class: Any, make_state: Any, slip: Any) -> None:
    oracle = {AestheticHead: numpy_aesthetic, NsfwHead: numpy_nsfw}[head_class]
    vectors, head = unit_vectors(50), load_head(head_class, make_state(), "state")
    slip(head)
    assert np.abs(scores(head, vectors) - oracle(make_state(), vectors)).max() > 1e-2


def test_nsfw_scores_are_probabilities() -> None:
    found = scores(load_head(NsfwHead, nsfw_state(), "state"), unit_vectors(300))
    assert (found > 0).all()
    assert (found < 1).all()


@pytest.mark.parametrize("head_class", [AestheticHead, NsfwHead])
def test_a_fresh_state_dict_has_the_published_layout(head_class: Any) -> None:
    state = {AestheticHead: aesthetic_state, NsfwHead: nsfw_state}[head_class]()
    assert {name: value.shape for name, value in head_class().state_dict().items()} == {
        name: value.shape for name, value in state.items()
    }


@pytest.mark.parametrize(("head_class", "make_state", "oracle"), HEADS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_loaded_head_is_float32_in_evaluation_and_apart_from_its_source(
    head_class: Any, make_state: Any, oracle: Numpy, dtype: torch.dtype
) -> None:
    state = {name: value.to(dtype) for name, value in make_state().items()}
    before = torch.random.get_rng_state()
    head = load_head(head_class, state, "state")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not head.training
    assert {value.dtype for value in head.state_dict().values()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in head.parameters())
    wanted = oracle(state, unit_vectors(5))
    for value in state.values():
        value.zero_()
    np.testing.assert_allclose(scores(head, unit_vectors(5)), wanted, rtol=0, atol=1e-4)


def _without(state: dict[str, torch.Tensor]) -> None:
    del state["norm.mean"], state["linear_4.bias"]


def _other_size(state: dict[str, torch.Tensor]) -> None:
    state["linear_1.weight"] = torch.zeros(64, 512)


def _extra(state: dict[str, torch.Tensor]) -> None:
    state["linear_5.weight"] = torch.zeros(1)


def _not_finite(state: dict[str, torch.Tensor]) -> None:
    state["linear_2.bias"][3] = float("nan")


def _all(state: dict[str, torch.Tensor]) -> None:
    for change in (_without, _other_size, _extra, _not_finite):
        change(state)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_without, "it lacks norm.mean, linear_4.bias"),
        (_other_size, "it differs in size: linear_1.weight is 64×512, not 64×768"),
        (_extra, "it has linear_5.weight"),
        (_not_finite, "it holds numbers that are not finite in linear_2.bias"),
        (_all, "lacks.*; it has.*; it differs.*; it holds"),
        (lambda state: [state.clear(), state.update(aesthetic_state())], r"lacks .* and 4 more; it has .* and 4 more"),
    ],
)
def test_other_weights_are_named(change: Callable[[dict[str, torch.Tensor]], None], says: str) -> None:
    state = nsfw_state()
    change(state)
    with pytest.raises(WeightsError, match=says) as caught:
        load_head(NsfwHead, state, "folder/file.pth")
    assert str(caught.value).startswith("folder/file.pth does not hold weights of NsfwHead: it ")
    assert "\n" not in str(caught.value)
