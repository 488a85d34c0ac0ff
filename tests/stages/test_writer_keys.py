"""Keys in output tars: kept where they can be, none twice, none that leads out of a folder; JSON that follows them."""

from __future__ import annotations

import json
import posixpath
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.shards.keys import split_member_name
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.tasks import ImageBatch
from nemo_image.stages.writer import ImageWriterStage
from nemo_image.stages.writing.output_keys import OutputKeys, harmless
from tests.makers import encoded, picture, tar_members, write_tar
from tests.stages.writing import Run, in_batches, plain_tar, rows, tar_images, tars


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("000001", "000001"),
        ("a/b", "a/b"),
        ("a//b", "a//b"),
        ("a.b/c", "a.b/c"),
        ("ä ö", "ä ö"),
        ("photo.v2", "photo_v2"),
        ("../../etc/passwd", "_/_/etc/passwd"),
        ("a/../b", "a/_/b"),
        ("/etc/passwd", "etc/passwd"),
        ("./a", "a"),
        ("C:/x", "C_/x"),
        ("..\\x", "___x"),
        ("a/", "a"),
        ("a\0b", "a_b"),
        ("\ud800", "\\ud800".replace("\\", "_")),
        (".hidden", "_hidden"),
        ("..", "_"),
        ("/", "_"),
    ],
)
def test_harmless_keys(key: str, expected: str) -> None:
    assert harmless(key) == expected


@given(st.text(st.sampled_from("ab./\\:\0é\ud800"), max_size=8))
def test_any_key_becomes_one_that_stays_below_its_folder(key: str) -> None:
    made = harmless(key)
    assert harmless(made) == made
    assert split_member_name(f"{made}.jpg") == (made, "jpg")
    made.encode()
    path = posixpath.normpath(posixpath.join("/root", made.replace("\\", "/")))
    assert path.startswith("/root/")
    assert "\0" not in made


@given(st.lists(st.tuples(st.sampled_from(["k", "a/k", "../k", "x_k", "k-2"]), st.sampled_from(["", "x", "a/b"]))))
def test_no_key_is_given_twice(samples: list[tuple[str, str]]) -> None:
    given_twice = []
    for _ in range(2):
        keys = OutputKeys()
        given_twice.append([keys.give(*one) for one in samples])
    assert given_twice[0] == given_twice[1]
    assert len({*given_twice[0]}) == len(samples)
    if samples:
        assert given_twice[0][0] == harmless(samples[0][0])


def test_keys_that_meet_in_one_tar(tmp_path: Path) -> None:
    images = []
    for shard in ("x", "y"):
        images += plain_tar(tmp_path / "in" / f"{shard}.tar", ["000", "001", "d/e"], first=10 * len(images))
    deep = plain_tar(tmp_path / "in" / "z.tar", ["000"])[0]
    deep.shard = "deep/y.v2"
    images += [deep, tar_images(tmp_path / "in" / "y.tar")[0]]
    out = tmp_path / "out"
    run = Run(ImageWriterStage(str(out), images_per_tar=8), {"g": in_batches(images, 3)})
    table = rows(out / "g-00000.parquet")
    assert [row["key"] for row in table] == [
        *("000", "001", "d/e", "y_000", "y_001", "y_d/e", "deep_y_v2_000", "y_000-2"),
    ]
    assert [row["original_key"] for row in table] == ["000", "001", "d/e"] * 2 + ["000", "000"]
    assert [row["original_shard"] for row in table] == ["x"] * 3 + ["y"] * 3 + ["deep/y.v2", "y"]
    assert run.metrics["renamed"] == run.said["rewritten keys"] == 5
    members = tar_members(out / "g-00000.tar")
    for row in table:
        fields = json.loads(members[f"{row['key']}.json"])
        assert fields["key"] == row["key"]
        assert fields["seed"] == row["seed"]
    assert len(ImageTextPairDataset.from_webdataset(out, on_mismatch="raise").metadata) == 8


def test_only_the_id_in_json_changes_and_only_where_the_key_did(tmp_path: Path) -> None:
    source = tmp_path / "in" / "s.tar"
    jpg = encoded(picture(1, 8, 8))
    texts = [b'{ "b":1.50, "key":"../k"}', b"[1, 2]", b'{"no": "id"}', b'{ "key" : "k4" }']
    names = ["../k", "../k2", "../k3", "k4"]
    write_tar(source, [(name, {"jpg": jpg, "json": text}) for name, text in zip(names, texts, strict=True)])
    images = tar_images(source)
    assert [image.image_id for image in images] == names
    out = tmp_path / "out"
    Run(ImageWriterStage(str(out)), {"g": in_batches(images, 9)})
    members = tar_members(out / "packed-00000.tar")
    assert {name: data for name, data in members.items() if name.endswith("json")} == {
        "_/k.json": b'{"b": 1.5, "key": "_/k"}',
        "_/k2.json": b"[1, 2]",
        "_/k3.json": b'{"no": "id", "key": "_/k3"}',
        "k4.json": b'{ "key" : "k4" }',
    }


def test_keys_that_meet_only_when_remainders_are_packed(tmp_path: Path) -> None:
    groups = {}
    for number, shard in enumerate(("x", "y", "z")):
        images = plain_tar(tmp_path / "in" / f"{shard}.tar", ["000", "001", "002"], first=10 * number)
        groups[shard] = in_batches(images, 2)
    out = tmp_path / "out"
    run = Run(ImageWriterStage(str(out), images_per_tar=4), groups)
    assert tars(out) == ["packed-00000", "packed-00001", "packed-00002"]
    table = [row for name in tars(out) for row in rows(out / f"{name}.parquet")]
    assert [row["key"] for row in table] == [
        *("000", "001", "002", "y_000"),
        *("001", "002", "000", "z_001"),
        "002",
    ]
    assert run.said["rewritten keys"] == 2
    assert not run.metrics["renamed"]
    members = [tar_members(out / f"{name}.tar") for name in tars(out)]
    originals = {
        f"{shard}/{name}": data
        for shard in groups
        for name, data in tar_members(tmp_path / "in" / f"{shard}.tar").items()
    }
    for row in table:
        found = members[int(row["shard"][-5:])]
        for end in ("jpg", "txt"):
            original = originals[f"{row['original_shard']}/{row['original_key']}.{end}"]
            assert found[f"{row['key']}.{end}"] == original
        assert json.loads(found[f"{row['key']}.json"]) == {"key": row["key"], "seed": row["seed"]}
    kept = [row for row in table if row["key"] == row["original_key"]]
    assert len(kept) == 7
    for row in kept:
        original = originals[f"{row['original_shard']}/{row['original_key']}.json"]
        assert members[int(row["shard"][-5:])][f"{row['key']}.json"] == original


def test_keys_with_white_space_have_no_index_file(tmp_path: Path) -> None:
    image = ImageObject(image_id="two words", image_bytes=encoded(picture(1, 8, 8)))
    out = tmp_path / "out"
    stage = ImageWriterStage(str(out), images_per_tar=1)
    Run(stage, {"g": [ImageBatch([image])]})
    assert list(tar_members(out / "g-00000.tar")) == ["two words.jpg"]
    assert not (out / "g-00000.idx").exists()
    assert stage.outputs_intact([]) is False


def test_names_that_are_no_utf8_are_written_as_their_rows_say_them(tmp_path: Path) -> None:
    source = tmp_path / "in" / "s.tar"
    write_tar(source, [("caf\udce9", {"jpg": encoded(picture(1, 8, 8))})])
    out = tmp_path / "out"
    Run(ImageWriterStage(str(out)), {"g": in_batches(tar_images(source), 1)})
    assert list(tar_members(out / "packed-00000.tar")) == ["caf\\xe9.jpg"]
    assert rows(out / "packed-00000.parquet")[0]["key"] == "caf\\xe9"
