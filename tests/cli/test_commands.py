"""The commands as a user runs them: exit status, JSON, one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from nemo_image.cli import main
from nemo_image.datasets import ImageTextPairDataset
from tests.makers import TINY_MODEL, encoded, make_dataset, picture, sample, write_rows, write_tar


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


def curate(source: Path, out: Path, *more: object) -> Result:
    return run("curate", source, out, "--model", TINY_MODEL, "--no-autocast", "--json", *more)


def result_of(done: Result) -> dict[str, Any]:
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("command", [[], ["curate"], ["index"], ["inspect"]])
def test_help_has_an_example(command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.exit_code == 0
    assert not command or f"nemo-image {command[0]}" in done.output


def test_curate_embeds_filters_and_exports(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", {"a": 9, "b": 8})
    before = {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    done = curate(
        tmp_path / "in", tmp_path / "out", "--keep", "score >= 0.5", "--keep", "score < 1.2", "--samples-per-shard", 3
    )
    found = result_of(done)
    assert (found["rows_in"], found["rows_out"], found["rows_filtered"], found["shards_out"]) == (17, 7, 10, 3)
    assert found["results"]["image_embedding"] == 17
    frame = ImageTextPairDataset.from_webdataset(str(tmp_path / "out")).metadata.compute()
    assert frame["seed"].tolist() == list(range(5, 12))
    assert frame["image_embedding"].notna().all()
    assert "nemo_image_kept" not in frame
    enriched = ImageTextPairDataset.from_webdataset(str(tmp_path / "out" / "_nemo_image" / "enriched"))
    assert enriched.metadata.compute()["image_embedding"].notna().sum() == 17
    assert {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before


def test_curate_again_computes_nothing(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", {"a": 4})
    first = result_of(curate(tmp_path / "in", tmp_path / "out"))
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    second = result_of(curate(tmp_path / "in", tmp_path / "out"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")} == stamps
    assert second["rows_out"] == first["rows_out"] == 4


def test_curate_on_a_cluster_of_its_own(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", {"a": 3, "b": 3})
    found = result_of(curate(tmp_path / "in", tmp_path / "out", "--workers", 2, "--keep", "seed > 1"))
    assert found["rows_out"] == 4


def test_curate_scores_with_the_published_heads(tmp_path: Path, shared: Path) -> None:
    make_dataset(tmp_path / "in", {"a": 3})
    model = "vit_base_patch32_clip_224.openai"
    done = run(
        "curate", tmp_path / "in", tmp_path / "out", "--model", model, "--no-autocast",
        "--keep", "aesthetic_score > 5 and nsfw_score < 0.5",
        "--aesthetic-weights", shared / "weights" / "sac+logos+ava1-l14-linearMSE.pth",
    )  # fmt: skip
    # The heads want ViT-L/14's embeddings, and say so before anything is computed.
    assert done.exit_code == 1
    assert "768" in done.output or "ViT-L/14" in done.output
    assert not list(tmp_path.rglob("*.tar.parquet"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--keep", "nosuch > 1"], "nosuch"),
        (["--keep", "score >"], "not an expression"),
        (["--keep", "__import__('os') == 1"], "not allowed"),
        (["--keep", "score > 100"], "nothing to export"),
        (["--no-nsfw", "--nsfw-weights", "x.pth"], "contradict"),
        (["--id-col", "nosuch"], "nosuch"),
        (["--sidecar", "/nowhere"], "/nowhere"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    make_dataset(tmp_path / "in", {"a": 2})
    done = curate(tmp_path / "in", tmp_path / "out", *arguments)
    assert done.exit_code == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in done.output


def test_a_failed_shard_is_exit_status_one(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", {"a": 2, "b": 2})
    (tmp_path / "in" / "b.tar").write_bytes(b"no tar")
    done = curate(tmp_path / "in", tmp_path / "out")
    assert done.exit_code == 1
    assert "b.tar" in done.stderr


def test_index_writes_beside_each_tar(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 2, "b": 3})
    write_tar(tmp_path / "c.tar", [sample(9, "with space")])
    write_rows(tmp_path / "c.parquet", {"key": ["with space"]})
    done = run("index", tmp_path, "--json")
    found = result_of(done)
    assert (found["tars"], found["samples"], found["written"]) == (3, 6, 2)
    assert "c.tar" in next(iter(found["skipped"]))
    assert sorted(path.name for path in tmp_path.glob("*.idx")) == ["a.idx", "b.idx"]
    (tmp_path / "a.tar").write_bytes(b"garbage" * 200)
    assert run("index", tmp_path).exit_code == 1


def test_inspect_counts(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 4})
    write_tar(tmp_path / "b.tar", [("x", {"png": encoded(picture(1), "PNG")}), ("y", {"txt": b"only text"})])
    write_rows(
        tmp_path / "b.parquet", {"key": ["x", "z"], "caption": ["c", None], "seed": [1, 2], "score": [0.5, None]}
    )
    found = result_of(run("inspect", tmp_path, "--json"))
    assert (found["shards"], found["rows"], found["samples"]) == (2, 6, 6)
    assert (found["rows_without_sample"], found["samples_without_row"], found["samples_without_image"]) == (1, 1, 1)
    assert found["members"] == {"jpg": 4, "txt": 5, "json": 4, "png": 1}
    histogram = found["histograms"]["score"]
    assert sum(histogram["counts"]) == 5
    assert histogram["nulls"] == 1
    assert histogram["edges"][0] == 0
    assert histogram["edges"][-1] == 0.5
    table = run("inspect", tmp_path)
    assert table.exit_code == 0
    assert "score" in table.stdout


def test_inspect_shows_failures_of_a_run(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [sample(0, "000"), ("001", {"jpg": b""})])
    write_rows(tmp_path / "a.parquet", {"key": ["000", "001"]})
    from nemo_image.embedders import TimmImageEmbedder

    TimmImageEmbedder(TINY_MODEL, autocast=False)(ImageTextPairDataset.from_webdataset(str(tmp_path))).save_metadata()
    found = result_of(run("inspect", tmp_path, "--json"))
    assert found["image_errors"] == {"empty": 1}
    assert found["made_by"]["image_embedding"] == TINY_MODEL
    assert pq.read_metadata(tmp_path / "a.parquet").num_rows == 2


def test_inspect_of_an_unreadable_tar(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "b.tar").write_bytes(b"no tar")
    done = run("inspect", tmp_path, "--json")
    assert done.exit_code == 1
    assert list(json.loads(done.stdout)["unreadable"]) == ["b"]


def test_as_a_module() -> None:
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-m", "nemo_image", "--version"], capture_output=True, text=True, check=True)
    assert "0.1.0" in done.stdout


def test_curate_in_parts_makes_what_one_run_makes(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", {"a": 3, "b": 2, "c": 4})
    options = ("--keep", "seed > 1", "--samples-per-shard", 3)
    whole = result_of(curate(tmp_path / "in", tmp_path / "whole", *options))
    first = result_of(curate(tmp_path / "in", tmp_path / "out", *options, "--part", "2/2"))
    assert (first["shards_in"], first["shards_left"], first["shards_left_first"]) == (1, 2, "a, c")
    assert not list((tmp_path / "out").glob("*.tar"))
    last = result_of(curate(tmp_path / "in", tmp_path / "out", *options, "--part", "1/2"))
    assert (last["rows_out"], last["shards_out"]) == (whole["rows_out"], whole["shards_out"]) == (7, 3)
    for folder in ("", "_nemo_image/enriched"):
        names = sorted(path.name for path in (tmp_path / "whole" / folder).iterdir() if path.suffix)
        assert names == sorted(path.name for path in (tmp_path / "out" / folder).iterdir() if path.suffix)
        for name in names:
            assert (tmp_path / "whole" / folder / name).read_bytes() == (tmp_path / "out" / folder / name).read_bytes()


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_no_such_part(tmp_path: Path, part: str) -> None:
    done = curate(tmp_path, tmp_path / "out", "--part", part)
    assert done.exit_code == 2
    assert "no share of the shards" in done.output


def test_curate_tries_again_what_failed(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", {"a": 3, "b": 2})
    tar = (tmp_path / "in/b.tar").read_bytes()
    (tmp_path / "in/b.tar").write_bytes(tar[:1000])
    failed = curate(tmp_path / "in", tmp_path / "out")
    assert failed.exit_code == 1
    assert "1 of 2 shards failed" in failed.output
    (tmp_path / "in/b.tar").write_bytes(tar)
    found = result_of(curate(tmp_path / "in", tmp_path / "out", "--retry-failed"))
    assert (found["rows_in"], found["rows_out"]) == (5, 5)


def test_json_of_what_fails(tmp_path: Path) -> None:
    missing = run("inspect", tmp_path / "nothing", "--json")
    assert (missing.exit_code, json.loads(missing.stdout)["type"]) == (1, "DatasetError")
    assert "nothing: no such folder" in json.loads(missing.stdout)["error"]
    assert "no such folder" in missing.stderr
    data = make_dataset(tmp_path / "in", {"a": 3, "b": 2})
    (Path(data) / "b.tar").write_bytes(b"no tar at all")
    failed = run("embed", data, "--model", TINY_MODEL, "--no-autocast", "--json")
    said = json.loads(failed.stdout)
    assert (failed.exit_code, said["type"], list(said["failures"])) == (1, "RunError", ["b"])
