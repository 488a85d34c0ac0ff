"""A report says what is in the files, whatever is written there."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.show import thumbnails as thumbnails_module
from nemo_image.datasets.show.thumbnails import BYTES, PIXELS, safe_thumbnails, thumbnail
from nemo_image.embedders import TimmImageEmbedder
from nemo_image.engine.run import without_client
from nemo_image.errors import ArgumentError, MissingColumnError
from nemo_image.reports import write_report
from nemo_image.reports.report import MOST_BYTES
from tests.makers import TINY_MODEL, encoded, make_dataset, picture, write_rows, write_tar
from tests.reports.makers import HOSTILE, write_hostile


class Page(HTMLParser):
    """What a page has: its tags with attributes, and its text by section."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self._section = ""
        self._hidden = False
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        self._hidden = tag in ("style", "script")
        if tag == "section" and found.get("id"):
            self._section = str(found["id"])

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False
        if tag in ("dt", "dd", "li", "td", "th", "p", "h2", "h3", "h4"):
            self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.sections[self._section] = self.sections.get(self._section, "") + data

    def text(self, section: str) -> str:
        return " ".join(self.sections[section].split())

    def pictures(self) -> list[Image.Image]:
        sources = [str(attributes["src"]) for tag, attributes in self.tags if tag == "img"]
        assert all(one.startswith("data:image/jpeg;base64,") for one in sources)
        return [Image.open(io.BytesIO(base64.b64decode(one.partition(",")[2]))) for one in sources]


def report(folder: Path, **options: Any) -> tuple[Any, Page]:
    path = folder.parent / "report.html"
    done = write_report(ImageTextPairDataset.from_webdataset(folder), path, **options)
    assert path.stat().st_size == done.bytes
    return done, Page(path)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Page, pd.DataFrame]:
    folder = write_hostile(tmp_path_factory.mktemp("hostile") / "data")
    rows = pd.concat([pd.read_parquet(path) for path in sorted(folder.glob("*.parquet"))])
    return *report(folder, thresholds={"aesthetic_score": [4.5, 5]}), rows


def test_numbers_are_those_of_the_files(hostile: tuple[Any, Page, pd.DataFrame]) -> None:
    done, page, rows = hostile
    assert done.rows == len(rows)
    overview = page.text("overview")
    assert f"rows {len(rows)} in 2 shards" in overview
    assert f"with an image error {rows['image_error'].notna().sum()}" in overview
    copies = rows["is_duplicate"].sum()
    assert f"copies of others {copies} {copies / len(rows):.1%}; kept {len(rows) - copies}" in overview
    assert f"with a caption {(rows['caption'] != '').sum()} " in overview
    scores = rows["aesthetic_score"]
    text = page.text("score-1")
    for limit in (4.5, 5):
        passed = int((scores >= limit).sum())
        assert f"{passed} of {len(rows)} scored rows ({passed / len(rows):.1%}) are at or above {limit:g}" in text
    assert f"{len(rows) - copies} are kept" in page.text("duplicates")
    assert f"{copies} groups of copies" in page.text("duplicates")
    assert "2 pictures, 1 of them a copy" in page.text("duplicates")
    sizes = rows["cluster"].value_counts()
    assert f"{len(rows)} rows in 3 clusters" in page.text("clusters")
    assert f"cluster {sizes.index[0]} {sizes.iloc[0]}" in page.text("clusters")
    bad = rows["image_error"].notna().sum()
    assert f"<b>bold</b> {bad} {bad / len(rows):.1%}" in page.text("errors")
    assert done.pictures == len(page.pictures())


def test_histograms_are_numpys(hostile: tuple[Any, Page, pd.DataFrame]) -> None:
    _, page, rows = hostile
    text = page.text("score-1")
    table = re.findall(r"([\d.]+) to ([\d.]+) (\d+)(?= )", text.partition("from – to rows")[2].partition("scored")[0])
    assert len(table) > 5
    scores = rows["aesthetic_score"].to_numpy(np.float64)
    for low, high, count in table:
        assert ((scores >= float(low)) & (scores < float(high))).sum() == int(count)
    assert sum(int(count) for _, _, count in table) == len(rows)


def test_what_is_written_there_stays_text(hostile: tuple[Any, Page, pd.DataFrame]) -> None:
    _, page, _ = hostile
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint({"script", "iframe", "object", "embed", "base", "form", "u", "i-am-not"})
    assert "taken" not in {attributes.get("id") for _, attributes in page.tags}
    everything = " ".join(page.sections.values())
    assert "<script>document.title" in everything
    assert "{{ 7 * 7 }}" in everything
    assert "\x00" not in everything
    assert "\u202e" not in everything
    attributes = {name for _, found in page.tags for name in found}
    assert not {name for name in attributes if name.startswith("on")}
    links = [value for _, found in page.tags for name, value in found.items() if name in ("src", "href", "action")]
    assert all(str(one).startswith(("data:", "#")) for one in links)
    assert max(len(one) for one in re.findall(r"\S+", everything)) <= 310


def test_unsafe_pictures_are_veiled(hostile: tuple[Any, Page, pd.DataFrame]) -> None:
    """Those at or above the threshold, of the galleries just below it, and from it on."""
    _, page, _ = hostile
    numbers = [str(found.get("id")) if tag == "section" else str(found.get("class")) for tag, found in page.tags
               if tag == "figure" or (tag == "section" and str(found.get("id")).startswith("score-"))]  # fmt: skip
    shown = numbers[numbers.index("score-2") + 1 :][:12]
    assert shown == ["ni-card"] * 6 + ["ni-card ni-veiled"] * 6


def test_the_size_is_bounded(tmp_path: Path) -> None:
    """Noise, which compresses worst; texts whose every character is escaped; as much of all as is shown."""
    captions = tuple('"' * n for n in (100_000, 99_999))
    folder = write_hostile(tmp_path / "data", captions, noise=True, rows=60)
    for path in folder.glob("*.parquet"):
        table = pq.read_table(path)
        for number in range(30):
            table = table.append_column(f"score {number} " + '"' * 500, table["nsfw_score"])
            table = table.append_column(f"text {number}", table["caption"])
        pq.write_table(table, path)
    done, page = report(folder, pictures=100, groups=40)
    assert 200 < done.pictures <= 320
    assert 1_000_000 < done.bytes < MOST_BYTES
    pictures = page.pictures()
    assert max(max(one.size) for one in pictures) == PIXELS


def test_a_filtered_frame_is_reported_as_it_is(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", {"a": 20, "b": 10})
    dataset = ImageTextPairDataset.from_webdataset(tmp_path / "data")
    dataset.metadata = dataset.metadata[dataset.metadata["score"] < 2.5]
    dataset.metadata["twice"] = dataset.metadata["score"] * 2
    done = write_report(dataset, tmp_path / "r.html", thresholds={"twice": 4})
    page = Page(tmp_path / "r.html")
    assert done.rows == 25
    assert "5 of 25 scored rows (20.0%) are at or above 4" in page.text("score-1")
    assert "No run of nemo_image has left a ledger" in page.text("rows")


def test_pending_columns_are_computed_once(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", {"a": 6})
    write_tar(tmp_path / "data" / "b.tar", [("x", {"jpg": b"no picture"})])
    write_rows(tmp_path / "data" / "b.parquet", {"key": ["x"], "caption": [None], "seed": [0], "score": [0.0]})
    embedder = TimmImageEmbedder(TINY_MODEL, autocast=False)
    dataset = embedder(ImageTextPairDataset.from_webdataset(tmp_path / "data"))
    write_report(dataset, tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert "unknown 1 14.3%" in page.text("errors")
    assert f"height, image_embedding, image_error, width TimmImageEmbedder · {TINY_MODEL}" in page.text("columns")
    assert "rows 7 in 2 shards" in page.text("overview")
    assert "image_embedding" not in pq.read_schema(tmp_path / "data" / "a.parquet").names


def test_the_runs_are_told_with_their_losses(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", {"a": 6, "b": 4})
    dataset = ImageTextPairDataset.from_webdataset(tmp_path / "data")
    dataset.metadata["keep"] = dataset.metadata["score"] > 0.25
    dataset.save_metadata(tmp_path / "saved").to_webdataset(tmp_path / "out", "keep")
    done, page = report(tmp_path / "saved")
    assert done.problems == []
    assert re.search(r"save_metadata \d{4}-\d\d-\d\d \d\d:\d\d 10 0 10 0 0 2 done", page.text("rows"))
    assert "balance" in page.text("rows")
    _, page = report(tmp_path / "out")
    assert re.search(r"to_webdataset \S+ \S+ 10 0 7 3 0 ", page.text("rows"))
    (tmp_path / "saved" / "a.parquet").unlink()
    done, page = report(tmp_path / "saved")
    assert "a.parquet is missing" in done.problems[0]
    assert "a.parquet is missing" in page.text("rows")


def test_an_unreadable_shard_is_said_in_the_page(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", {"a": 6, "b": 4})
    (tmp_path / "data" / "b.parquet").write_bytes(b"no Parquet")
    done, page = report(tmp_path / "data")
    assert list(done.unreadable) == ["b"]
    assert done.rows == 6
    assert "1 shard could not be read" in page.text("overview")


def test_a_tar_that_is_gone_costs_its_pictures_only(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", {"a": 6, "b": 4})
    dataset = ImageTextPairDataset.from_webdataset(tmp_path / "data")
    (tmp_path / "data" / "b.tar").unlink()
    done = write_report(dataset, tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert done.rows == 10
    assert "Pictures of 1 shard could not be read" in page.text("overview")
    assert "Their rows are missing" not in page.text("overview")
    assert len(page.pictures()) > 6
    assert list(done.unreadable) == ["b"]
    assert "b.tar" in done.unreadable["b"]
    assert done.unreadable["b"] in page.text("overview")


def test_a_copy_of_another_datasets_row_costs_nothing(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", {"a": 6})
    rows = pd.read_parquet(tmp_path / "data" / "a.parquet")
    rows = rows.assign(is_duplicate=rows.index == 2, duplicate_of=None, duplicate_of_shard=None).astype(
        {"duplicate_of": object, "duplicate_of_shard": object}
    )
    rows.loc[2, ["duplicate_of", "duplicate_of_shard"]] = ["000007", "of another dataset"]
    write_rows(tmp_path / "data" / "a.parquet", pa.Table.from_pandas(rows, preserve_index=False))
    done, page = report(tmp_path / "data")
    assert "of another dataset/000007" in page.text("duplicates")
    assert done.unreadable == {}


def test_a_report_of_shards_none_of_which_can_be_read(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", {"a": 3, "b": 4})
    dataset = ImageTextPairDataset.from_webdataset(tmp_path / "data")
    for name in ("a", "b"):
        path = tmp_path / "data" / f"{name}.parquet"
        data = path.read_bytes()
        path.write_bytes(data[:4] + bytes(len(data) - 4))
    done = write_report(dataset, tmp_path / "r.html", thresholds={"score": 0.5, "seed": 3})
    page = Page(tmp_path / "r.html")
    assert (done.rows, done.pictures, sorted(done.unreadable)) == (0, 0, ["a", "b"])
    assert "2 shards could not be read" in page.text("overview")
    assert "0 of 0 scored rows" in page.text("score-1")


def test_a_report_of_no_rows(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", {"a": 3})
    dataset = ImageTextPairDataset.from_webdataset(tmp_path / "data")
    dataset.metadata = dataset.metadata[dataset.metadata["score"] > 99]
    done = write_report(dataset, tmp_path / "r.html")
    assert (done.rows, done.pictures, done.unreadable) == (0, 0, {})


def test_integers_that_no_float_holds_are_counted(tmp_path: Path) -> None:
    """A float64 holds all integers up to 2**53; the counts are by the rounded ones."""
    big = [2**53 + 1, 2**53 + 3, 2**63 - 1, 5]
    make_dataset(tmp_path / "data", {"a": 4})
    path = tmp_path / "data" / "a.parquet"
    write_rows(path, pq.read_table(path).append_column("big", pa.array(big)))
    done, page = report(tmp_path / "data", thresholds={"big": [10, 2.0**53 + 4, 2.0**63]})
    assert done.unreadable == {}
    text = page.text("score-1")
    said = re.findall(r"(\d) of 4 scored rows \([\d.]+%\) are at or above", text)
    assert said == ["3", "2", "1"]
    order = ["000002", "000001", "000000", "000003"]
    highest = text.partition("Highest")[2].partition("Around")[0]
    assert re.findall(r"a/(\d{6})", highest) == order
    lowest = text.partition("Lowest")[2]
    assert re.findall(r"a/(\d{6})", lowest) == order[::-1]


@pytest.mark.parametrize("name", ["aesthetic_score", "nsfw_score"])
def test_a_text_that_is_named_as_a_score_has_no_threshold(tmp_path: Path, name: str) -> None:
    make_dataset(tmp_path / "data", {"a": 3})
    path = tmp_path / "data" / "a.parquet"
    write_rows(path, pq.read_table(path).append_column(name, pa.array(["high", "low", None])))
    done, page = report(tmp_path / "data", thresholds={"score": 0.1})
    assert done.rows == 3
    assert "2 of 3 scored rows" in page.text("score-1")
    assert "ni-card ni-veiled" not in {found.get("class") for _, found in page.tags}
    report(tmp_path / "data", thresholds={name: []})
    with pytest.raises(ArgumentError, match=name):
        report(tmp_path / "data", thresholds={name: 5})


@pytest.mark.parametrize(
    "name", ["a.parquet", "a.tar", "a.idx", "new.tar", "NEW.PARQUET", "x.json", "x.jsonl", "notes"]
)
def test_a_datasets_files_are_not_replaced(tmp_path: Path, name: str) -> None:
    make_dataset(tmp_path / "data", {"a": 2})
    (tmp_path / "data" / "notes").write_text("<!DOCTYPE html>\n<title>of somebody else</title>")
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    dataset = ImageTextPairDataset.from_webdataset(tmp_path / "data")
    with pytest.raises(ArgumentError, match=f"{name} .*give another path"):
        write_report(dataset, tmp_path / "data" / name)
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before


def test_a_report_replaces_a_report_and_an_empty_file_only(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", {"a": 2})
    dataset = ImageTextPairDataset.from_webdataset(tmp_path / "data")
    out = tmp_path / "report"
    out.touch()
    write_report(dataset, out, title="first")
    write_report(dataset, out, title="second")
    assert "second" in out.read_text()
    for folder in (tmp_path / "data", f"{tmp_path}/new/"):
        with pytest.raises(ArgumentError, match="is a folder: name a file"):
            write_report(dataset, folder)
    assert not (tmp_path / "new").exists()


# Unsafe pictures ----------------------------------------------------------------------------------------------------

UNSAFE = [0.1, 0.2, 0.49999, 0.6, 0.7, 0.8, None, 0.99]


def veils(page: Page, section: str) -> dict[str, bool]:
    """Return which rows are veiled of those that a section shows; all its cards of a row agree."""
    html = page.source.partition(f'<section id="{section}">')[2]
    html = html.partition("<section id=")[0]
    figures = re.findall(r'<figure class="(ni-card[^"]*)">.*?<summary>[^<]*/(\d{6})</summary>', html, re.DOTALL)
    assert html.count("<figure") == len(figures)
    found = {(row, "ni-veiled" in kind) for kind, row in figures}
    assert len(found) == len({row for row, _ in found})
    return dict(found)


def unsafe_dataset(folder: Path, others: int = 0) -> Path:
    make_dataset(folder, {"a": len(UNSAFE)})
    table = pq.read_table(folder / "a.parquet")
    for number in range(others):
        table = table.append_column(f"a{number:02d}", pa.array([float(number)] * len(table)))
    write_rows(folder / "a.parquet", table.append_column("nsfw_score", pa.array(UNSAFE)))
    return folder


@pytest.mark.parametrize("others", [0, 30])
@pytest.mark.parametrize("limits", [None, [0.98, 0.5]])
def test_unsafe_pictures_are_veiled_whatever_else_a_card_says(
    tmp_path: Path, others: int, limits: list[float] | None
) -> None:
    """From the lowest threshold on, by the score itself: 0.49999 is shown as 0.5."""
    folder = unsafe_dataset(tmp_path / "data", others)
    _, page = report(folder, thresholds=None if limits is None else {"nsfw_score": limits})
    true = {f"{row:06d}": score is not None and score >= 0.5 for row, score in enumerate(UNSAFE)}
    assert veils(page, "overview") == true
    seen = veils(page, "score-1")
    assert seen == {row: veiled for row, veiled in true.items() if row in seen}
    assert len(seen) >= 7
    assert "0.5</span>" in page.source  # the score stands on the cards of its galleries


def test_the_frames_score_veils(tmp_path: Path) -> None:
    folder = unsafe_dataset(tmp_path / "data")
    dataset = ImageTextPairDataset.from_webdataset(folder)
    dataset.metadata["nsfw_score"] = 1 - dataset.metadata["nsfw_score"]
    write_report(dataset, tmp_path / "r.html")
    true = {f"{row:06d}": score is not None and 1 - score >= 0.5 for row, score in enumerate(UNSAFE)}
    del true["000006"]  # the frame has no score, the file neither
    seen = veils(Page(tmp_path / "r.html"), "overview")
    assert seen.pop("000006") is False
    assert seen == true


@pytest.mark.parametrize("place", ["file", "sidecar", "frame"])
def test_unsafe_copies_are_veiled_wherever_their_score_is(tmp_path: Path, place: str) -> None:
    rows = 4
    scores = pa.array([0.9, 0.8, 0.1, 0.2])  # 1 is a copy of 0, 3 of 2
    make_dataset(tmp_path / "data", {"a": rows})
    path = tmp_path / "data" / "a.parquet"
    table = pq.read_table(path)
    for name, values in {
        "is_duplicate": [False, True, False, True],
        "duplicate_of": [None, "000000", None, "000002"],
        "duplicate_of_shard": [None, "a", None, "a"],
        "hidden": scores.to_pylist(),
    }.items():
        table = table.append_column(name, pa.array(values))
    write_rows(path, table.append_column("nsfw_score", scores) if place == "file" else table)
    sidecars = []
    if place == "sidecar":
        (tmp_path / "side").mkdir()
        write_rows(tmp_path / "side" / "a.parquet", pa.table({"key": table["key"], "nsfw_score": scores}))
        sidecars = [tmp_path / "side"]
    dataset = ImageTextPairDataset.from_webdataset(tmp_path / "data", sidecars=sidecars)
    if place == "frame":
        dataset.metadata["nsfw_score"] = dataset.metadata["hidden"] * 1.0
    write_report(dataset, tmp_path / "r.html")
    seen = veils(Page(tmp_path / "r.html"), "duplicates")
    assert seen == {"000000": True, "000001": True, "000002": False, "000003": False}


def test_more_rows_than_are_drawn_are_said_to_be_sampled(tmp_path: Path) -> None:
    rows = 700
    write_tar(tmp_path / "data" / "a.tar", [("000000", {"jpg": encoded(picture(0))})])
    keys = [f"{row:06d}" for row in range(rows)]
    write_rows(tmp_path / "data" / "a.parquet", {"key": keys, "score": [row / 100 for row in range(rows)]})
    _, page = report(tmp_path / "data")
    assert "are chosen from 512 rows, drawn by a hash" in page.text("about")
    assert "they are of all 700 rows" in page.text("about")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"pictures": 0}, ArgumentError),
        ({"groups": 41}, ArgumentError),
        ({"quantiles": [1.0]}, ArgumentError),
        ({"thresholds": {"nowhere": 1}}, MissingColumnError),
        ({"thresholds": {"caption": 1}}, ArgumentError),
        ({"thresholds": {"score": [float("nan")]}}, ArgumentError),
    ],
)
def test_bad_arguments_are_said(tmp_path: Path, options: dict[str, Any], error: type[Exception]) -> None:
    make_dataset(tmp_path / "data", {"a": 2})
    with pytest.raises(error, match=next(iter(options))):
        report(tmp_path / "data", **options)
    assert not (tmp_path / "report.html").exists()


# Pictures ---------------------------------------------------------------------------------------------------------


def test_a_thumbnail_is_upright_small_and_bare() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "secret place"
    stored = Image.new("RGB", (600, 300), "blue")
    stored.paste("red", (0, 0, 300, 300))  # left when stored, on top when upright
    made = thumbnail(encoded(stored, "JPEG", exif=exif, quality=95))
    image = Image.open(io.BytesIO(made))
    assert image.size == (PIXELS // 2, PIXELS)
    assert image.getpixel((64, 20))[0] > 200  # type: ignore[index]
    assert image.getpixel((64, 235))[2] > 200  # type: ignore[index]
    assert b"secret" not in made
    assert not image.getexif()


def test_a_large_thumbnail_is_compressed_further() -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (400, 400, 3), dtype=np.uint8))
    assert len(thumbnail(encoded(noise, "PNG"))) <= BYTES


def test_a_picture_that_crashes_its_decoder_costs_itself_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thumbnails_module, "thumbnails", _crash_on_bomb)
    made = safe_thumbnails([encoded(picture(0)), b"crash", None, encoded(picture(1))])
    assert [one is not None for one in made.jpegs] == [True, False, False, True]
    assert str(made.errors[1]).startswith("crashed:")
    assert made.errors[2] is None


def _crash_on_bomb(blobs: Any) -> Any:
    import os

    from nemo_image.datasets.show.thumbnails import Thumbnails, thumbnail

    if b"crash" in blobs:
        os.abort()
    return Thumbnails([None if one is None else thumbnail(one) for one in blobs], [None] * len(blobs))


def test_captions_of_all_kinds_are_bounded() -> None:
    from nemo_image.datasets.show.cards import clean

    assert all(len(clean(one, 300)) <= 300 for one in HOSTILE)
    assert clean("a\x00b\u202ec\ud800\n d", 20) == "a bc d"


def test_on_a_cluster(tmp_path: Path, cluster: Any) -> None:
    """What names a row comes back from other processes as it went there."""
    folder = write_hostile(tmp_path / "data")
    with without_client():
        here, page = report(folder)
    with cluster.as_current():
        there, other = report(folder)
    assert there.pictures == here.pictures > 0
    assert other.sections.keys() == page.sections.keys()
