"""Where the mark of an isolated task reaches, and where it does not."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from nemo_image.engine.isolation import isolate, isolated
from nemo_image.engine.prefetch import prefetch
from nemo_image.engine.run import run_tasks


def answers() -> Iterator[bool]:
    yield isolated()


def fail(item: int, error: BaseException) -> bool:
    raise error


def test_only_inside() -> None:
    assert not isolated()
    with isolate():
        with isolate():
            assert isolated()
        assert isolated()
    assert not isolated()


def test_an_exception_ends_it() -> None:
    with pytest.raises(KeyError), isolate():
        raise KeyError
    assert not isolated()


@pytest.mark.in_process("watches or changes this process")
def test_it_reaches_our_own_threads_and_no_others() -> None:
    seen: list[bool] = []
    with isolate():
        assert list(prefetch(answers())) == [True]
        assert list(run_tasks(lambda _: isolated(), [1, 2], on_error=fail, count=2)) == [True, True]
        other = threading.Thread(target=lambda: seen.append(isolated()))
        other.start()
        other.join()
    assert seen == [False]
    assert list(prefetch(answers())) == [False]
