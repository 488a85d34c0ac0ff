"""What is remembered of the last few values."""

from __future__ import annotations

import threading

import pytest

from nemo_image.datasets.recent import Recent


def test_the_least_recently_used_go_first() -> None:
    made: list[str] = []

    def get(name: str) -> str:
        return recent.get(name, lambda: made.append(name) or name)  # type: ignore[func-returns-value]

    recent: Recent[str] = Recent(len, 4)
    assert [get(name) for name in ("aa", "b", "aa", "c", "dd", "aa", "b")] == ["aa", "b", "aa", "c", "dd", "aa", "b"]
    # For "dd" go "b" and "aa", for "aa" goes "c", for "b" goes "dd".
    assert made == ["aa", "b", "c", "dd", "aa", "b"]


@pytest.mark.parametrize(("last_anyway", "times"), [(True, 1), (False, 2)])
def test_one_that_is_too_heavy(last_anyway: bool, times: int) -> None:
    made: list[int] = []
    recent: Recent[str] = Recent(len, 4, last_anyway=last_anyway)
    for _ in range(2):
        assert recent.get("key", lambda: made.append(1) or "too heavy") == "too heavy"  # type: ignore[func-returns-value]
    assert len(made) == times
    assert recent.get("other", lambda: "ab") == "ab"
    assert recent.get("other", lambda: "made again") == "ab"  # it weighs what it did before


def test_threads_wait_for_one_value_and_not_for_others() -> None:
    recent: Recent[int] = Recent(lambda _: 1, 4)
    begun, go_on = threading.Event(), threading.Event()
    made: list[int] = []

    def slow() -> int:
        begun.set()
        go_on.wait(60)
        made.append(1)
        return 1

    threads = [threading.Thread(target=recent.get, args=("slow", slow)) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    assert recent.get("other", lambda: 2) == 2
    go_on.set()
    for thread in threads:
        thread.join()
    assert made == [1]


def test_a_failure_is_not_remembered() -> None:
    recent: Recent[int] = Recent(lambda _: 1, 4)
    with pytest.raises(KeyError):
        recent.get("key", lambda: {}["nothing"])
    assert recent.get("key", lambda: 3) == 3
