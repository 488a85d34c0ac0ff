"""Blocklists of ids, URLs and hashes, from every kind of file, against Python's own sets."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.errors import ArgumentError, MissingColumnError
from nemo_image.filters import Blocklist, keep
from nemo_image.filters import entries as entries_module
from nemo_image.filters.entries import hash_texts, write_hashes
from tests.makers import make_dataset, tar_members, write_rows, write_tar


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    folder = make_dataset(tmp_path / "in", {"a": 4, "b": 3})
    for name in ("a", "b"):
        table = pq.read_table(folder / f"{name}.parquet")
        urls = [f"http://x/{one}.jpg?q=#ü" if one != "000003" else None for one in table["key"].to_pylist()]
        pq.write_table(table.append_column("url", pa.array(urls, pa.string())), folder / f"{name}.parquet")
    return folder


def blocked(folder: Path, *arguments: Any, **settings: Any) -> list[int]:
    """The seeds of the rows that a list names."""
    dataset = Blocklist(*arguments, **settings)(ImageTextPairDataset.from_webdataset(folder))
    frame = dataset.metadata.compute()
    assert frame["blocked"].notna().all()
    return [int(seed) for seed in frame["seed"][frame["blocked"].to_numpy(bool)]]


def write_list(folder: Path, name: str, values: list[Any], column: str = "url") -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"other": [1] * len(values), column: values}), path)
    elif ".csv" in name or ".tsv" in name:
        mark = "\t" if ".tsv" in name else ","
        text = "\n".join([f"other{mark}{column}", *(f'1{mark}"{value}"' for value in values)])
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    else:
        text = "\r\n".join(["", *(f" {value} " for value in values), ""])
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("name", ["l.parquet", "l.csv", "l.tsv", "l.csv.gz", "l.txt", "l.txt.gz", "l"])
def test_files_of_urls(pairs: Path, tmp_path: Path, name: str) -> None:
    path = write_list(tmp_path, name, [f"http://x/{seed:06d}.jpg?q=#ü" for seed in (1, 3, 5, 99)])
    assert blocked(pairs, path, column="url") == [1, 5]  # row 3 has no URL


def test_ids_of_any_type(pairs: Path, tmp_path: Path, scheduler: Any) -> None:
    assert blocked(pairs, ["000002", "2", "000006"]) == [2, 6]
    assert blocked(pairs, [2, 6], column="seed") == [2, 6]
    assert blocked(pairs, write_list(tmp_path, "l.parquet", [0, 4], "seed"), column="seed") == [0, 4]
    assert blocked(pairs, []) == []


@pytest.mark.parametrize(
    ("name", "make"),
    [("sha256", lambda data: hashlib.sha256(data).hexdigest()), ("xxh3_128", xxhash.xxh3_128_hexdigest)],
)
def test_hashes_of_the_stored_bytes(pairs: Path, name: Any, make: Any) -> None:
    members = tar_members(pairs / "a.tar") | tar_members(pairs / "b.tar")
    listed = [make(members["000001.jpg"]), make(members["000006.jpg"]).upper()]
    assert blocked(pairs, listed, content_hash=name) == [1, 6]


def test_against_a_set_whatever_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries_module, "BATCH", 1000)
    rng = random.Random(3)
    listed = [str(rng.randrange(30_000)) for _ in range(20_000)]
    hashes = write_hashes(str(tmp_path / "x.hashes"), [listed[:7000], listed[7000:]], {})
    texts = [str(number) for number in range(30_000)]
    known = set(listed)
    assert hashes.contains(hash_texts(texts)).tolist() == [text in known for text in texts]
    assert (tmp_path / "x.hashes").stat().st_size == 16 * len(set(listed)) + 16
    again = write_hashes(str(tmp_path / "y.hashes"), [sorted(set(listed))], {})
    assert again.digest == hashes.digest


def test_entries_that_share_half_of_a_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(texts: Any) -> Any:
        return np.array([[int(text) // 10, int(text)] for text in texts], np.uint64).reshape(-1, 2)

    monkeypatch.setattr(entries_module, "hash_texts", half)
    hashes = write_hashes(str(tmp_path / "x.hashes"), [["11", "13", "17", "25"]], {})
    asked = [str(number) for number in range(10, 40)]
    assert [text for text, hit in zip(asked, hashes.contains(half(asked)), strict=True) if hit] == [
        "11",
        "13",
        "17",
        "25",
    ]


def test_lists_are_filed_once_where_asked(pairs: Path, tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    path = write_list(tmp_path, "l.txt", ["000001"])
    assert blocked(pairs, path, output_dir=lists) == [1]
    stamps = {one: one.stat().st_mtime_ns for one in lists.glob("*.hashes")}
    assert len(stamps) == 1
    assert blocked(pairs, path, output_dir=lists) == [1]
    assert {one: one.stat().st_mtime_ns for one in lists.glob("*.hashes")} == stamps
    path.write_text("000002\n000003\n")
    assert blocked(pairs, path, output_dir=lists) == [2, 3]
    assert not (pairs / "_nemo_image").exists()


def test_a_changed_list_is_looked_up_anew(pairs: Path) -> None:
    def saved(listed: list[str]) -> list[bool]:
        dataset = Blocklist(listed)(ImageTextPairDataset.from_webdataset(pairs)).save_metadata()
        found: list[bool] = dataset.metadata["blocked"].compute().tolist()
        return found

    assert sum(saved(["000001"])) == 1
    assert sum(saved(["000001", "000002"])) == 2


def test_several_lists_in_one_expression(pairs: Path) -> None:
    dataset = Blocklist(["000001"])(ImageTextPairDataset.from_webdataset(pairs))
    dataset = Blocklist([3, 4], column="seed", blocked_column="bad_seed")(dataset)
    frame = keep(dataset, "not blocked and not bad_seed").metadata.compute()
    assert frame.query("nemo_image_kept")["seed"].tolist() == [0, 2, 5, 6]


def test_an_image_that_is_not_there_is_not_blocked_but_said(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1", {"jpg": b"x"})])
    write_rows(tmp_path / "a.parquet", {"key": ["1", "2"]})
    listed = [hashlib.sha256(b"x").hexdigest()]
    frame = Blocklist(listed, content_hash="sha256")(ImageTextPairDataset.from_webdataset(tmp_path)).metadata.compute()
    assert frame["blocked"].iloc[0]
    assert frame["blocked"].isna().tolist() == [False, True]
    assert frame["image_error"].iloc[1].startswith("missing")


@pytest.mark.parametrize(
    ("entries", "settings", "kind", "said"),
    [
        ("nosuch.txt", {}, ArgumentError, "nosuch.txt"),
        (["zz"], {"content_hash": "sha256"}, ArgumentError, "64 hexadecimal"),
        (["a"], {"column": "score"}, ArgumentError, "whole numbers"),
        (["a"], {"column": "nosuch"}, MissingColumnError, "nosuch"),
        (["a"], {"column": "url", "content_hash": "sha256"}, ArgumentError, "contradict"),
        (["a"], {"content_hash": "md5"}, ArgumentError, "md5"),
        (["a", b"000001"], {}, ArgumentError, "entry 1 .* bytes b'000001'"),
        ([["000001"]], {}, ArgumentError, "entry 0 .* list"),
        ([1, "a", None], {"column": "seed"}, ArgumentError, "entry 2 .* NoneType None"),
        ([1.0], {"column": "seed"}, ArgumentError, "entry 0 .* float 1.0"),
        ([True], {"column": "seed"}, ArgumentError, "entry 0 .* bool True"),
        (b"000001", {}, ArgumentError, "file's path, or a list of texts or whole numbers, not bytes"),
        (pd.DataFrame({"key": ["000001"]}), {}, ArgumentError, "not DataFrame"),
        (None, {}, ArgumentError, "file's path, or a list of texts or whole numbers, not NoneType"),
        (5, {}, ArgumentError, "file's path, or a list of texts or whole numbers, not int"),
        ("", {}, ArgumentError, "path is ''"),
    ],
)
def test_what_is_refused(pairs: Path, entries: Any, settings: Any, kind: Any, said: str) -> None:
    with pytest.raises(kind, match=said):
        blocked(pairs, entries, **settings)


@pytest.mark.parametrize("name", ["l.csv", "l.tsv", "l.csv.gz"])
def test_a_table_without_a_header_is_refused(pairs: Path, tmp_path: Path, name: str) -> None:
    data = b"000000\n000001\n"
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(MissingColumnError, match=rf"{name} has no column 'key'; its first line is '000000'.*\.txt"):
        blocked(pairs, tmp_path / name)


def test_a_column_of_hashes_is_called_as_the_hash(pairs: Path, tmp_path: Path) -> None:
    listed = hashlib.sha256(tar_members(pairs / "a.tar")["000001.jpg"]).hexdigest()
    (tmp_path / "l.csv").write_text(f"sha256\n{listed}\n")
    assert blocked(pairs, tmp_path / "l.csv", content_hash="sha256") == [1]
    (tmp_path / "l.csv").write_text(f"{listed}\n{listed}\n")
    with pytest.raises(MissingColumnError, match="no column 'sha256'"):
        blocked(pairs, tmp_path / "l.csv", content_hash="sha256")


@pytest.mark.parametrize(
    "text",
    [
        "key\n000000\n000004\n",
        "key, url\n 000000,x\n 000004 ,y\n",
        'url , key\r\n"a,b", "000000"\r\n\r\n"c\r\nd",000004\r\n',
        "\ufeff\nkey\n\n000000\n  \n000004",
    ],
)
def test_tables_in_all_their_forms(pairs: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "l.csv").write_bytes(text.encode())
    assert blocked(pairs, tmp_path / "l.csv") == [0, 4]
    (tmp_path / "l.csv.xz").write_bytes(lzma.compress(text.encode()))
    assert blocked(pairs, tmp_path / "l.csv.xz") == [0, 4]


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("key;url\n000000;x\n", MissingColumnError, "its first line is 'key;url'.*',' between"),
        ("", MissingColumnError, "no column 'key'"),
        ("key,key\n1,2\n", MissingColumnError, "has the column 'key' 2 times"),
        ('key\n000000\n"000001\n000002\n', ArgumentError, "line 3: .*quote"),
        ('key\n"000000\n"000001"\n', ArgumentError, "line 2: "),
        ("key,url\n000000,x\n000001\n", ArgumentError, "line 3: 1 cells under a header of 2"),
        ("key\n000000,http://x\n", ArgumentError, "line 2: 2 cells under a header of 1"),
    ],
)
def test_tables_that_would_block_too_little(pairs: Path, tmp_path: Path, text: str, kind: Any, said: str) -> None:
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(kind, match=rf"l\.csv.*{said}"):
        blocked(pairs, tmp_path / "l.csv")


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zip"])
def test_files_that_are_not_compressed_as_they_say(pairs: Path, tmp_path: Path, ending: str) -> None:
    text = b"".join(f"{number * 7919 % 1_000_003}\n".encode() for number in range(20_000)) + b"000001\n"
    path = tmp_path / f"l.txt.{ending}"
    if ending == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
            made.writestr("l.txt", text)
    else:
        path.write_bytes({"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[ending](text))
    assert blocked(pairs, path) == [1]
    whole = path.read_bytes()
    middle = len(whole) // 2
    damaged = whole[:middle] + bytes(byte ^ 255 for byte in whole[middle : middle + 64]) + whole[middle + 64 :]
    for content in (b"000001\n", whole[:middle], damaged):
        path.write_bytes(content)
        with pytest.raises(ArgumentError, match=rf"l\.txt\.{ending} is not what its name says"):
            blocked(pairs, path)


def test_folders_and_wrong_columns_are_named(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"the blocklist .*in is a folder"):
        blocked(pairs, pairs)
    with pytest.raises(ArgumentError, match=r"l\.parquet, column 'url': .* whole numbers, not double"):
        blocked(pairs, write_list(tmp_path, "l.parquet", [1.5]), column="url")


def test_whole_numbers_of_numpy_are_entries(pairs: Path) -> None:
    assert blocked(pairs, np.array([2, 6], np.uint16), column="seed") == [2, 6]


def test_files_that_are_not_what_they_say(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "l.parquet").write_bytes(b"no parquet")
    with pytest.raises(ArgumentError, match=r"l\.parquet"):
        blocked(pairs, tmp_path / "l.parquet")
    with pytest.raises(MissingColumnError, match="first line is 'other,name'"):
        blocked(pairs, write_list(tmp_path, "l.csv", ["1"], "name"), column="url")
    (tmp_path / "l.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ArgumentError, match=r"l\.txt"):
        blocked(pairs, tmp_path / "l.txt")
