"""Weights that the tests make, as files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nemo_image.engine.model_cache import clear_models
from tests.classifiers.makers import aesthetic_state, nsfw_state


@pytest.fixture(autouse=True)
def _no_models_left() -> Iterator[None]:
    clear_models()
    yield
    clear_models()


@pytest.fixture
def aesthetic_path(tmp_path: Path) -> Path:
    torch.save(aesthetic_state(), tmp_path / "aesthetic.pth")
    return tmp_path / "aesthetic.pth"


@pytest.fixture
def nsfw_path(tmp_path: Path) -> Path:
    torch.save(nsfw_state(), tmp_path / "nsfw.pth")
    return tmp_path / "nsfw.pth"
