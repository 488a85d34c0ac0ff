"""Tokens: equal for equal operators, another for other code or values, and possible with a lock at hand."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

from nemo_image.engine.tokens import behaviour_token

lock = threading.Lock()


class Scaler:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def run(self, number: float) -> float:
        with lock:
            return number * 2


def other_scaler() -> type:
    class Scaler:
        def run(self, number: float) -> float:
            return number * 3

    Scaler.__module__, Scaler.__qualname__ = globals()["Scaler"].__module__, "Scaler"
    return Scaler


def test_equal_operators() -> None:
    assert behaviour_token(Scaler(a=1, b=["x"])) == behaviour_token(Scaler(b=["x"], a=1))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"b": 1}),
        ({"a": [1, 2]}, {"a": [2, 1]}),
        ({"a": np.zeros(3)}, {"a": np.ones(3)}),
        ({"a": np.zeros(3)}, {"a": np.zeros(3, np.float32)}),
        ({"a": Scaler(x=1)}, {"a": Scaler(x=2)}),
        ({"a": lambda x: x + 1}, {"a": lambda x: x + 2}),
    ],
)
def test_other_values(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert behaviour_token(Scaler(**one)) != behaviour_token(Scaler(**two))


def test_other_code_under_the_same_name() -> None:
    assert behaviour_token(other_scaler()()) != behaviour_token(Scaler())


def made_by_a_factory(factor: int) -> Any:
    class Scaled:
        def run(self, number: float) -> float:
            return number * factor

    return Scaled()


def test_what_a_factory_gave_its_class() -> None:
    assert behaviour_token(made_by_a_factory(1)) != behaviour_token(made_by_a_factory(2))
    assert behaviour_token(made_by_a_factory(2)) == behaviour_token(made_by_a_factory(2))


def test_a_lock_among_the_values() -> None:
    assert behaviour_token(Scaler(lock=threading.Lock())) == behaviour_token(Scaler(lock=threading.Lock()))


def test_the_same_in_every_process() -> None:
    code = (
        "from nemo_image.engine.tokens import behaviour_token as token\n"
        "class A:\n"
        "    def run(self, x):\n"
        "        return x in {'a', 'b', 'c'}\n"
        "a = A(); a.names = {'x', 'y', 'z'}; print(token(a))"
    )
    seen = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        )
        seen.add(done.stdout)
    assert len(seen) == 1
