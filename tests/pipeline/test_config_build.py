"""Building what a configuration describes: classes, arguments, settings; NeMo Curator's names."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_image.errors import ArgumentError, PipelineError
from nemo_image.pipeline import Pipeline
from nemo_image.pipeline.configuration.build import build_pipeline, read_plan
from nemo_image.pipeline.configuration.config import load_config
from nemo_image.pipeline.configuration.old_names import REPLACED, TABLE, Dropped
from nemo_image.pipeline.configuration.targets import find_class
from nemo_image.pipeline.workflows import RankingStrategy, SemanticDeduplicationWorkflow
from nemo_image.stages.base import Resources

OWN = '''
"""Stages of a user's own."""
from dataclasses import dataclass, field

from nemo_image.stages.base import CompositeStage, ProcessingStage
from nemo_image.stages.filters import CaptionFilterStage, ImageFilterStage


class Plain(ImageFilterStage):
    def keep(self, image):
        return True


@dataclass
class Tuned(ImageFilterStage):
    least: int
    words: list = field(default_factory=list)
    options: dict = field(default_factory=dict)
    name: str = "tuned"

    def __post_init__(self):
        if self.least < 0:
            raise ValueError(f"least must not be negative, not {self.least}")

    def keep(self, image):
        return True


class Anything(ImageFilterStage):
    def __init__(self, **options):
        self.options = options

    def keep(self, image):
        return True


class Outer:
    class Inner(Plain):
        pass


class NoStage:
    pass


def make():
    return Plain()


maker = make
'''

START = {"_target_": "nemo_image.stages.FilePartitioningStage", "file_paths": "/data/in"}
READ = {"_target_": "nemo_image.stages.ImageReaderStage"}
ALLOWED = ("nemo_image", "own_stages_here")


@pytest.fixture(autouse=True)
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own_stages_here.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("own_stages_here", None)


def built(*stages: dict[str, Any]) -> Pipeline:
    pipeline = build_pipeline({"stages": [START, READ, *stages]}, ALLOWED)
    assert isinstance(pipeline, Pipeline)
    return pipeline


def own(cls: str, /, **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"own_stages_here.{cls}", **arguments}


# What is built -------------------------------------------------------------------------------------------------------


def test_a_pipeline_is_built_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "flow.yaml"
    path.write_text(
        "input_path: ???\nname: mine\ndescription: What it does\nstages:\n"
        "  - _target_: nemo_image.stages.FilePartitioningStage\n    file_paths: ${input_path}\n"
        "  - _target_: nemo_image.stages.ImageReaderStage\n    batch_size: 7\n"
        "  - _target_: nemo_image.stages.CaptionFilterStage\n    min_words: 3\n"
    )

    pipeline = build_pipeline(load_config(path, ["input_path=/data/in", "stages.2.min_words=4"]))

    assert (pipeline.name, pipeline.description) == ("mine", "What it does")
    assert [type(one).__name__ for one in pipeline.stages] == [
        "FilePartitioningStage",
        "ImageReaderStage",
        "CaptionFilterStage",
    ]
    source, reader, captions = pipeline.stages
    assert (source.file_paths, reader.batch_size, captions.min_words) == ("/data/in", 7, 4)


def test_own_stages_are_built_where_they_are_allowed() -> None:
    plain, tuned, anything, inner = built(
        own("Plain"),
        own("Tuned", least=3, words=["a"], options={"b": [1, None]}),
        own("Anything", this=1, that=[2]),
        own("Outer.Inner"),
    ).stages[2:]
    assert type(plain).__module__ == "own_stages_here"
    assert (tuned.least, tuned.words, tuned.options) == (3, ["a"], {"b": [1, None]})
    assert anything.options == {"this": 1, "that": [2]}
    assert type(inner).__qualname__ == "Outer.Inner"


def test_settings_of_every_stage_need_no_argument_of_its_constructor() -> None:
    plain, tuned = built(
        own("Plain", name="first", batch_size=5, resources={"cpus": 2, "gpus": 0.5}),
        own("Tuned", least=1, name="second", resources={"_target_": "nemo_image.stages.Resources", "cpus": 3}),
    ).stages[2:]
    assert (plain.name, plain.batch_size, plain.resources) == ("first", 5, Resources(2, 0.5))
    assert (tuned.name, tuned.resources) == ("second", Resources(3))


def test_resources_take_the_place_of_those_of_a_built_in_stage() -> None:
    (reader,) = build_pipeline({"stages": [START, {**READ, "resources": {"gpus": 0}}]}).stages[1:]
    assert reader.resources == Resources()


def test_arguments_are_copies() -> None:
    words = ["a"]
    (tuned,) = built(own("Tuned", least=1, words=words)).stages[2:]
    tuned.words.append("b")
    assert words == ["a"]


def test_stages_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(PipelineError, match="needs 'embedding'"):
        built({"_target_": "nemo_image.stages.ImageNSFWFilterStage"})


def test_nothing_is_made_before_all_is_checked(tmp_path: Path) -> None:
    (tmp_path / "own_stages_here.py").write_text(
        OWN
        + f"\n\nclass Loud(Plain):\n    def __init__(self):\n        open({str(tmp_path / 'made')!r}, 'w').close()\n"
    )
    with pytest.raises(ArgumentError, match=r"stages.3"):
        built(own("Loud"), own("Nothing"))
    assert not (tmp_path / "made").exists()
    built(own("Loud"))
    assert (tmp_path / "made").exists()


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("own_stages_here.Plain", "stages.2: it must be a mapping with _target_"),
        ({"least": 1}, "stages.2: it must be a mapping with _target_"),
        (own("Plan"), "there is no 'Plan' in own_stages_here"),
        (own("NoStage"), "own_stages_here.NoStage is no stage"),
        (own("make"), "'make' is a function, not a class"),
        (own("Outer.Other"), "there is no 'Other' in Outer"),
        (own("Plain.keep"), "'keep' is a function, not a class"),
        (own("ProcessingStage"), "is what stages are made from"),
        ({"_target_": "own_stages_here"}, "lies in none of the allowed packages"),
        ({"_target_": "nemo_image.stages"}, "is a module, not a class"),
        ({"_target_": "nemo_image.stages.ImageFilterStage"}, "is what stages are made from"),
        (own("Tuned"), "stages.2 (own_stages_here.Tuned): the argument 'least' is missing"),
        (own("Tuned", lest=1), "there is no argument 'lest'; did you mean 'least'?"),
        (own("Tuned", least=1, options={1: 2}), "options: the key 1 is no text"),
        (own("Tuned", least=-1), "stages.2 (Tuned): least must not be negative, not -1"),
        (own("Tuned", least="x"), "stages.2 (Tuned): '<' not supported"),
        (own("Tuned", least=1, words=print), "words: <built-in function print> is no plain value"),
        (own("Tuned", least=1, words=[{1, 2}]), "words.0: {1, 2} is no plain value"),
        (own("Tuned", least=1, words="${a}"), "is not put in yet: read the configuration by load_config"),
        (own("Tuned", least="???"), "is not put in yet"),
        (own("Plain", resources=3), "resources must be a mapping of the arguments of nemo_image.stages.Resources"),
        (own("Plain", resources={"gpu": 1}), "resources: there is no 'gpu'; did you mean 'gpus'?"),
        (own("Plain", resources={"gpus": "1"}), "resources: '<=' not supported"),
        (own("Plain", resources={"gpus": 2}), "must lie in [0, 1]"),
        (own("Plain", resources={"_target_": "own_stages_here.NoStage"}), "lies in none of the allowed packages"),
        (own("Plain", resources={"_target_": "nemo_image.stages.ImageReaderStage"}), "not nemo_image.stages.Resources"),
        ({**READ, "bach_size": 1}, "there is no argument 'bach_size'; did you mean 'batch_size'?"),
        ({**READ, "batch_size": 0}, "stages.2 (ImageReaderStage): batch_size must be a whole number"),
    ],
)  # fmt: skip
def test_errors_name_the_stage_and_the_argument(entry: Any, said: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        built(entry)
    assert str(raised.value).startswith("stages.2")
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "neither 'stages' nor 'workflow'"),
        ({"stage": []}, "neither 'stages' nor 'workflow'; did you mean 'stages'?"),
        ({"stages": []}, "'stages' must be a list"),
        ({"stages": None}, "'stages' must be a list"),
        ({"stages": {"a": START}}, "'stages' must be a list"),
        ({"stages": "a"}, "'stages' must be a list"),
        ({"stages": [START], "workflow": [START]}, "both 'stages' and 'workflow'"),
        ({"workflow": [START, START]}, "must be a list of one, not of 2"),
        ({"workflow": [START]}, "workflow.0"),
        ({"stages": [START], "name": 3}, "'name' must be text"),
        ({"stages": [START], "defaults": ["_self_", "base"]}, "defaults: 'base': other files are not merged"),
        ({"stages": [START], "defaults": "base"}, "defaults: 'base'"),
        ({"stages": [START], "defaults": [{"db": "mysql"}]}, "defaults: 'db'"),
        ([START], "a configuration is a mapping, not list"),
    ],
)
def test_errors_of_the_whole(config: Any, said: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        build_pipeline(config)
    assert said in str(raised.value)


@pytest.mark.parametrize("allowed", [[""], ["."], ["nemo_image."], [".a"], ["a b"], ["*"], ["__main__"], [None], "os"])
def test_a_prefix_is_a_name(allowed: Any) -> None:
    with pytest.raises(ArgumentError, match="allowed"):
        build_pipeline({"stages": [START]}, allowed)


def test_a_module_that_fails_is_an_error_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "own_stages_here.py").write_text("import nothing_of_the_kind")
    with pytest.raises(ArgumentError, match=r"own_stages_here cannot be imported: ModuleNotFoundError: .*nothing_of"):
        built(own("Plain"))


def test_what_other_systems_need_is_ignored_and_told(caplog: pytest.LogCaptureFixture) -> None:
    config = {
        "defaults": ["_self_", {"override hydra/job_logging": "none"}],
        "hydra": {"run": {"dir": "."}},
        "documentation": "What it does",
        "ray_client": {"_target_": "nemo_curator.core.client.RayClient", "num_cpus": 4},
        "backend": "xenna",
        "stages": [START, READ],
    }
    with caplog.at_level(logging.WARNING, "nemo_image"):
        plan = read_plan(config)
    assert [note.partition(" ")[0] for note in plan.notes] == ["hydra", "ray_client", "backend"]
    assert "--scheduler-address" in plan.notes[1]
    assert len(caplog.records) == 1
    assert all(note in caplog.records[0].getMessage() for note in plan.notes)


# Workflows -----------------------------------------------------------------------------------------------------------

SEMANTIC = {"_target_": "nemo_image.pipeline.SemanticDeduplicationWorkflow", "input_path": "/in", "output_path": "/out"}
OLD_SEMANTIC = SEMANTIC | {
    "_target_": "nemo_curator.stages.deduplication.semantic.workflow.SemanticDeduplicationWorkflow"
}
OLD_RANKING = "nemo_curator.stages.deduplication.semantic.RankingStrategy"


def test_a_workflow_is_built() -> None:
    made = build_pipeline(
        load_config("workflow:\n- " + str(SEMANTIC | {"eps": 0.02, "which_to_keep": ["score", False]}) + "\n")
    )
    assert isinstance(made, SemanticDeduplicationWorkflow)
    assert (made.input_paths, made.output_path, made.eps) == (["/in"], "/out", 0.02)


def test_a_workflow_may_be_one_mapping() -> None:
    text = "workflow: " + str(SEMANTIC) + "\n"
    config = load_config(text, ["workflow.eps=0.02", "workflow.input_path=/other"])
    assert isinstance(build_pipeline(config), SemanticDeduplicationWorkflow)
    assert read_plan(config).entries[0].arguments == {"input_path": "/other", "output_path": "/out", "eps": 0.02}
    with pytest.raises(ArgumentError, match=r"^workflow \(.*there is no argument 'epz'; did you mean 'eps'"):
        build_pipeline(load_config(text, ["workflow.epz=0.02"]))
    with pytest.raises(ArgumentError, match="there is no key '0' in workflow"):
        load_config(text, ["workflow.0.eps=0.02"])


def test_a_workflow_of_nemo_curator_is_built() -> None:
    ranking = {"_target_": OLD_RANKING, "metadata_cols": ["cosine_dist_to_cent"], "ascending": True, "random_seed": 1}
    plan = read_plan(
        {"workflow": [OLD_SEMANTIC | {"eps": 0.01, "ranking_strategy": ranking, "pairwise_compute_dtype": "float16"}]}
    )
    assert isinstance(plan.build(), SemanticDeduplicationWorkflow)
    assert plan.entries[0].arguments["ranking_strategy"] == RankingStrategy(["cosine_dist_to_cent"], True)
    assert len(plan.notes) == 4


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (SEMANTIC | {"ep": 1}, "there is no argument 'ep'; did you mean 'eps'? (it takes input_path, output_path,"),
        (SEMANTIC | {"eps": 2}, "workflow.0 (SemanticDeduplicationWorkflow): eps must lie in [0, 1]"),
        (SEMANTIC | {"resources": {"gpus": 1}}, "resources"),
        (SEMANTIC | {"name": "a"}, "there is no argument 'name'"),
        (SEMANTIC | {"ranking_strategy": "easy"}, "ranking_strategy must be a mapping of the arguments of"),
        (SEMANTIC | {"ranking_strategy": {"_target_": "nemo_image.stages.Resources"}}, "RankingStrategy"),
        (SEMANTIC | {"ranking_strategy": {"columns": ["a"]}}, "ranking_strategy: there is no 'columns'"),
        (SEMANTIC | {"ranking_strategy": {"strategy": "random"}}, "give which_to_keep: random"),
        ({"_target_": SEMANTIC["_target_"]}, "the argument 'input_path', 'output_path' is missing"),
        ({"_target_": "nemo_image.pipeline.workflows.base.DeduplicationWorkflow"}, "is no workflow"),
        (READ, "is no workflow: 'workflow' takes SemanticDeduplicationWorkflow, ExactDeduplicationWorkflow"),
    ],
)
def test_errors_of_workflows(entry: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        build_pipeline({"workflow": [entry]})
    assert str(raised.value).startswith("workflow.0")
    assert said in str(raised.value)


# NeMo Curator's names ------------------------------------------------------------------------------------------------

OLD_START = {"_target_": "nemo_curator.stages.file_partitioning.FilePartitioningStage", "file_paths": "/data/in"}
OLD_READ = {"_target_": "nemo_curator.stages.image.io.image_reader.ImageReaderStage"}
OLD_EMBED = {"_target_": "nemo_curator.stages.image.embedders.clip_embedder.ImageEmbeddingStage"}
OLD_AESTHETIC = {"_target_": "nemo_curator.stages.image.filters.aesthetic_filter.ImageAestheticFilterStage"}
OLD_NSFW = {"_target_": "nemo_curator.stages.image.filters.nsfw_filter.ImageNSFWFilterStage"}


def test_the_configurations_of_the_published_pages_run(caplog: pytest.LogCaptureFixture) -> None:
    config = {
        "stages": [
            OLD_START,
            OLD_READ | {"task_batch_size": 50},
            OLD_EMBED | {"model_name": "openai/clip-vit-large-patch14", "batch_size": 16},
            OLD_AESTHETIC | {"min_aesthetic_score": 5.5},
            OLD_NSFW | {"threshold": 0.4, "_name": "safe"},
            OLD_NSFW | {"threshold": 0.3},
        ]
    }

    with caplog.at_level(logging.WARNING, "nemo_image"):
        plan = read_plan(config)

    _, reader, embedder, aesthetic, nsfw, again = plan.build().stages
    assert (reader.batch_size, embedder.model_inference_batch_size) == (50, 16)
    assert (aesthetic.score_threshold, nsfw.score_threshold, nsfw.name) == (5.5, 0.4, "safe")
    assert again.score_threshold == 0.3
    assert plan.notes == [
        f"{OLD_START['_target_']} is nemo_image.stages.FilePartitioningStage",
        f"{OLD_READ['_target_']} is nemo_image.stages.ImageReaderStage",
        "ImageReaderStage: task_batch_size is batch_size",
        f"{OLD_EMBED['_target_']} is nemo_image.stages.ImageEmbeddingStage",
        "ImageEmbeddingStage: batch_size is model_inference_batch_size",
        f"{OLD_AESTHETIC['_target_']} is nemo_image.stages.ImageAestheticFilterStage",
        "ImageAestheticFilterStage: min_aesthetic_score is score_threshold",
        f"{OLD_NSFW['_target_']} is nemo_image.stages.ImageNSFWFilterStage",
        "ImageNSFWFilterStage: threshold is score_threshold",
        "ImageNSFWFilterStage: _name is name",
    ]
    assert len([record for record in caplog.records if "of the configuration" in record.getMessage()]) == 1


def test_a_default_that_differs_is_told() -> None:
    def notes(**given: Any) -> list[str]:
        return read_plan({"stages": [OLD_START, OLD_AESTHETIC | given]}).notes

    assert "ImageAestheticFilterStage: score_threshold is not given: 5.0 here, 0.5 there" in notes()[-1]
    assert "score_threshold" not in str(notes(score_threshold=6))
    ours = {"_target_": "nemo_image.stages.ImageAestheticFilterStage"}
    assert read_plan({"stages": [START, ours]}).notes == []


def test_older_arguments_are_taken_by_our_names_too() -> None:
    plan = read_plan({"stages": [START, {"_target_": "nemo_image.stages.ImageNSFWFilterStage", "threshold": 0.2}]})
    assert plan.entries[1].arguments == {"score_threshold": 0.2}


def test_a_stage_of_the_users_own_keeps_its_arguments_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "own_stages_here.py").write_text(
        OWN + "\n\nclass ImageNSFWFilterStage(Plain):\n"
        "    def __init__(self, threshold):\n        self.threshold = threshold\n"
    )
    assert built(own("ImageNSFWFilterStage", threshold=3)).stages[2].threshold == 3
    with pytest.raises(ArgumentError, match="there is no argument 'weights_path'"):
        built(own("ImageNSFWFilterStage", threshold=3, weights_path=None))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (OLD_NSFW | {"threshold": 0.1, "score_threshold": 0.2}, "'threshold' is an older name of 'score_threshold'"),
        (OLD_NSFW | {"weights_path": "/x"}, "no argument 'weights_path', given as '/x': the head's file"),
        (OLD_NSFW | {"resources": {"entire_gpu": True}}, "give gpus: 1"),
        (OLD_NSFW | {"resources": {"gpu_memory_gb": 8}}, "give gpus, the share of a GPU"),
        ({"_target_": "nemo_curator.backends.xenna.XennaExecutor"}, "is replaced by nemo_image.pipeline.DaskExecutor"),
        ({"_target_": "nemo_curator.stages.text.filters.WordCountFilter"}, OLD_NSFW["_target_"]),
        ({"_target_": "nemo_curator.stages.image.filters.nsfw_filter.os.system"}, "has no equal here"),
    ],
)  # fmt: skip
def test_what_has_no_equal_is_an_error(entry: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        build_pipeline({"stages": [START, entry]})
    assert said in str(raised.value)
    assert str(raised.value).startswith("stages.1")


def test_what_changes_nothing_is_left_out_and_told() -> None:
    plan = read_plan({"stages": [START, OLD_NSFW | {"weights_path": None, "resources": {"nvdecs": 0, "gpus": 0.5}}]})
    assert plan.entries[1].arguments == {}
    assert plan.entries[1].settings == {"resources": Resources(gpus=0.5)}
    assert "ImageNSFWFilterStage: weights_path is left out: the head's file is looked for in model_dir" in plan.notes
    assert "Resources: nvdecs is left out: there is no video here" in plan.notes


def test_the_table_is_right() -> None:
    """Every mapping leads to a public class of ours and to one of its arguments, and replaces none of them."""
    targets = [target for one in TABLE for target in one.targets]
    assert len(set(targets)) == len(targets)
    assert not set(targets) & set(REPLACED)
    for one in TABLE:
        cls = find_class(one.ours, ["nemo_image"])
        package = sys.modules[one.ours.rpartition(".")[0]]
        assert cls.__name__ in package.__all__
        parameters = inspect.signature(cls).parameters
        assert set(one.defaults) <= set(parameters)
        for old, new in one.arguments.items():
            assert old not in parameters, f"{cls.__name__} has {old} itself"
            assert isinstance(new, Dropped) or new in parameters
        for target in one.targets:
            assert target.rpartition(".")[2] == cls.__name__
