"""``nemo-image report`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nemo_image.cli import main
from tests.makers import make_dataset


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


def test_it_writes_a_file_and_says_so(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", {"a": 12, "b": 5})
    out = tmp_path / "r.html"
    done = run("report", tmp_path / "data", "-o", out, "--threshold", "score=0.55", "--threshold", "score=1", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["path"], said["rows"], said["unreadable"], said["problems"]) == (str(out), 17, {}, [])
    text = out.read_text()
    assert said["bytes"] == out.stat().st_size
    assert said["pictures"] == text.count("<img ")
    # Scores are 0, 0.1, …, 1.6.
    assert "11 of 17 scored rows (64.7%) are at or above 0.55; 6 are below." in text
    assert "7 of 17 scored rows (41.2%) are at or above 1; 10 are below." in text
    table = run("report", tmp_path / "data", "-o", out, "--pictures", 2, "--groups", 0, "--title", "Mine & <yours>")
    assert table.exit_code == 0
    assert "17" in table.output
    assert "Mine &amp; &lt;yours&gt;" in out.read_text()


def test_sidecars_are_shown_too(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    make_dataset(tmp_path / "data", {"a": 4})
    (tmp_path / "side").mkdir()
    keys = [f"{number:06d}" for number in range(4)]
    pq.write_table(pa.table({"key": keys, "clip_score": [0.1, 0.2, 0.3, 0.4]}), tmp_path / "side" / "a.parquet")
    out = tmp_path / "r.html"
    done = run("report", tmp_path / "data", "-o", out, "--sidecar", tmp_path / "side", "--threshold", "clip_score=0.25")
    assert done.exit_code == 0, done.output
    assert "2 of 4 scored rows (50.0%) are at or above 0.25" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--threshold", "score"], "is no threshold"),
        (["--threshold", "=5"], "is no threshold"),
        (["--threshold", "score=high"], "is no threshold"),
        (["--threshold", "nowhere=5"], "no column 'nowhere'"),
        (["--quantile", "1"], "--quantile"),
        (["--groups", "99"], "--groups"),
    ],
)
def test_what_it_cannot_do_is_said(arguments: list[str], said: str, tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", {"a": 2})
    done = run("report", tmp_path / "data", "-o", tmp_path / "r.html", *arguments)
    assert done.exit_code in (1, 2)
    assert said in done.output
    assert not (tmp_path / "r.html").exists()


def test_unreadable_shards_and_problems_fail_the_command(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", {"a": 2, "b": 2})
    (tmp_path / "data" / "b.parquet").write_bytes(b"no Parquet")
    done = run("report", tmp_path / "data", "-o", tmp_path / "r.html", "--json")
    assert done.exit_code == 1
    assert list(json.loads(done.stdout)["unreadable"]) == ["b"]
    assert (tmp_path / "r.html").exists()


def test_help_has_examples() -> None:
    done = run("report", "--help")
    assert done.exit_code == 0
    assert "nemo-image report /data/curated -o report.html" in done.output
    assert "aesthetic_score=5" in done.output
