"""New ids in names and in JSON; everything else as it was."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_image.export.rewrite import renamed, rewritten_json

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), values, max_size=5))
def test_other_fields_stay(fields: dict[str, object]) -> None:
    changed = rewritten_json(json.dumps(fields).encode(), {"id": "new"}, "old", "new")
    assert changed is not None
    found = json.loads(changed)
    assert found.pop("id") == "new"
    wanted = {name: value for name, value in fields.items() if name != "id"}
    assert found == {name: "new" if (name, str(value)) == ("key", "old") else value for name, value in wanted.items()}
    assert [name for name in found if name in wanted] == list(wanted)


def test_a_key_that_says_something_else_stays() -> None:
    assert rewritten_json(b'{"key": "other"}', {"id": "new"}, "old", "new") == b'{"key": "other", "id": "new"}'


@pytest.mark.parametrize("data", [b"", b"[1]", b'"text"', b"{", b"\xff\xfe{", b"[" * 100_000])
def test_what_is_no_object_stays(data: bytes) -> None:
    assert rewritten_json(data, {"id": "new"}, "old", "new") is None


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("a/b.jpg", "N.jpg"),
        ("b.JPG", "N.JPG"),
        ("x.seg.png", "N.seg.png"),
        ("./k.txt", "N.txt"),
        ("a.d/b.xİ", "N.xİ"),  # longer in lower case
    ],
)
def test_names_keep_their_extension(name: str, wanted: str) -> None:
    assert renamed(name, "N") == wanted
