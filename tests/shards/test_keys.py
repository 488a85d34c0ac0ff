from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nemo_image.errors import IdMismatchError
from nemo_image.shards.keys import match_ids, plain_ids, split_member_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("a/b.seg.png", ("a/b", "seg.png")),
        ("a.b/c.JPG", ("a.b/c", "jpg")),
        ("./a.Txt", ("a", "txt")),
        ("././d/a.txt", ("d/a", "txt")),
        ("/a/b.jpg", ("/a/b", "jpg")),
        ("../../etc/x.jpg", ("../../etc/x", "jpg")),
        ("a..jpg", ("a", ".jpg")),
        ("ü/é ñ.webp", ("ü/é ñ", "webp")),
        ("a", None),
        ("a.b/c", None),
        ("a.", None),
        ("d/a.", None),
        (".hidden", None),
        ("d/.hidden.jpg", None),
        ("._a.jpg", None),
        ("a.jpg/", None),
        ("..", None),
        ("", None),
        ("./", None),
    ],
)
def test_names_are_split_at_the_first_dot_of_the_base_name(name: str, expected: tuple[str, str] | None) -> None:
    assert split_member_name(name) == expected


@pytest.fixture(scope="module")
def webdataset_split() -> Callable[[str], tuple[str | None, str]]:
    split: Callable[[str], tuple[str | None, str]] = pytest.importorskip("webdataset.tariterators").base_plus_ext
    return split


@settings(deadline=None)
@given(name=st.text(st.sampled_from("ab./JÜ"), max_size=12))
def test_names_are_split_as_webdataset_does(
    name: str, webdataset_split: Callable[[str], tuple[str | None, str]]
) -> None:
    base = name.rpartition("/")[2]
    # Where we part on purpose: a leading "./", hidden files, empty extensions.
    assume(not name.startswith("./") and not base.startswith(".") and base[base.find(".") :] != ".")
    key, extension = webdataset_split(name)
    assert split_member_name(name) == (None if key is None else (key, extension.lower()))


def test_strings_name_the_keys_that_equal_them() -> None:
    found = match_ids(["b", "a", "c", "B", None, ""], ["a", "b"])
    assert found.dtype == np.int64
    assert found.tolist() == [1, 0, -1, -1, -1, -1]


def test_strings_do_not_match_by_value() -> None:
    assert match_ids(["1", "01", "001"], ["001"]).tolist() == [-1, -1, 0]


def test_strings_may_be_base_names_where_only_one_key_has_it() -> None:
    keys = ["x/a", "x/b", "y/b", "c"]
    assert match_ids(["a", "b", "c", "x/b"], keys).tolist() == [0, -1, 3, 1]
    assert match_ids(["a", "c"], keys, base_names=False).tolist() == [-1, 3]


def test_a_whole_key_goes_before_a_base_name() -> None:
    assert match_ids(["a"], ["x/a", "a"]).tolist() == [1]
    assert match_ids([7], ["x/7", "007"]).tolist() == [1]


@pytest.mark.parametrize(
    "ids",
    [
        [3, 12, 5],
        [3.0, 12.0, 5.0],
        np.array([3, 12, 5], np.uint8),
        np.array([3, 12, 5], np.float32),
        pd.Series([3, 12, 5]),
        pd.Series([3, 12, 5], dtype="Int64"),
        pd.Series([3, 12, 5], dtype="int64[pyarrow]"),
    ],
)
def test_integers_name_padded_numbers(ids: object) -> None:
    assert match_ids(ids, ["00012", "00003", "x", "f/0004"]).tolist() == [1, 0, -1]  # type: ignore[arg-type]


def test_integers_name_padded_base_names() -> None:
    assert match_ids([4, 5], ["f/0004", "g/x5"]).tolist() == [0, -1]
    assert match_ids([4], ["f/0004"], base_names=False).tolist() == [-1]


def test_nulls_name_nothing() -> None:
    ids = [None, float("nan"), float("inf"), 1.5, True, pd.NA, b"1", np.nan]
    assert match_ids(ids, ["1", "nan", "None", "True"]).tolist() == [-1] * len(ids)
    assert match_ids(pd.Series([1, None], dtype="Int64"), ["01"]).tolist() == [0, -1]
    assert match_ids(pd.Series([1, None]), ["01"]).tolist() == [0, -1]


def test_floats_that_may_have_been_rounded_name_nothing() -> None:
    wide = 2**53 + 1
    keys = [str(wide - 1), str(wide), str(2**24)]
    assert match_ids([wide], keys).tolist() == [1]
    assert match_ids([float(wide)], keys).tolist() == [-1]
    assert match_ids(np.array([2.0**24]), keys).tolist() == [2]
    assert match_ids(np.array([2.0**24], np.float32), keys).tolist() == [-1]
    assert match_ids(pd.Series([2.0**24], dtype="float[pyarrow]"), keys).tolist() == [-1]


@pytest.mark.parametrize("value", [2**64 - 1, -(2**63), 0, -1])
def test_integers_of_64_bits_are_exact(value: int) -> None:
    assert match_ids([value, value + 1], [str(value)]).tolist() == [0, -1]
    dtype = np.uint64 if value > 0 else np.int64
    assert match_ids(np.array([value], dtype), [str(value)]).tolist() == [0]


def test_an_integer_that_names_two_keys_is_an_error() -> None:
    with pytest.raises(IdMismatchError, match=r"id 1 names several samples, '1', '01'"):
        match_ids([2, 1], ["1", "01", "2"])
    with pytest.raises(IdMismatchError, match=r"'a/1', 'b/01'"):
        match_ids([1], ["a/1", "b/01"])
    assert match_ids([2], ["1", "01", "2"]).tolist() == [2]  # nobody asked for 1


def test_keys_that_only_look_like_numbers_are_none() -> None:
    assert match_ids([2, 10, 3], ["²", "1_0", "٣", "0x3"]).tolist() == [-1, -1, -1]
    assert match_ids([0], ["9" * 5000, "0" * 5000]).tolist() == [1]


@settings(deadline=None)
@given(st.data())
def test_every_integer_finds_its_key(data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 10**6), unique=True, max_size=30))
    width = data.draw(st.integers(1, 12))
    order = data.draw(st.permutations(values))
    found = match_ids(order, [f"{value:0{width}d}" for value in values])
    assert [values[place] for place in found] == order


def test_plain_ids_are_strings_integers_and_none() -> None:
    assert plain_ids(np.array([1.0, np.nan])) == [1, None]
    assert plain_ids(["a", np.int32(4), 2.0, 2.5, None]) == ["a", 4, 2, None, None]
    again = plain_ids(plain_ids(["a", 1, None]))
    assert again == ["a", 1, None]
