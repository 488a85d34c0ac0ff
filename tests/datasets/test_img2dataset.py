"""img2dataset's own output: a success has a result or an honest reason, the rest is missing, and nothing is lost.

The committed sample is always read; where img2dataset is installed (on the PATH, or named by the environment variable
``NEMO_IMAGE_IMG2DATASET``) it is run as well.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from nemo_image.cli import main
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import TimmImageEmbedder
from nemo_image.errors import RunError
from tests.datasets import img2dataset_run
from tests.makers import TINY_MODEL, tar_members

# What cannot be decoded although img2dataset kept it, by the URL's last part.
HONEST = {"html.jpg": "unknown", "cut-silently.jpg": "truncated", "empty.jpg": "empty", "bomb.png": "bomb"}


def program() -> str:
    found = img2dataset_run.executable()
    if found is None:
        pytest.skip(f"img2dataset is neither on the PATH nor named by {img2dataset_run.EXECUTABLE}")
    return found


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What img2dataset writes here and now."""
    root = tmp_path_factory.mktemp("img2dataset")
    with img2dataset_run.web_server() as server:
        urls = img2dataset_run.write_urls(root / "urls", img2dataset_run.url_rows(server.url))
        for name, more in img2dataset_run.SETTINGS.items():
            img2dataset_run.run(program(), urls, root / name, [*more, img2dataset_run.TIMEOUT])
    return root


@pytest.fixture(params=["sample", pytest.param("live", marks=pytest.mark.slow)])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of img2dataset's folders."""
    if request.param == "sample":
        with zipfile.ZipFile(Path(__file__).parent / "img2dataset_sample" / img2dataset_run.SAMPLE) as packed:
            packed.extractall(tmp_path / "made")
        return tmp_path / "made"
    return Path(shutil.copytree(request.getfixturevalue("live"), tmp_path / "made"))


@pytest.fixture(params=sorted(img2dataset_run.SETTINGS))
def folder(request: pytest.FixtureRequest, made: Path) -> Path:
    return made / str(request.param)


def rows_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every shard's rows, as pyarrow reads them."""
    return {path.stem: pq.read_table(path).to_pylist() for path in sorted(folder.glob("*.parquet"))}


def statuses(folder: Path) -> Counter[str]:
    return Counter(row["status"] for rows in rows_of(folder).values() for row in rows)


def samples_of(folder: Path) -> dict[str, bytes]:
    """Every member of every tar, by its name; img2dataset's keys do not repeat across shards."""
    return {name: data for path in sorted(folder.glob("*.tar")) for name, data in tar_members(path).items()}


def honest(row: dict[str, Any]) -> str | None:
    """Why a row cannot have a result, by what its URL serves."""
    return "missing" if row["status"] != "success" else HONEST.get(row["url"].rpartition("/")[2])


def embedded(folder: Path) -> ImageTextPairDataset:
    return TimmImageEmbedder(TINY_MODEL, autocast=False)(ImageTextPairDataset.from_webdataset(str(folder)))


def test_the_sample_has_what_these_tests_are_about(folder: Path) -> None:
    # As img2dataset itself counts; and every kind of row is there.
    stats = [json.loads(path.read_text()) for path in sorted(folder.glob("*_stats.json"))]
    assert {"success": sum(one["successes"] for one in stats)}.items() <= statuses(folder).items()
    failed = sum(one["failed_to_download"] + one["failed_to_resize"] for one in stats)
    assert failed == sum(number for status, number in statuses(folder).items() if status != "success") > 0
    assert len(samples_of(folder)) == 3 * statuses(folder)["success"]
    if folder.name == "resized":
        assert set(statuses(folder)) == {"success", "failed_to_download", "failed_to_resize"}
    types = [{str(pq.read_schema(path).field(name).type) for path in folder.glob("*.parquet")} for name in
             ("source_id", "rating")]  # fmt: skip
    assert types == [{"int64", "double"}, {"null", "double"}]
    assert {(one["successes"] == one["count"], one["successes"] == 0) for one in stats} == {
        (True, False), (False, True), (False, False)
    } or folder.name == "as_is"  # fmt: skip


def test_rows_agree_with_their_status(folder: Path, tmp_path: Path) -> None:
    before = rows_of(folder)
    done = embedded(folder).save_metadata(tmp_path / "out")
    after = rows_of(tmp_path / "out")
    assert list(after) == list(before)
    for shard, rows in before.items():
        assert [row["key"] for row in after[shard]] == [row["key"] for row in rows]
        for was, now in zip(rows, after[shard], strict=True):
            assert {name: now[name] for name in was} == was
            reason = honest(was)
            assert (now["image_embedding"] is None) == (reason is not None), was
            assert (now["image_error"] or "").partition(":")[0] == (reason or "")
            if reason == "missing":
                assert now["image_error"] == f"missing: {shard}.tar has no sample with key {was['key']!r}"
    assert done.run_totals is not None
    reasons = Counter(filter(None, (honest(row) for rows in before.values() for row in rows)))
    counts = statuses(folder)
    assert done.run_totals["failures"] == reasons
    assert done.run_totals["rows_in"] == done.run_totals["rows_out"] == counts.total()
    assert done.run_totals["samples"] == counts["success"]
    assert done.run_totals["rows_without_sample"] == counts.total() - counts["success"] == reasons["missing"]
    assert (done.run_totals["samples_without_row"], done.run_totals["losses"]) == (0, {})
    assert done.run_totals["results"] == {"image_embedding": counts.total() - reasons.total()}


def test_each_shards_account(folder: Path, tmp_path: Path) -> None:
    done = embedded(folder).save_metadata(tmp_path / "out")
    assert done.run_totals is not None
    lines = [json.loads(line) for line in Path(done.run_totals["ledger"]).read_text().splitlines()]
    for line, (shard, rows) in zip(lines[:-1], rows_of(folder).items(), strict=True):
        failed = [row["key"] for row in rows if row["status"] != "success"]
        assert (line["shard"], line["status"], line["rows_in"], line["rows_out"]) == (
            shard, "done", len(rows), len(rows)
        )  # fmt: skip
        assert line["samples"] == len(rows) - len(failed)
        assert line["rows_without_sample"] == {"count": len(failed), "first": failed}
        assert line["failures"] == Counter(filter(None, map(honest, rows)))


def test_enriched_in_place_and_again(folder: Path) -> None:
    before, tars = rows_of(folder), samples_of(folder)
    embedded(folder).save_metadata()
    first = {path: path.read_bytes() for path in folder.glob("*.parquet")}
    for shard, rows in before.items():
        assert [
            {name: now[name] for name in was} for was, now in zip(rows, rows_of(folder)[shard], strict=True)
        ] == rows
    assert samples_of(folder) == tars
    # Failed downloads are no work left over.
    again = embedded(folder).save_metadata()
    assert again.run_totals is not None
    assert again.run_totals["shards"] == {"done": 0, "skipped": len(before), "failed": 0}
    assert {path: path.read_bytes() for path in folder.glob("*.parquet")} == first


def curated(folder: Path, out: Path, *more: str) -> dict[str, Any]:
    done = CliRunner().invoke(
        main, ["curate", str(folder), str(out), "--model", TINY_MODEL, "--no-autocast", "--json", *more]
    )
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_curate_keeps_every_success_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    counts = statuses(folder)
    failed = counts.total() - counts["success"]
    found = curated(folder, tmp_path / "out", "--keep-ids", "--samples-per-shard", "7")
    assert (found["rows_in"], found["samples"], found["rows_out"]) == (
        counts.total(), counts["success"], counts["success"]
    )  # fmt: skip
    assert (found["losses"], found["rows_filtered"]) == ({"without_sample": failed}, 0)
    assert found["image_errors"] == Counter(
        filter(None, (honest(r) for rows in rows_of(folder).values() for r in rows))
    )
    assert found["shards_out"] == -(-counts["success"] // 7)
    assert samples_of(tmp_path / "out") == samples_of(folder)
    kept = [row for rows in rows_of(tmp_path / "out").values() for row in rows]
    # In the order of the tars, which img2dataset's Parquet files have too.
    good = [row for rows in rows_of(folder).values() for row in rows if row["status"] == "success"]
    assert [row["key"] for row in kept] == [row["key"] for row in good]
    assert [{name: now[name] for name in was} for was, now in zip(good, kept, strict=True)] == good


def test_curate_by_status_with_new_ids(folder: Path, tmp_path: Path) -> None:
    found = curated(folder, tmp_path / "out", "--keep", "status == 'success'", "--old-id-col", "old")
    counts = statuses(folder)
    assert (found["rows_out"], found["losses"]) == (counts["success"], {})
    assert found["rows_filtered"] == counts.total() - counts["success"]
    before, after = samples_of(folder), samples_of(tmp_path / "out")
    for row in (row for rows in rows_of(tmp_path / "out").values() for row in rows):
        old, new = row["old"], row["key"]
        assert after.pop(f"{new}.jpg") == before[f"{old}.jpg"]
        assert after.pop(f"{new}.txt") == before[f"{old}.txt"]
        assert json.loads(after.pop(f"{new}.json")) == {**json.loads(before[f"{old}.json"]), "key": new, "old": old}
    assert after == {}


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[tuple[img2dataset_run.WebServer, Path, Path]]:
    """A folder that img2dataset left when it was killed in its second shard, its input, and the web."""
    with img2dataset_run.web_server() as server:
        names = [*range(15), "never", *range(15, 19)]
        rows = [
            {"url": f"{server.url}/{name}.jpg", "caption": "c", "source_id": place, "rating": None, "tags": None}
            for place, name in enumerate(names)
        ]
        urls = img2dataset_run.write_urls(tmp_path / "urls", [rows])
        img2dataset_run.run_and_kill(program(), server, urls, tmp_path / "made", ["--timeout=120"])
        yield server, urls, tmp_path / "made"


@pytest.mark.slow
def test_a_folder_left_by_a_kill_is_told_and_mended(killed: tuple[Any, Path, Path]) -> None:
    _, urls, folder = killed
    assert sorted(path.name for path in folder.iterdir()) == [
        "00000.parquet", "00000.tar", "00000_stats.json", "00001.parquet", "00001.tar", "_tmp"
    ]  # fmt: skip
    with pytest.raises(RunError, match=r"1 of 2 shards failed") as caught:
        embedded(folder).save_metadata()
    assert list(caught.value.failures) == ["00001"]
    assert "00001.parquet" in caught.value.failures["00001"]
    assert [row["image_error"] for row in rows_of_shard(folder, "00000")] == [None] * 10
    # img2dataset's own rerun makes the second shard; ours then computes only that.
    img2dataset_run.run(program(), urls, folder, ["--timeout=1"])
    done = embedded(folder).save_metadata()
    assert done.run_totals is not None
    assert done.run_totals["shards"] == {"done": 1, "skipped": 1, "failed": 0}
    assert done.run_totals["failures"] == {"missing": 1}
    [row] = [row for row in rows_of_shard(folder, "00001") if row["status"] != "success"]
    assert (row["key"], row["image_error"].partition(":")[0]) == ("000015", "missing")


def rows_of_shard(folder: Path, shard: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / f"{shard}.parquet").to_pylist()
    return rows
