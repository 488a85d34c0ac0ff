from __future__ import annotations

import io
import json
import logging
import os
import tarfile
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_image.errors import IdMismatchError, TarError
from nemo_image.shards.idx_file import write_idx
from nemo_image.shards.index import Member, Sample
from nemo_image.shards.read import ShardReader, match_samples
from nemo_image.shards.sources import LocalSource, merge_ranges

Files = Sequence[tuple[str, bytes]]


def make_tar(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members_of(reader: ShardReader) -> list[Member]:
    return [member for sample in reader.index.samples for member in sample.members]


class Counted(MemoryFileSystem):
    """A remote file system that notes each range fetched, and how many bytes were asked for at once."""

    protocol = "counted"
    ranges: list[tuple[int, int]] = []  # noqa: RUF012
    at_once: list[int] = []  # noqa: RUF012

    def cat_ranges(self, paths: Any, starts: Any, ends: Any, *args: Any, **kwargs: Any) -> Any:
        self.ranges.extend(zip(starts, ends, strict=True))
        self.at_once.append(sum(ends) - sum(starts))
        return super().cat_ranges(paths, starts, ends, *args, **kwargs)


@pytest.fixture(params=["local", "remote"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Files], str]:
    """Put a tar somewhere."""

    def put(files: Files) -> str:
        path = make_tar(tmp_path / "x.tar", files)
        if request.param == "local":
            return str(path)
        fsspec.register_implementation("counted", Counted, clobber=True)
        fs, inside = fsspec.core.url_to_fs("counted://d/x.tar")
        fs.pipe_file(inside, path.read_bytes())
        Counted.ranges.clear()
        Counted.at_once.clear()
        return "counted://d/x.tar"

    return put


# --- bytes


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_members_come_in_the_order_asked_for(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.sampled_from([0, 1, 511, 512, 700, 5000, 70_000]), min_size=1, max_size=12))
    files = [(f"{number}.bin", bytes([number]) * size) for number, size in enumerate(sizes)]
    path = make_tar(tmp_path_factory.mktemp("x") / "x.tar", files)
    order = data.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=20))
    with ShardReader(path) as reader, tarfile.open(path) as tar:
        members = members_of(reader)
        expected = [tar.extractfile(files[number][0]).read() for number in order]  # type: ignore[union-attr]
        assert list(reader.read_many([members[number] for number in order])) == expected
        assert [reader.read(members[number]) for number in order] == expected
        assert [b"".join(reader.read_chunks(members[number], 512)) for number in order] == expected


def test_remote_members_come_too(place: Callable[[Files], str]) -> None:
    files = [(f"{number}.bin", os.urandom(number * 1000)) for number in range(20)]
    with ShardReader(place(files)) as reader:
        members = members_of(reader)
        assert list(reader.read_many(members[::-1])) == [data for _, data in files[::-1]]
        assert list(reader.read_many(members)) == [data for _, data in files]
        assert reader.read(members[7]) == files[7][1]
        assert list(reader.read_many([])) == []


def test_remote_neighbours_are_read_together(tmp_path: Path) -> None:
    fsspec.register_implementation("counted", Counted, clobber=True)
    path = make_tar(tmp_path / "x.tar", [(f"{number}.bin", bytes(1000)) for number in range(1000)])
    fs, inside = fsspec.core.url_to_fs("counted://d/x.tar")
    fs.pipe_file(inside, path.read_bytes())
    with ShardReader("counted://d/x.tar") as reader:
        members = members_of(reader)
        Counted.ranges.clear()
        assert sum(map(len, reader.read_many(members))) == 10**6
        assert len(Counted.ranges) == 1
        Counted.ranges.clear()
        assert sum(map(len, reader.read_many([members[0], members[999]]))) == 2000
        assert Counted.ranges == [(512, 1512), (999 * 1536 + 512, 999 * 1536 + 1512)]


def test_what_is_fetched_ahead_is_bounded(tmp_path: Path) -> None:
    fsspec.register_implementation("counted", Counted, clobber=True)
    path = make_tar(tmp_path / "x.tar", [(f"{number}.bin", bytes(3 * 2**20)) for number in range(20)])
    fs, inside = fsspec.core.url_to_fs("counted://d/x.tar")
    fs.pipe_file(inside, path.read_bytes())
    with ShardReader("counted://d/x.tar") as reader:
        members = members_of(reader)
        Counted.at_once.clear()
        first = next(blobs := reader.read_many(members))
        assert len(first) == 3 * 2**20
        assert len(Counted.at_once) == 1  # nothing beyond what is needed now
        assert len(list(blobs)) == 19
        assert max(Counted.at_once) <= 16 * 2**20
        assert len(Counted.at_once) == 4


def test_a_large_member_can_be_read_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar, open(tmp_path / "big", "wb+") as big:
        big.truncate(100 * 2**20)
        info = tarfile.TarInfo("big.bin")
        info.size = 100 * 2**20
        tar.addfile(info, big)
    with ShardReader(path) as reader:
        [member] = members_of(reader)
        tracemalloc.start()
        try:
            assert sum(map(len, reader.read_chunks(member))) == member.size
            assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
        finally:
            tracemalloc.stop()


def test_threads_share_a_reader(tmp_path: Path) -> None:
    files = [(f"{number}.bin", os.urandom(2000)) for number in range(300)]
    with ShardReader(make_tar(tmp_path / "x.tar", files)) as reader, ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda number: reader.read(members_of(reader)[number]), range(300)))
    assert found == [data for _, data in files]


def test_merged_ranges() -> None:
    ranges = [(0, 10), (12, 20), (20, 30), (40, 50), (45, 60), (0, 5), (5, 500), (500, 501)]
    assert list(merge_ranges(ranges, gap=2, limit=30)) == [
        (0, 30, 3),
        (40, 50, 1),
        (45, 60, 1),
        (0, 5, 1),
        (5, 500, 1),
        (500, 501, 1),
    ]
    assert list(merge_ranges(ranges[:4], gap=10, limit=1000)) == [(0, 50, 4)]
    assert list(merge_ranges([], gap=2, limit=30)) == []


def test_a_system_call_may_give_less_than_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [("a.bin", os.urandom(5000))]
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: pread(descriptor, min(size, 999), offset))
    with ShardReader(make_tar(tmp_path / "x.tar", files)) as reader:
        assert reader.read(members_of(reader)[0]) == files[0][1]


def test_a_file_cut_off_while_it_is_read(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", [("a.jpg", bytes(1000)), ("b.jpg", bytes(1000))])
    with ShardReader(path) as reader:
        first, second = members_of(reader)
        os.truncate(path, 2100)
        assert reader.read(first) == bytes(1000)
        message = r"x\.tar: member 'b\.jpg' at byte 2048 gave 52 of 1000 bytes"
        for read in (
            reader.read,
            lambda member: list(reader.read_chunks(member)),
            lambda member: [*reader.read_many([member])],
        ):
            with pytest.raises(TarError, match=message):
                read(second)


@pytest.mark.parametrize(("offset", "size"), [(-512, 100), (512, -1), (10**12, 10), (0, 10**12)])
def test_nothing_outside_of_the_file_is_read(offset: int, size: int, place: Callable[[Files], str]) -> None:
    with ShardReader(place([("a.jpg", b"1")])) as reader:
        member = Member("a.jpg", "jpg", offset, size)
        with pytest.raises(TarError, match=r"x\.tar: member 'a\.jpg' would lie at bytes"):
            reader.read(member)
        with pytest.raises(TarError, match="would lie"):
            list(reader.read_chunks(member))


def test_a_disk_error_names_the_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, offset: int, size: int) -> bytes:
        raise OSError(5, "Input/output error")

    with ShardReader(make_tar(tmp_path / "x.tar", [("a.jpg", b"1")])) as reader:
        [member] = members_of(reader)
        monkeypatch.setattr(LocalSource, "read_at", fail)
        with pytest.raises(TarError, match=r"x\.tar: cannot be read .*Input/output error"):
            reader.read(member)


def test_a_missing_tar_is_an_error_at_its_first_use(tmp_path: Path) -> None:
    with ShardReader(tmp_path / "x.tar") as reader, pytest.raises(TarError, match=r"x\.tar: no such tar"):
        _ = reader.index


def test_a_closed_reader_keeps_its_index(tmp_path: Path) -> None:
    with ShardReader(make_tar(tmp_path / "x.tar", [("a.jpg", b"1")])) as reader:
        [member] = members_of(reader)
    assert reader.index.keys == ["a"]
    with pytest.raises(ValueError, match="closed"):
        reader.read(member)


def test_an_index_file_is_used_if_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_tar(tmp_path / "x.tar", [("a.jpg", b"1")])
    with caplog.at_level(logging.WARNING):
        with ShardReader(path, use_index_file=True) as reader:
            assert reader.index.keys == ["a"]
        assert "no such index file" in caplog.text
        caplog.clear()
        write_idx(reader.index, tmp_path / "x.idx")
        with ShardReader(path, use_index_file=True) as reader:
            assert reader.index.keys == ["a"]
        assert caplog.text == ""


# --- captions and JSON


@pytest.mark.parametrize(
    ("data", "caption"),
    [
        (b"a dog", "a dog"),
        ("ein Hündchen 犬".encode(), "ein Hündchen 犬"),
        (b"\xef\xbb\xbfa dog", "a dog"),
        (b"bad \xff byte", "bad \N{REPLACEMENT CHARACTER} byte"),
        (b"", ""),
        (b" a\n", " a\n"),
    ],
)
def test_captions(data: bytes, caption: str, place: Callable[[Files], str]) -> None:
    with ShardReader(place([("a.jpg", b""), ("a.txt", data), ("b.jpg", b"")])) as reader:
        first, second = reader.index.samples
        assert reader.read_caption(first) == caption
        assert reader.read_caption(second) is None


@pytest.mark.parametrize(
    ("data", "fields", "log"),
    [
        (b'{"a": 1, "b": {"c": null}}', {"a": 1, "b": {"c": None}}, ""),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}, ""),
        ('{"a": "ü"}'.encode("utf-16"), {"a": "ü"}, ""),
        (b'{"a": "\xff"}', {"a": "\N{REPLACEMENT CHARACTER}"}, ""),
        (b"", None, "cannot be parsed"),
        (b'{"a": ', None, "cannot be parsed"),
        (b"[" * 100_000, None, "cannot be parsed"),
        (b'{"a": ' + b"9" * 5000 + b"}", None, "cannot be parsed"),
        (b"[1]", None, "is no object"),
        (b"null", None, "is no object"),
    ],
)
def test_json(data: bytes, fields: Any, log: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_tar(tmp_path / "x.tar", [("a.json", data), ("b.jpg", b""), ("c.json", b"{}")])
    with ShardReader(path) as reader, caplog.at_level(logging.WARNING):
        samples = reader.index.samples
        assert [reader.read_json(sample) for sample in samples] == [fields, None, {}]
        assert ("x.tar: sample 'a'" in caplog.text and log in caplog.text) if log else not caplog.text
        caplog.clear()
        assert list(reader.read_jsons(samples)) == [fields, None, {}]
        assert caplog.text == ""  # one line a shard


# --- samples of ids


def shard(tmp_path: Path, jsons: dict[str, dict[str, Any] | None], name: str = "x.tar") -> Path:
    """A tar with a picture for each key, and JSON where there are fields."""
    files: list[tuple[str, bytes]] = []
    for key, fields in jsons.items():
        files.append((f"{key}.jpg", key.encode()))
        if fields is not None:
            files.append((f"{key}.json", json.dumps(fields).encode()))
    return make_tar(tmp_path / name, files)


def found(path: Path, ids: Any, id_col: str = "id") -> list[int]:
    with ShardReader(path) as reader:
        places = match_samples(reader, ids, id_col)
    assert places.dtype == np.int64
    return places.tolist()


def test_ids_are_keys(tmp_path: Path) -> None:
    path = shard(tmp_path, {"b": None, "a": None})
    assert found(path, ["a", "b", "c", None]) == [1, 0, -1, -1]
    assert found(path, []) == []


def test_integers_are_padded_keys(tmp_path: Path) -> None:
    path = shard(tmp_path, {f"{number:05d}": {"key": f"{number:05d}"} for number in (3, 1, 2)})
    for ids in ([1, 2, 3, 4], pd.Series([1, 2, 3, None]), pd.Series([1, 2, 3, 4], dtype="int64[pyarrow]")):
        assert found(path, ids, "key") == [1, 2, 0, -1]


@pytest.mark.parametrize("values", [[30, 10, 20], ["x", "y", "z"], ["u/1", "u/2", "v/1"], [30.0, 10.0, 20.0]])
def test_ids_may_live_in_the_json_only(values: list[Any], tmp_path: Path) -> None:
    path = shard(tmp_path, {f"k{number}": {"id": value} for number, value in enumerate(values)})
    assert found(path, [values[2], values[0], values[1], "else", 99]) == [2, 0, 1, -1, -1]


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("count", [2, 3, 8, 9, 50])
def test_ids_in_the_json_that_look_like_other_keys(count: int, as_text: bool, tmp_path: Path) -> None:
    # Every id equals the key of another sample: matching by key would pair every picture with a wrong row.
    values: list[Any] = [f"{(number + 1) % count:04d}" if as_text else (number + 1) % count for number in range(count)]
    path = shard(tmp_path, {f"{number:04d}": {"id": value} for number, value in enumerate(values)})
    assert found(path, values) == list(range(count))
    assert found(path, values[::-1]) == list(range(count))[::-1]


def test_ids_in_the_json_some_of_which_look_like_keys(tmp_path: Path) -> None:
    # Keys 0..9, ids 5..14: the ids 5..9 look like keys, the others like nothing.
    path = shard(tmp_path, {f"{number:04d}": {"id": number + 5} for number in range(10)})
    assert found(path, range(5, 15)) == list(range(10))
    assert found(path, [9, 5]) == [4, 0]


def test_json_that_agrees_may_write_the_id_otherwise(tmp_path: Path) -> None:
    for number, (ids, value) in enumerate(
        [([7], "0007"), (["0007"], 7), ([7.0], 7), (["0007"], "0007"), (["d/0007"], "0007")]
    ):
        path = shard(tmp_path, {"d/0007": {"id": value}, "d/0009": None}, f"{number}.tar")
        assert found(path, ids) == [0]


def test_json_left_behind_by_a_renaming_does_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # The samples were picked and renamed, the fields were not.
    old = [2, 5, 11, 17, 23]
    path = shard(tmp_path, {f"{new:05d}": {"id": f"{value:05d}"} for new, value in enumerate(old)})
    with caplog.at_level(logging.INFO):
        assert found(path, [f"{new:05d}" for new in range(5)]) == [0, 1, 2, 3, 4]
    assert "the keys count" in caplog.text


def test_the_json_of_samples_that_no_key_claimed_is_asked(tmp_path: Path) -> None:
    path = shard(tmp_path, {"a": None, "b": {"id": "x"}, "c": {"other": 1}, "d": {"id": "y"}})
    assert found(path, ["y", "a", "x", "c", "z"]) == [3, 0, 1, 2, -1]


def test_failed_downloads_cost_no_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # img2dataset lists failed downloads; its JSON says the keys, so it has nothing to say about them.
    path = shard(tmp_path, {f"{number:05d}": {"key": f"{number:05d}"} for number in range(0, 100, 2)})
    asked: list[Sample] = []
    read_jsons = ShardReader.read_jsons

    def record(self: ShardReader, samples: Sequence[Sample]) -> Any:
        asked.extend(samples)
        return read_jsons(self, samples)

    monkeypatch.setattr(ShardReader, "read_jsons", record)
    ids = [f"{number:05d}" for number in range(100)]
    assert found(path, ids, "key") == [number // 2 if number % 2 == 0 else -1 for number in range(100)]
    assert 0 < len(asked) <= 8
    asked.clear()
    assert found(path, ["00004", "00005"], "key") == [2, -1]  # of a filtered frame
    assert 0 < len(asked) <= 16


def test_base_names_are_for_keys_only(tmp_path: Path) -> None:
    path = shard(tmp_path, {"a": {"id": "http://x/1.jpg"}, "b": {"id": "http://y/2.jpg"}})
    assert found(path, ["1.jpg", "http://y/2.jpg"]) == [-1, 1]


def test_ids_of_which_one_equals_its_key_by_chance(tmp_path: Path) -> None:
    path = shard(tmp_path, {f"{number:04d}": {"id": 3 * number} for number in range(30)})
    assert found(path, [0, 87]) == [0, 29]
    assert found(path, [0, 87, 3, 4]) == [0, 29, 1, -1]


def test_ids_repeated_in_the_json_are_an_error(tmp_path: Path) -> None:
    path = shard(tmp_path, {"a": {"id": 1}, "b": {"id": 2}, "c": {"id": 1}})
    with pytest.raises(
        IdMismatchError, match=r"x\.tar: 1 ids stand in the JSON of several samples, '1' for one .* 'a', 'c'"
    ):
        found(path, [1, 2])
    assert found(path, [2]) == [1]
    path = shard(tmp_path, {"a": {"id": "1"}, "b": {"id": "01"}})
    with pytest.raises(IdMismatchError, match=r"in the JSON, the id 1 names several samples"):
        found(path, [1])


def test_keys_that_one_integer_could_mean(tmp_path: Path) -> None:
    with pytest.raises(IdMismatchError, match=r"x\.tar: the id 1 names several samples, '1', '01'"):
        found(shard(tmp_path, {"1": None, "01": None}), [1])
    assert found(shard(tmp_path, {"1": {"id": 8}, "01": {"id": 1}}), [1, 8]) == [1, 0]  # the JSON knows


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_id_finds_its_own_picture(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    # Ids live in the JSON, and are any numbers or strings, whatever the keys look like.
    keys = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=8, unique=True))
    kind = data.draw(st.sampled_from([st.integers(0, 40), st.integers(0, 40).map("{:03d}".format)]))
    ids = data.draw(st.lists(kind, min_size=len(keys), max_size=len(keys), unique=True))
    path = shard(
        tmp_path_factory.mktemp("x"), {f"{key:03d}": {"id": value} for key, value in zip(keys, ids, strict=True)}
    )
    order = data.draw(st.permutations(range(len(ids))))
    assert found(path, [ids[place] for place in order]) == list(order)
