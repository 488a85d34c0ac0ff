"""``nemo-image embed``, and models of both libraries in ``curate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from nemo_image.cli import main
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import OpenClipImageEmbedder, TimmImageEmbedder
from tests.embedders.open_clip_models import write_model
from tests.makers import TINY_MODEL, make_dataset, sample, write_rows, write_tar

pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return "open_clip:" + write_model(tmp_path_factory.mktemp("model"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


def result_of(done: Result) -> dict[str, Any]:
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_help_has_examples() -> None:
    done = run("embed", "--help")
    assert done.exit_code == 0
    assert "nemo-image embed /data/pairs --model open_clip:ViT-B-32 --pretrained laion2b_s34b_b79k" in done.output


def test_pictures_and_captions_in_place(tmp_path: Path, model: str) -> None:
    make_dataset(tmp_path, {"a": 3, "b": 2})
    found = result_of(run("embed", tmp_path, "--model", model, "--no-autocast", "--json"))
    assert found["shards"] == {"done": 2, "skipped": 0, "failed": 0}
    assert found["rows_in"] == 5
    assert found["results"]["clip_score"] == found["results"]["image_embedding"] == 5
    assert found["output"] == str(tmp_path)
    frame = ImageTextPairDataset.from_webdataset(tmp_path).metadata.compute()
    embedder = OpenClipImageEmbedder(model.removeprefix("open_clip:"), autocast=False)
    wanted = embedder(ImageTextPairDataset.from_webdataset(make_dataset(tmp_path / "again", {"a": 3, "b": 2})))
    assert frame["clip_score"].tolist() == wanted.metadata.compute()["clip_score"].tolist()
    again = result_of(run("embed", tmp_path, "--model", model, "--no-autocast", "--json"))
    assert again["shards"] == {"done": 0, "skipped": 2, "failed": 0}


def test_parts_into_a_folder_with_few_columns(tmp_path: Path, model: str) -> None:
    make_dataset(tmp_path / "in", {"a": 3, "b": 2})
    before = {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    for part in ("1/2", "2/2"):
        command = ["embed", tmp_path / "in", "--output", tmp_path / "out", "--columns", "clip_score,image_error"]
        found = result_of(run(*command, "--part", part, "--model", model, "--no-autocast", "--json"))
        assert found["shards"]["done"] == 1
    names = {path.name: set(pq.read_table(path).column_names) for path in (tmp_path / "out").glob("*.parquet")}
    wanted = {"shard", "key", "clip_score", "image_error"}
    assert names == {"a.parquet": wanted, "b.parquet": wanted}
    assert {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before


def test_captions_from_a_place_of_ones_own(tmp_path: Path, model: str) -> None:
    key, members = sample(0, "000", caption="in the text", alt="in the JSON")
    write_tar(tmp_path / "a.tar", [(key, members)])
    write_rows(tmp_path / "a.parquet", {"key": [key]})
    scores = []
    for captions in (["txt"], ["json:alt"], ["json:nothing", "txt"]):
        more = [word for one in captions for word in ("--captions", one)]
        result_of(run("embed", tmp_path, "--model", model, "--no-autocast", "--json", *more))
        scores.append(pq.read_table(tmp_path / "a.parquet")["clip_score"][0].as_py())
    assert scores[0] == scores[2] != scores[1]


def test_a_timm_model(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 3})
    done = run("embed", tmp_path, "--model", TINY_MODEL, "--no-autocast", "--embedding-dtype", "float16")
    assert done.exit_code == 0, done.output
    assert "image_embedding: 3" in done.stdout
    frame = ImageTextPairDataset.from_webdataset(tmp_path).metadata.compute()
    wanted = TimmImageEmbedder(TINY_MODEL, autocast=False, embedding_dtype="float16")(
        ImageTextPairDataset.from_webdataset(make_dataset(tmp_path / "again", {"a": 3}))
    )
    assert frame["image_embedding"].tolist() == wanted.metadata.compute()["image_embedding"].tolist()


def test_an_unreadable_tar_is_exit_status_1(tmp_path: Path, model: str) -> None:
    make_dataset(tmp_path, {"a": 3, "b": 2})
    (tmp_path / "b.tar").write_bytes(b"no tar")
    done = run("embed", tmp_path, "--model", model, "--no-autocast", "--json")
    assert done.exit_code == 1
    assert "b.tar" in done.stderr
    assert pq.read_table(tmp_path / "a.parquet")["clip_score"].null_count == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "open_clip:ViT-B-32", "--pretrained"], "--pretrained must say which weights of ViT-B-32: openai"),
        (["--model", TINY_MODEL, "--pretrained", "openai"], f"--model {TINY_MODEL}.TAG --pretrained"),
        (["--model", TINY_MODEL, "--captions", "txt"], "--captions is for open_clip models"),
        (["--model", TINY_MODEL, "--columns", "image_error"], "--columns goes with --output"),
        (["--model", "open_clip:ViT-B-3"], "did you mean ViT-B-32"),
    ],
)
def test_options_that_contradict(tmp_path: Path, options: list[str], said: str) -> None:
    make_dataset(tmp_path, {"a": 1})
    done = run("embed", tmp_path, *options)
    assert done.exit_code == 1
    assert said in done.stderr
    assert "Traceback" not in done.output


def test_curate_with_an_open_clip_model(tmp_path: Path, model: str) -> None:
    make_dataset(tmp_path / "in", {"a": 4, "b": 3})
    done = run(
        *("curate", tmp_path / "in", tmp_path / "out", "--model", model, "--no-autocast", "--json"),
        *("--keep", "clip_score > -1 and seed >= 2"),
    )
    assert result_of(done)["rows_out"] == 5
    frame = ImageTextPairDataset.from_webdataset(tmp_path / "out").metadata.compute()
    assert frame["seed"].tolist() == [2, 3, 4, 5, 6]
    assert frame["clip_score"].notna().all()
    assert frame["text_embedding"].notna().all()
