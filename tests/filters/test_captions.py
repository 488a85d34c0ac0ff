"""Filters of captions, against plain Python: lengths, languages and duplicates."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.errors import ArgumentError, DatasetError, MissingColumnError, RunError
from nemo_image.filters import CaptionDuplicates, CaptionLanguage, CaptionStats, equal_keys, keep
from nemo_image.filters.caption_duplicates import CAPTION_COUNT, CAPTION_IS_DUPLICATE, KeyByCaption
from nemo_image.shards.read import ShardReader
from tests.makers import encoded, picture, write_rows, write_tar

CAPTIONS = [
    "a dog on the beach",
    None,
    "",
    "   ",
    "  two   words ",
    "IMG_2034.JPG",
    "!!! $$$ ???",
    "猫が窓のそばに座っている",
    "Кошка на окне",
    "हिन्दी में लिखा हुआ",
    "صورة لقطة على النافذة",
    "e\u0301te\u0301 👍",
    "x" * 100_000,
    "word " * 20_000,
    "line\nbreak\tand tab",
    "\ud83d broken".encode("utf-8", "replace").decode(),
]


def dataset_of(folder: Path, captions: list[str | None], sizes: list[int] | None = None) -> ImageTextPairDataset:
    start = 0
    for number, size in enumerate(sizes or [len(captions)]):
        some = captions[start : start + size]
        write_tar(folder / f"{number}.tar", [])
        rows = {"key": [str(row) for row in range(len(some))], "caption": pa.array(some, pa.string())}
        write_rows(folder / f"{number}.parquet", pa.table(rows))
        start += size
    return ImageTextPairDataset.from_webdataset(folder)


def test_lengths_of_any_captions(tmp_path: Path) -> None:
    frame = CaptionStats()(dataset_of(tmp_path, CAPTIONS)).metadata.compute()
    assert frame["caption_length"].tolist() == [len((text or "").strip()) for text in CAPTIONS]
    assert frame["caption_words"].tolist() == [len(re.findall(r"\S+", text or "")) for text in CAPTIONS]
    for text, share in zip(CAPTIONS, frame["caption_alphanumeric"], strict=True):
        stripped = (text or "").strip()
        good = sum(unicodedata.category(one)[0] in "LNM" for one in stripped)
        assert share == pytest.approx(good / len(stripped) if stripped else 0, abs=1e-6)
    assert "image_error" not in frame


def test_captions_in_the_tars(tmp_path: Path, scheduler: Any) -> None:
    jpg = encoded(picture(1))
    samples = [
        ("a", {"jpg": jpg, "txt": b"from the text", "json": b'{"caption": "not this"}'}),
        ("b", {"jpg": jpg, "json": json.dumps({"caption": "from JSON"}).encode()}),
        ("c", {"jpg": jpg, "txt": b"\xff\xfebad bytes"}),
        ("d", {"jpg": jpg}),
        ("e", {"jpg": jpg, "json": b"{broken"}),
        ("f", {"jpg": jpg, "json": json.dumps({"caption": ["first", "second"]}).encode()}),
    ]
    write_tar(tmp_path / "x.tar", samples)
    write_rows(tmp_path / "x.parquet", {"key": ["f", "e", "d", "c", "b", "a", "nosuch"]})
    saved = CaptionStats()(ImageTextPairDataset.from_webdataset(tmp_path)).save_metadata(tmp_path / "out")
    frame = saved.metadata.compute()
    assert frame["caption_length"].tolist()[:6] == [5, 0, 0, len("\ufffd\ufffdbad bytes"), 9, 13]
    assert frame["image_error"].notna().tolist() == [False] * 6 + [True]
    assert (saved.run_totals or {})["rows_without_sample"] == 1


@pytest.mark.in_process("watches or changes this process")
def test_a_tars_captions_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "x.tar", [(str(row), {"jpg": b"x", "txt": b"one two"}) for row in range(5)])
    write_rows(tmp_path / "x.parquet", {"key": [str(row) for row in range(5)]})
    texts = []
    read_many = ShardReader.read_many

    def counting(self: ShardReader, members: Any) -> Any:
        members = list(members)
        texts.extend(one.name for one in members if one.extension == "txt")
        return read_many(self, members)

    monkeypatch.setattr(ShardReader, "read_many", counting)
    pytest.importorskip("py3langid", reason="the extra 'language' is not installed")
    CaptionLanguage()(CaptionStats()(ImageTextPairDataset.from_webdataset(tmp_path))).save_metadata(tmp_path / "out")
    assert sorted(texts) == [f"{row}.txt" for row in range(5)]


def test_a_column_of_lists_and_other_columns(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [])
    lists = pa.array([["one two", "three"], [], None, [None, "last"]], pa.list_(pa.string()))
    rows = {"key": ["1", "2", "3", "4"], "texts": lists, "number": [1, 2, 3, 4]}
    write_rows(tmp_path / "x.parquet", pa.table(rows))
    dataset = ImageTextPairDataset.from_webdataset(tmp_path)
    assert CaptionStats("texts")(dataset).metadata["caption_words"].compute().tolist() == [2, 0, 0, 1]
    with pytest.raises(ArgumentError, match="not text"):
        CaptionStats("number")(dataset)
    with pytest.raises(MissingColumnError, match="nosuch"):
        CaptionStats("nosuch")(dataset)


def test_languages(tmp_path: Path) -> None:
    pytest.importorskip("py3langid", reason="the extra 'language' is not installed")
    texts = {
        "A man is riding a bicycle through the streets of the old town in the rain": "en",
        "Ein Mann fährt im Regen mit dem Fahrrad durch die Straßen der Altstadt": "de",
        "Un homme fait du vélo dans les rues de la vieille ville sous la pluie": "fr",
        "Мужчина едет на велосипеде по улицам старого города под дождём": "ru",
        "雨の中、男性が旧市街の通りを自転車で走っている": "ja",
        "رجل يركب دراجة في شوارع المدينة القديمة تحت المطر": "ar",
        "": "und",
        "  ": "und",
    }
    captions = [*texts, None, "word " * 20_000]
    frame = CaptionLanguage()(dataset_of(tmp_path, captions)).metadata.compute()
    assert frame["caption_language"].tolist()[: len(texts)] == list(texts.values())
    assert frame["caption_language"].iloc[len(texts)] == "und"
    assert frame["caption_language_score"].notna().all()
    assert frame["caption_language_score"].between(0, 1).all()
    assert (frame["caption_language_score"].iloc[:6] > 0.4).all()
    assert (frame["caption_language_score"][frame["caption_language"] == "und"] == 0).all()


def normal(text: str | None) -> str:
    return " ".join(unicodedata.normalize("NFKC", text or "").casefold().split())


@pytest.mark.parametrize(("range_rows", "groups"), [(2**21, 1024), (3, 2)])
def test_duplicates_are_counted_over_all_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, range_rows: int, groups: int
) -> None:
    monkeypatch.setattr(equal_keys, "RANGE_ROWS", range_rows)
    monkeypatch.setattr(equal_keys, "MAX_GROUPS", groups)
    rng = random.Random(7)
    spellings = [None, "", "Cat", " cat  ", "ＣＡＴ", "dog", "Straße", "STRASSE", "ﬁne  day", "fine day"]
    captions = [rng.choice([*spellings, f"one {rng.randrange(9)}"]) for _ in range(90)]
    dataset = CaptionDuplicates()(dataset_of(tmp_path, captions, [11, 30, 0, 1, 48]))
    frame = dataset.metadata.compute()
    counts = Counter(map(normal, captions))
    seen: set[str] = set()
    for text, count, repeated in zip(captions, frame[CAPTION_COUNT], frame[CAPTION_IS_DUPLICATE], strict=True):
        key = normal(text)
        assert (count, repeated) == ((counts[key], key in seen) if key else (0, False))
        seen.add(key)
    chosen = keep(dataset, "not caption_is_duplicate and caption_count > 0")
    assert chosen.metadata["nemo_image_kept"].compute().sum() == len({key for key in counts if key})


def test_keys_that_share_their_first_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = KeyByCaption.__call__

    def near(self: KeyByCaption, frame: Any) -> Any:
        keys, has_key = key(self, frame)
        return keys & np.array([2**63, 2**64 - 1], np.uint64), has_key  # one bit of the first half is left

    monkeypatch.setattr(KeyByCaption, "__call__", near)
    captions: list[str | None] = [f"caption {number % 7}" for number in range(30)]
    frame = CaptionDuplicates()(dataset_of(tmp_path, captions, [12, 18])).metadata.compute()
    counts = Counter(captions)
    assert frame[CAPTION_COUNT].tolist() == [counts[text] for text in captions]
    assert frame[CAPTION_IS_DUPLICATE].tolist() == [number >= 7 for number in range(30)]


def test_the_result_is_found_again_and_belongs_to_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions: list[str | None] = ["a", "b", "a"]
    out = tmp_path / "counts"
    dataset = CaptionDuplicates(output_dir=out)(dataset_of(tmp_path / "in", captions, [2, 1]))
    expected = dataset.metadata[CAPTION_COUNT].compute().tolist()
    assert expected == [2, 1, 2]

    def fail(self: Any) -> None:
        raise AssertionError("counted again")

    with monkeypatch.context() as patch:
        patch.setattr(equal_keys.EqualKeys, "run", fail)
        again = CaptionDuplicates(output_dir=out)(ImageTextPairDataset.from_webdataset(tmp_path / "in"))
        assert again.metadata[CAPTION_COUNT].compute().tolist() == expected
    with pytest.raises(DatasetError, match="other rows"):
        CaptionDuplicates(output_dir=out)(dataset_of(tmp_path / "other", ["x"]))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(DatasetError, match=r"notes\.txt"):
        CaptionDuplicates(output_dir=tmp_path / "full")(dataset_of(tmp_path / "in2", ["x"]))


def test_duplicates_of_the_rows_that_a_filter_left(tmp_path: Path, cluster: Any) -> None:
    with cluster.as_current():
        dataset = dataset_of(tmp_path, ["a", "b", "a", "a"], [2, 2])
        dataset.metadata = dataset.metadata[dataset.metadata["key"] == "0"]  # the first of each shard: both "a"
        frame = CaptionDuplicates()(dataset).metadata.compute()
    assert frame[CAPTION_COUNT].tolist() == [2, 2]
    assert frame[CAPTION_IS_DUPLICATE].tolist() == [False, True]


def test_duplicates_in_an_unreadable_tar_are_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("1", {"jpg": b"x", "txt": b"cat"})])
    write_rows(tmp_path / "x.parquet", {"key": ["1"]})
    dataset = ImageTextPairDataset.from_webdataset(tmp_path)
    assert CaptionDuplicates()(dataset).metadata[CAPTION_COUNT].compute().tolist() == [1]
    (tmp_path / "x.tar").write_bytes(b"garbage" * 300)
    with pytest.raises(RunError, match=r"x\.tar"):
        CaptionDuplicates()(ImageTextPairDataset.from_webdataset(tmp_path))
