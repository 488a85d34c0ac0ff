"""What docs/pipeline.md shows works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest

from nemo_image.cli.main import main
from nemo_image.errors import ArgumentError
from nemo_image.pipeline import Pipeline, build_pipeline, load_config
from nemo_image.stages import FilePartitioningStage, ImageObject, ImageReaderStage
from tests.makers import encoded, picture

TEXT = (Path(__file__).parents[2] / "docs" / "pipeline.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the Python blocks define, run as an imported module would be."""
    found: dict[str, Any] = {"__name__": "docs"}
    for block in blocks("python"):
        exec(compile(block, "docs/pipeline.md", "exec"), found)
    return found


def test_the_pipeline_fits_together(names: dict[str, Any]) -> None:
    pipeline = names["image_curation"]("/data/pairs", "/data/curated", "/data/models")
    assert len(pipeline.build()) == 6


def test_the_filter_of_ones_own_keeps_what_it_says(names: dict[str, Any]) -> None:
    dark = ImageObject(image_bytes=encoded(picture(1).point(lambda value: value // 20), "PNG"))
    bright = ImageObject(image_bytes=encoded(picture(1), "PNG"))
    stage = names["NotTooDark"]()
    assert (stage.keep(dark), stage.keep(bright)) == (False, True)
    Pipeline("p", stages=[FilePartitioningStage("/data"), ImageReaderStage(), stage]).build()


def test_the_removal_of_duplicates_is_made_of_stages_that_fit(
    names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    class Recorded(Pipeline):
        def run(self, *args: Any, **options: Any) -> Any:
            self.build()
            ran.append(self.name)

    monkeypatch.setitem(names, "Pipeline", Recorded)
    monkeypatch.setattr(names["SemanticDeduplicationWorkflow"], "run", lambda self: ran.append("workflow"))
    names["without_duplicates"]("/data/pairs", "/data/work", "/data/curated", "/data/models")
    assert ran == ["embed", "workflow", "remove"]


def test_the_configuration_builds() -> None:
    (text,) = blocks("yaml")
    with pytest.raises(ArgumentError, match="output_dir"):
        build_pipeline(load_config(text))
    pipeline = build_pipeline(load_config(text, ["stages.4.output_dir=/data/curated", "input=/data/other"]))
    assert [type(stage).__name__ for stage in pipeline.stages][-1] == "ImageWriterStage"
    assert pipeline.stages[0].file_paths == "/data/other"


def test_the_commands_are_understood() -> None:
    (text,) = blocks("bash")
    for line in text.splitlines():
        program, name, *arguments = shlex.split(line)
        assert program == "nemo-image"
        command = main.get_command(click.Context(main), name)
        assert command is not None
        command.make_context(name, arguments)


def test_every_stage_and_workflow_is_named() -> None:
    import nemo_image.pipeline
    import nemo_image.stages

    public = [*nemo_image.stages.__all__, *nemo_image.pipeline.__all__]
    missing = [name for name in public if name.endswith(("Stage", "Writer", "Workflow")) and name not in TEXT]
    assert set(missing) <= {"CompositeStage", "ProcessingStage"}
