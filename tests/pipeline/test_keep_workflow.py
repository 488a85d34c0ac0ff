"""The workflow that chooses rows by quantiles, in Python and in YAML."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from nemo_image.cli import main
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.errors import ArgumentError, DatasetError
from nemo_image.pipeline import KeepWorkflow
from tests.makers import make_dataset


def seeds(folder: Path) -> list[int]:
    found: list[int] = ImageTextPairDataset.from_webdataset(folder).metadata["seed"].compute().tolist()
    return found


def test_rows_of_a_quantile_are_written(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", {"a": 6, "b": 4})
    keep = ["score in top 40%", "caption_words == 3"]
    found = KeepWorkflow(tmp_path / "in", tmp_path / "out", keep, samples_per_shard=3).run()
    assert seeds(tmp_path / "out") == [6, 7, 8, 9]
    assert (found.rows, found.rows_out) == (10, 4)
    assert found.thresholds == {"score in top 40%": 0.6}
    assert Path(found.ledger).exists()
    again = KeepWorkflow(tmp_path / "in", tmp_path / "out", keep, samples_per_shard=3).run()
    assert again.rows_out == 4
    with pytest.raises(DatasetError):
        KeepWorkflow(tmp_path / "in", tmp_path / "out", "score in top 50%").run()


def test_yaml(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", {"a": 5})
    config = tmp_path / "keep.yaml"
    config.write_text(
        "input_path: ???\nworkflow:\n  - _target_: nemo_image.pipeline.KeepWorkflow\n    input_path: ${input_path}\n"
        f"    output_path: {tmp_path / 'out'}\n    keep: score in bottom 2\n"
    )
    done = CliRunner().invoke(main, ["run", str(config), f"input_path={tmp_path / 'in'}", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows_out"] == 2
    assert seeds(tmp_path / "out") == [0, 1]


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no expression"):
        KeepWorkflow("in", "out", [])
    with pytest.raises(ArgumentError, match="above 0%"):
        KeepWorkflow("in", "out", "score in top 0%")
    with pytest.raises(ArgumentError, match="checkpoint_path"):
        KeepWorkflow("in", "out", "score > 1").run(checkpoint_path=tmp_path)
