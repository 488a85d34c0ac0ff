"""The oracle itself, against results worked out by hand.

The rows lie on a circle, with Pythagorean coordinates, so that every cosine is a short decimal:

.. code-block:: text

           a (1, 0)   b (4, 3)   c (3, 4)   d (0, 1)   e (-1, 0)
    b        0.8
    c        0.6        0.96
    d        0          0.6        0.8
    e       -1         -0.8       -0.6        0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from tests.dedup import oracle

CIRCLE = {"a": (1, 0), "b": (4, 3), "c": (3, 4), "d": (0, 1), "e": (-1, 0)}


def rows(ids: str, **columns: Any) -> pd.DataFrame:
    """Return rows of one cluster, in alphabetical order's distance from its centroid."""
    frame = pd.DataFrame(
        {
            "shard": "s",
            "id": list(ids),
            "embedding": [list(CIRCLE[name]) for name in ids],
            "cluster": 0,
            "cosine_dist_to_cent": np.array([(ord(name) - ord("a")) / 8 for name in ids], np.float32),
        }
    )
    return frame.assign(**columns)


def found(frame: pd.DataFrame, eps: float, *args: Any, **kwargs: Any) -> dict[str, tuple[float, str | None]]:
    """Return similarity and twin by id."""
    result = oracle.expected(frame, eps, *args, **kwargs)
    assert (result["is_duplicate"] == result["duplicate_of"].notna()).all()
    assert (result["is_duplicate"] == result["duplicate_of_shard"].notna()).all()
    assert result["max_similarity"].dtype == np.float32
    return {
        name: (round(float(similarity), 6), twin)
        for name, similarity, twin in zip(frame["id"], result["max_similarity"], result["duplicate_of"], strict=True)
    }


def test_a_chain_with_representatives() -> None:
    # a ~ b ~ c ~ d at 0.8, a !~ c: b falls to a, so c has nobody to fall to, and d falls to c.
    assert found(rows("abcde"), 0.2, "easy", True) == {
        "a": (0, None),
        "b": (0.8, "a"),
        "c": (0.6, None),
        "d": (0.8, "c"),
        "e": (0, None),
    }


def test_a_chain_as_published() -> None:
    # c falls to b, which falls itself.
    assert found(rows("abcde"), 0.2, "easy", False) == {
        "a": (0, None),
        "b": (0.8, "a"),
        "c": (0.96, "b"),
        "d": (0.8, "c"),
        "e": (0, None),
    }


def test_hard_begins_far_from_the_centroid() -> None:
    # e, d, c, b, a
    assert found(rows("abcde"), 0.2, "hard", True) == {
        "e": (0, None),
        "d": (0, None),
        "c": (0.8, "d"),
        "b": (0.6, None),
        "a": (0.8, "b"),
    }


def test_random_follows_the_rank() -> None:
    ranks = {"c": 1, "a": 2, "b": 3, "e": 4, "d": 5}
    asked = []

    def rank(seed: int, shard: str, name: str) -> int:
        asked.append((seed, shard))
        return ranks[name]

    assert found(rows("abcde"), 0.2, "random", True, 7, rank) == {
        "c": (0, None),
        "a": (0.6, None),
        "b": (0.96, "c"),
        "e": (0, None),
        "d": (0.8, "c"),
    }
    assert set(asked) == {(7, "s")}


@pytest.mark.parametrize("unknown", [np.nan, None, pd.NA])
@pytest.mark.parametrize(
    ("ascending", "twins"),
    [
        (True, {"a": "b", "b": None, "c": "b", "d": None}),  # b, a, then c and d, of which nothing is known
        (False, {"a": None, "b": "a", "c": None, "d": "c"}),  # a, b, c, d
    ],
)
def test_a_column_orders_and_unknown_values_are_last(unknown: Any, ascending: bool, twins: dict[str, Any]) -> None:
    score = pd.Series([2, 1, unknown, unknown], dtype=object)
    result = found(rows("abcd", score=score), 0.2, ("score", ascending))
    assert {name: twin for name, (_, twin) in result.items()} == twins


@pytest.mark.parametrize("ascending", [True, False])
def test_a_column_orders_alone(ascending: bool) -> None:
    # In the order of distances the least score would be first one way only.
    frame = rows("abc", score=[3, 1, 2], cosine_dist_to_cent=np.float32(0.5))
    kept = {True: "b", False: "a"}[ascending]
    assert found(frame, 0.2, ("score", ascending))[kept] == (0, None)
    assert found(frame, 1, ("score", ascending))[kept] == (0, None)


@pytest.mark.parametrize(("names", "first"), [([10, 9], 9), (["10", "9"], "10")])
@pytest.mark.parametrize("order", ["hard", "easy", ("score", True), ("score", False)])
def test_ties_go_by_id_as_numbers_or_as_text(names: list[Any], first: Any, order: Any) -> None:
    frame = rows("bb", id=names, score=1)
    kept = [name for name, (_, twin) in found(frame, 0, order).items() if twin is None]
    assert kept == [first]


@pytest.mark.parametrize("order", ["hard", "easy", ("score", True), ("score", False)])
def test_equal_ids_go_by_shard(order: Any) -> None:
    result = oracle.expected(rows("bb", shard=["s2", "s1"], cosine_dist_to_cent=0.5, score=1), 0, order)
    assert result["duplicate_of_shard"].tolist() == ["s1", None]
    assert result["duplicate_of"].tolist() == ["b", None]


@pytest.mark.parametrize("order", ["hard", "easy", ("score", True), ("score", False)])
def test_ids_before_shards(order: Any) -> None:
    frame = rows("bb", id=["q", "p"], shard=["s1", "s2"], cosine_dist_to_cent=0.5, score=1)
    assert found(frame, 0, order) == {"p": (0, None), "q": (1, "p")}


@pytest.mark.parametrize("representative", [True, False])
def test_the_first_of_equals_is_the_twin(representative: bool) -> None:
    # b, b copied twice (once at another length), then c: 0.96 to all three.
    frame = rows("bbbc", id=list("pqrc"), cosine_dist_to_cent=[0.1, 0.2, 0.3, 0.4])
    frame["embedding"] = [[4, 3], [12, 9], [4, 3], [3, 4]]
    assert found(frame, 0.05, "easy", representative) == {
        "p": (0, None),
        "q": (1, "p"),
        "r": (1, "p"),
        "c": (0.96, "p"),
    }


def test_copies_fall_at_eps_zero_and_what_float32_takes_for_copies() -> None:
    # At an angle of 0.0002 the cosine is 1 - 0.00000002, which float32 rounds to 1; at 0.002 it is 1 - 0.000002.
    frame = rows("bbbb", id=list("pqrs"), embedding=[[1, 0], [1, 0], [1, 0.0002], [1, 0.002]])
    assert found(frame, 0, "easy") == {"p": (0, None), "q": (1, "p"), "r": (1, "p"), "s": (0.999998, None)}


@pytest.mark.parametrize(("eps", "twin"), [(0.04, None), (0.0400001, "b")])
def test_the_threshold_is_compared_with_the_float32_similarity(eps: float, twin: str | None) -> None:
    # 0.96 in float32 is 0.95999998: below 1 - 0.04.
    assert found(rows("bc"), eps, "easy")["c"] == (0.96, twin)


def test_eps_one_takes_whatever_has_a_twin() -> None:
    # d is at 0 from a and falls; e is below 0 from both and resembles none.
    assert found(rows("ade"), 1, "easy") == {"a": (0, None), "d": (0, "a"), "e": (0, None)}


def test_clusters_do_not_see_each_other() -> None:
    frame = rows("aabb", id=list("pqrs"), cluster=[1, 0, 0, 1])
    assert found(frame, 0.2, "easy") == {"p": (0, None), "q": (0, None), "r": (0.8, "q"), "s": (0.8, "p")}


def test_rows_may_come_in_any_order_with_any_index() -> None:
    frame = rows("abcde")
    mixed = frame.set_axis([3, 3, 5, 8, 1]).iloc[[4, 2, 0, 3, 1]]
    assert found(mixed, 0.2, "easy") == found(frame, 0.2, "easy")
    assert oracle.expected(mixed, 0.2).index.equals(mixed.index)


def test_arrow_columns_give_the_same() -> None:
    frame = rows("abcde")
    kinds = {"cluster": pa.int32(), "cosine_dist_to_cent": pa.float32(), "embedding": pa.list_(pa.float32())}
    arrow = frame.assign(
        **{name: pd.Series(frame[name].tolist(), dtype=pd.ArrowDtype(kind)) for name, kind in kinds.items()}
    )
    pd.testing.assert_frame_equal(oracle.expected(arrow, 0.2), oracle.expected(frame, 0.2))


def test_all_pairs_crosses_clusters_and_shards() -> None:
    frame = rows("abcde", cluster=[0, 1, 0, 1, 0], shard=["s", "t", "s", "t", "s"])
    names = {name: (shard, name) for shard, name in zip(frame["shard"], frame["id"], strict=True)}

    def named(*pairs: str) -> set[frozenset[oracle.Row]]:
        return {frozenset(names[name] for name in pair) for pair in pairs}

    assert oracle.all_pairs(rows("bb", id=["p", "q"]), 0) == {frozenset({("s", "p"), ("s", "q")})}
    assert oracle.all_pairs(frame, 0.04) == set()  # 0.96 in float32 is less
    assert oracle.all_pairs(frame, 0.1) == named("bc")
    assert oracle.all_pairs(frame, 0.2) == named("ab", "bc", "cd")
    assert oracle.all_pairs(frame, 0.4) == named("ab", "bc", "cd", "ac", "bd")


def clustered(centroids: list[list[float]], clusters: list[int], distances: list[float]) -> dict[Any, str]:
    """Return what is wrong with clusters of a, b and d."""
    distance = np.array(distances, np.float32)
    return oracle.wrong_clusters(rows("abd", cluster=clusters, cosine_dist_to_cent=distance), np.array(centroids))


def test_right_clusters_are_right() -> None:
    # Distances: 1 - 1, 1 - 4/5 to (1, 0), 1 - 1 to (0, 1).
    assert clustered([[1, 0], [0, 1]], [0, 0, 1], [0, 0.2, 0]) == {}


@pytest.mark.parametrize(
    ("clusters", "distances", "why"),
    [
        ([0, 1, 1], [0, 0.4, 0], "cluster 1, but 0 is nearer"),
        ([0, 2, 1], [0, 0.2, 0], "cluster 2 of 2"),
        ([0, 0, 1], [0, np.nextafter(np.float32(0.2), np.float32(1)), 0], "cosine_dist_to_cent 0.20000001"),
        ([0, 0, 1], [0, np.nan, 0], "cosine_dist_to_cent nan"),
    ],
)
def test_wrong_clusters_are_named(clusters: list[int], distances: list[float], why: str) -> None:
    wrong = clustered([[1, 0], [0, 1]], clusters, distances)
    assert list(wrong) == [("s", "b")]
    assert wrong["s", "b"].startswith(why)


def test_nearest_is_euclidean_not_by_angle() -> None:
    # (0.1, 0.1) is nearer to a in angle than (0, 1), and nearer to it in space than (-1, 0.5).
    assert clustered([[0.1, 0.1], [-1, 0.5]], [0, 0, 0], [1 - 0.5**0.5, 1 - 1.4 / 2**0.5, 1 - 0.5**0.5]) == {}
    # (3, 0) points exactly at a, but (0.5, 0.5) lies nearer to it.
    cosine = 0.5**0.5
    assert clustered([[3, 0], [0.5, 0.5]], [1, 1, 1], [1 - cosine, 1 - 1.4 * cosine, 1 - cosine]) == {}
    assert clustered([[3, 0], [0.5, 0.5]], [0, 1, 1], [0, 1 - 1.4 * cosine, 1 - cosine]) == {
        ("s", "a"): "cluster 0, but 1 is nearer"
    }


def test_of_equal_centroids_the_first_is_right_and_a_zero_centroid_is_at_distance_one() -> None:
    assert clustered([[0, 0], [0, 0]], [0, 0, 0], [1, 1, 1]) == {}
    assert clustered([[0, 0], [0, 0]], [0, 1, 0], [1, 1, 1]) == {("s", "b"): "cluster 1, but 0 has the same centroid"}


@pytest.mark.parametrize("vector", [[0, 0], [np.nan, 1], [np.inf, 1]])
def test_rows_that_cannot_be_compared_are_refused(vector: list[float]) -> None:
    with pytest.raises(AssertionError, match="no case for the oracle"):
        oracle.expected(rows("ab", embedding=[vector, [1, 0]]), 0.1)
