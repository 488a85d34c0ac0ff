"""``nemo-image run`` as a user runs it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from nemo_image.cli import main
from nemo_image.datasets import ImageTextPairDataset
from tests.makers import make_dataset, tar_members

FLOW = """
input_path: ???
output_path: ???
images_per_tar: 4
name: captions
stages:
  - _target_: nemo_curator.stages.file_partitioning.FilePartitioningStage
    file_paths: ${input_path}
    files_per_partition: 1
  - _target_: nemo_curator.stages.image.io.image_reader.ImageReaderStage
    task_batch_size: 3
    num_gpus_per_worker: 0
    verbose: false
  - _target_: nemo_image.stages.ImageSizeFilterStage
    min_width: 10
  - _target_: nemo_curator.stages.image.io.image_writer.ImageWriterStage
    output_dir: ${output_path}
    images_per_tar: ${images_per_tar}
"""

OWN = '''
"""A filter of the user's own."""
from my_words import ODD  # beside it: not allowed, not found
'''

FILTER = '''
"""A filter of the user's own."""
from nemo_image.stages import ImageFilterStage


def is_odd(seed):
    return seed % 2 == 1


class OddSeeds(ImageFilterStage):
    def keep(self, image):
        return is_odd(image.metadata["seed"])
'''


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small dataset in the current folder, with a file that describes a pipeline."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flow.yaml").write_text(FLOW)
    yield make_dataset(tmp_path / "pairs", {"00000": 5, "00001": 4})
    for name in ("my_filters", "my_package", "my_package.rules"):
        sys.modules.pop(name, None)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["run", *map(str, arguments)])


def places(pairs: Path) -> list[str]:
    """Return overrides by whole paths: a cluster's workers may have another current folder."""
    return [f"input_path={pairs}", f"output_path={pairs.parent / 'out'}"]


def keys_of(folder: Path) -> list[str]:
    return sorted(
        name.partition(".")[0] for tar in folder.glob("*.tar") for name in tar_members(tar) if name.endswith("jpg")
    )


def test_runs_a_file_and_says_what_it_did(pairs: Path, cluster: Any) -> None:
    with cluster.as_current():
        result = run("flow.yaml", *places(pairs), "images_per_tar=2", "--json")

    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["pipeline"] == "captions"
    assert said["groups"]["done"] == 2
    assert "ImageReaderStage: task_batch_size is batch_size" in said["notes"]
    assert [one["items_out"] for one in said["stages"] if one["name"] == "image_size_filter"] == [9]
    assert keys_of(Path("out")) == [f"{number:06d}" for number in range(9)]
    saved = ImageTextPairDataset.from_webdataset("out")
    assert len(saved) == 9
    assert sorted(len(pq.read_table(path)) for path in Path("out").glob("*.parquet")) == [1, 2, 2, 2, 2]


def test_tells_people(pairs: Path, cluster: Any) -> None:
    with cluster.as_current():
        result = run("flow.yaml", *places(pairs))
    assert result.exit_code == 0, result.output
    assert "captions: 2 groups done" in result.stdout
    assert "image_size_filter" in result.stdout


def test_describes_without_running_or_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("flow.yaml").write_text(FLOW)
    arguments = ("flow.yaml", "input_path=/no/such/place", "output_path=out", "stages.2.min_width=77", "--describe")

    text = run(*arguments)
    said = json.loads(run(*arguments, "--json").stdout)

    assert text.exit_code == 0, text.output
    assert "Pipeline: captions" in text.stdout
    assert "file_paths: '/no/such/place'" in text.stdout
    assert "min_width: 77" in text.stdout
    assert said["stages"][2]["arguments"] == {"min_width": 77}
    assert said["stages"][2]["inputs"] == ["width", "height"]
    assert said["stages"][0]["resources"]["gpus"] == 0
    assert "image_id" in said["stages"][1]["outputs"]
    assert said["name"] == "captions"
    assert sorted(os.listdir()) == ["flow.yaml"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.yaml"], "nothing.yaml: No such file or directory"),
        (["flow.yaml"], "flow.yaml leaves values to you: give input_path=… output_path=…"),
        (["flow.yaml", "input_path=/nothing", "output_path=out", "--workers", 1], "/nothing"),
        (["flow.yaml", "input_pat=pairs"], "did you mean 'input_path'?"),
        (["flow.yaml", "pairs"], "the override 'pairs': it is not key=value"),
        (["flow.yaml", "input_path=a", "output_path=b", "stages.2.min_with=3"], "did you mean 'min_width'?"),
        (["flow.yaml", "input_path=a", "output_path=b", "stages.2._target_=os.system"], "--allow os"),
        (["flow.yaml", "input_path=a", "output_path=b", "--allow", ""], "is not the name of a package"),
        (["flow.yaml", "input_path=a", "output_path=b", "--allow", "my_filters"], "there is no my_filters.py in"),
    ],
)
def test_errors_are_one_line(pairs: Path, arguments: list[Any], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert said in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert not (pairs.parent / "out").exists()


def test_stages_that_do_not_fit_are_found_without_running(pairs: Path) -> None:
    stage = "stages.2={_target_: nemo_image.stages.ImageNSFWFilterStage}"
    result = run("flow.yaml", *places(pairs), stage, "--describe")
    assert result.exit_code == 1
    assert "needs 'embedding' of each image" in result.stderr


def test_a_failed_group_makes_the_exit_status_1(pairs: Path, cluster: Any) -> None:
    (pairs / "00001.tar").write_bytes(b"no tar at all")
    with cluster.as_current():
        result = run("flow.yaml", *places(pairs))
    assert result.exit_code == 1
    assert "1 of 2 groups failed" in result.stderr
    assert "00001.tar" in result.stderr
    assert keys_of(Path("out")) == [f"{number:06d}" for number in range(5)]


def test_a_rerun_takes_over_what_the_checkpoint_knows(pairs: Path, cluster: Any) -> None:
    arguments = ("flow.yaml", *places(pairs), "--checkpoint-path", str(pairs.parent / "notes"), "--json")
    with cluster.as_current():
        assert json.loads(run(*arguments).stdout)["groups"] == {"done": 2, "skipped": 0, "failed": 0}
        assert json.loads(run(*arguments).stdout)["groups"] == {"done": 0, "skipped": 2, "failed": 0}


# Stages of the user's own --------------------------------------------------------------------------------------------

ODD = ["000001", "000003", "000005", "000007"]


def replace_stage(target: str) -> str:
    return f"stages.2={{_target_: {target}}}"


@pytest.mark.parametrize("place", ["current folder", "beside the file"])
def test_own_stages_reach_workers_that_do_not_have_their_module(pairs: Path, place: str, cluster: Any) -> None:
    folder = pairs.parent if place == "current folder" else pairs.parent / "flows"
    folder.mkdir(exist_ok=True)
    (folder / "flow.yaml").write_text(FLOW)
    (folder / "my_filters.py").write_text(FILTER)
    flow = os.path.relpath(folder / "flow.yaml")
    with cluster.as_current():
        result = run(flow, *places(pairs), replace_stage("my_filters.OddSeeds"), "--allow", "my_filters")
    assert result.exit_code == 0, result.output
    assert keys_of(Path("out")) == ODD


def test_a_package_of_the_users_own(pairs: Path, cluster: Any) -> None:
    package = pairs.parent / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "rules.py").write_text(FILTER)
    with cluster.as_current():
        stage = replace_stage("my_package.rules.OddSeeds")
        result = run("flow.yaml", *places(pairs), stage, "--allow", "my_package.rules")
    assert result.exit_code == 0, result.output
    assert keys_of(Path("out")) == ODD


def test_nothing_is_imported_that_is_not_allowed(pairs: Path) -> None:
    Path("my_filters.py").write_text(FILTER + "\nopen('imported', 'w').close()\n")
    arguments = ("flow.yaml", "input_path=pairs", "output_path=out", replace_stage("my_filters.OddSeeds"), "--describe")
    result = run(*arguments)
    assert "--allow my_filters" in result.stderr
    assert not Path("imported").exists()
    assert run(*arguments, "--allow", "my_filters").exit_code == 0
    assert Path("imported").exists()


def test_an_installed_module_goes_before_one_in_the_folder(pairs: Path) -> None:
    Path("colorsys.py").write_text("open('imported', 'w').close()\n")
    result = run("flow.yaml", "input_path=a", "output_path=b", replace_stage("colorsys.Filter"), "--allow", "colorsys")
    assert "there is no 'Filter' in colorsys" in result.stderr
    assert not Path("imported").exists()


def test_only_the_allowed_module_is_found_in_the_folder(pairs: Path) -> None:
    Path("my_words.py").write_text("ODD = 1\n")
    Path("my_filters.py").write_text(OWN)
    result = run("flow.yaml", "input_path=a", "output_path=b", "--allow", "my_filters")
    assert result.exit_code == 1
    assert "my_filters.py cannot be imported: ModuleNotFoundError: No module named 'my_words'" in result.stderr
    assert "my_filters" not in sys.modules


# Workflows -----------------------------------------------------------------------------------------------------------

WORKFLOW = """
input_path: ???
workflow:
  - _target_: nemo_curator.stages.deduplication.semantic.SemanticDeduplicationWorkflow
    input_path: ${input_path}
    output_path: found
    n_clusters: 2
    eps: 0.001
    ranking_strategy:
      _target_: nemo_curator.stages.deduplication.semantic.RankingStrategy
      metadata_cols: [id]
      ascending: true
    pairwise_compute_dtype: float16
"""


@pytest.fixture
def embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight rows, of which the last two are the first two again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "find.yaml").write_text(WORKFLOW)
    vectors = np.random.default_rng(0).standard_normal((6, 16)).astype(np.float32)
    rows = {"id": [f"{number}" for number in range(8)], "embeddings": [*vectors, *vectors[:2]]}
    (tmp_path / "embedded").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "embedded" / "00000.parquet")
    return tmp_path / "embedded"


@pytest.mark.in_process("watches or changes this process")
def test_runs_a_workflow(embeddings: Path) -> None:
    described = run("find.yaml", f"input_path={embeddings}", "--describe")
    assert described.exit_code == 0, described.output
    assert described.stdout.startswith("Workflow: SemanticDeduplicationWorkflow\n  input_path: ")
    assert not Path("found").exists()

    result = run("find.yaml", f"input_path={embeddings}", "--json")

    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["rows"], said["num_duplicates"]) == (8, 2)
    assert sorted(pq.read_table(said["duplicates_path"])["id"].to_pylist()) == ["6", "7"]
    assert any("pairwise_compute_dtype is left out" in note for note in said["notes"])


@pytest.mark.in_process("watches or changes this process")
def test_a_workflow_without_a_threshold_tells_the_curve(embeddings: Path) -> None:
    arguments = ("find.yaml", f"input_path={embeddings}", "workflow.0.eps=null")
    curve = json.loads(run(*arguments, "--json").stdout)["curve"]
    assert {(one["kept"], one["total"]) for one in curve if one["eps"] <= 0.01} == {(6, 8)}
    assert "no threshold given" in run(*arguments).stdout


def test_errors_of_a_workflow_are_one_line(embeddings: Path) -> None:
    result = run("find.yaml", f"input_path={embeddings}", "workflow.0.n_clusters=9")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: n_clusters=9 is more than the 8 rows")
