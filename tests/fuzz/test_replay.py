"""What fuzzing found worth keeping, replayed without a fuzzer: `python -m tests.fuzz` finds more."""

from __future__ import annotations

import importlib
import random
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fuzz import corpora

TARGETS = ("decoder", "idx_file", "json_text", "tar_index")

CRASHES = [(name, one) for name in TARGETS for one in corpora.load(name) if one.startswith("crash-")]


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_and_kept_inputs(name: str) -> None:
    target = importlib.import_module(f"tests.fuzz.{name}")
    kept = corpora.load(name)
    assert len(kept) > 20
    for data in [*target.seeds(), *kept.values()]:
        target.check(data)


@pytest.mark.parametrize(("name", "one"), CRASHES, ids=[f"{name}-{one}" for name, one in CRASHES])
def test_what_once_broke_something(name: str, one: str) -> None:
    importlib.import_module(f"tests.fuzz.{name}").check(corpora.load(name)[one])


@pytest.mark.parametrize("name", TARGETS)
def test_mutants_of_the_kept_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A little fuzzing, the same each time, with a plain stand-in for libFuzzer's own mutations."""
    target = importlib.import_module(f"tests.fuzz.{name}")
    rng = random.Random(7)

    def flip(data: bytes, max_size: int) -> bytes:
        copy = bytearray(data or b"\0")
        for _ in range(rng.randrange(1, 4)):
            copy[rng.randrange(len(copy))] = rng.randrange(256)
        return bytes(copy[:max_size])

    monkeypatch.setitem(sys.modules, "atheris", _module(Mutate=flip))
    inputs = [*target.seeds(), *corpora.load(name).values()]
    for number in range(300):
        target.check(target.mutate(rng.choice(inputs), target.MAX_LEN, number))


def _module(**names: Any) -> Any:
    return SimpleNamespace(**names)


def test_targets_are_those_that_can_be_fuzzed() -> None:
    text = (corpora.FOLDER.parent / "__main__.py").read_text()
    assert all(f'"{name}": [' in text for name in TARGETS)
