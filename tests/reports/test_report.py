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
        self.feed(path.read_text())

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
    assert "b.tar" in page.text("overview")
    assert len(page.pictures()) > 6


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
