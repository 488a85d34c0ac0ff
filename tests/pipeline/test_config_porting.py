"""``docs/porting.md`` says what the code does: names, arguments, defaults, and code that runs."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_image.pipeline.configuration.build import IGNORED
from nemo_image.pipeline.configuration.old_names import EVERYWHERE, REPLACED, TABLE, Dropped

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "porting.md").read_text()
ABSENT = "–"

Rows = list[tuple[str, ...]]


def tables(text: str) -> list[Rows]:
    """Return the rows of a text's tables, without their headings."""
    found: list[Rows] = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        lines = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in block.splitlines()]
        found.append([tuple(cell.strip().replace(r"\|", "|") for cell in line) for line in lines[2:]])
    return found


def section(title: str, level: str) -> str:
    parts = re.split(rf"^{level} (.*)$", TEXT, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[title]


# Old names -----------------------------------------------------------------------------------------------------------


def said_of(new: str | Dropped) -> str:
    if isinstance(new, str):
        return f"`{new}`"
    shown = [f"`{value!r}`" for value in new.only or ()]
    return f"left out{' where it is ' + ' or '.join(shown) if shown else ''}: {new.why}"


def test_the_table_of_classes_is_the_codes() -> None:
    wanted = [(f"`{target}`", f"`{one.ours}`") for one in TABLE for target in one.targets]
    wanted += [(f"`{target}`", said) for target, said in REPLACED.items()]
    (rows,) = tables(section("Names of classes", "###").partition("\n### ")[0])
    assert rows == wanted


def test_the_table_of_arguments_is_the_codes() -> None:
    wanted = [("every stage", f"`{old}`", said_of(new)) for old, new in EVERYWHERE.items()]
    for one in TABLE:
        cls = one.ours.rpartition(".")[2]
        wanted += [(f"`{cls}`", f"`{old}`", said_of(new)) for old, new in one.arguments.items()]
    (rows,) = tables(section("Names of arguments", "###").partition("\n## ")[0])
    assert rows == wanted


def test_keys_that_are_ignored_are_said() -> None:
    said = section("Configurations in YAML", "##")
    assert [key for key in IGNORED if f"`{key}:`" not in said and not key.startswith("executor")] == []


# Arguments -----------------------------------------------------------------------------------------------------------

PLACES = {
    "nemo_image": ["get_client"],
    "nemo_image.classifiers": ["AestheticClassifier", "ImageClassifier", "NsfwClassifier"],
    "nemo_image.datasets": [
        "ImageTextPairDataset",
        "ImageTextPairDataset.from_webdataset",
        "ImageTextPairDataset.save_metadata",
        "ImageTextPairDataset.to_webdataset",
    ],
    "nemo_image.dedup": ["ClusteringModel", "SemanticClusterLevelDedup", "SemanticDedup"],
    "nemo_image.embedders": ["ImageEmbedder", "TimmImageEmbedder"],
    "nemo_image.pipeline": ["DaskExecutor", "Pipeline", "SemanticDeduplicationWorkflow"],
    "nemo_image.pipeline.workflows": ["RankingStrategy"],
    "nemo_image.stages": [
        "ConvertImageBatchToDocumentBatchStage",
        "FilePartitioningStage",
        "ImageAestheticFilterStage",
        "ImageDuplicatesRemovalStage",
        "ImageEmbeddingStage",
        "ImageNSFWFilterStage",
        "ImageObject",
        "ImageReaderStage",
        "ImageWriterStage",
        "ParquetWriter",
        "Resources",
    ],
}


def named(module: str, name: str) -> Callable[..., Any]:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    assert callable(found)
    return found


def default_of(parameter: inspect.Parameter) -> Any:
    default = parameter.default
    # A dataclass's default that is made anew for each object.
    return [] if type(default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS" else default


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in PLACES.items() for name in names])
def test_the_arguments_and_defaults_are_the_codes(module: str, name: str) -> None:
    rows = tables(section(f"`{name}`", "###").partition("\n## ")[0])[0]
    parameters = inspect.signature(named(module, name)).parameters
    ours = {
        one: parameter
        for one, parameter in parameters.items()
        if one != "self" and parameter.kind is not parameter.VAR_KEYWORD
    }
    said = {argument.strip("`"): here for argument, _, here, _ in rows}
    assert len(said) == len(rows)
    assert {one for one, here in said.items() if here != ABSENT} == set(ours)
    for one, here in said.items():
        if here == "required":
            assert ours[one].default is inspect.Parameter.empty, one
        elif here != ABSENT:
            value = ast.literal_eval(here.strip("`"))
            assert (value, type(value)) == (default_of(ours[one]), type(default_of(ours[one]))), one


def test_every_class_with_a_table_is_checked() -> None:
    titles = re.findall(r"^### `(.*)`$", TEXT, re.MULTILINE)
    assert sorted(titles) == sorted(name for names in PLACES.values() for name in names)


def test_the_classes_of_the_old_names_have_a_table() -> None:
    titles = set(re.findall(r"^### `(.*)`$", TEXT, re.MULTILINE))
    assert {one.ours.rpartition(".")[2] for one in TABLE} <= titles


# Code ----------------------------------------------------------------------------------------------------------------

BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_imports_what_there_is_and_fits_the_signatures(block: str) -> None:
    tree = ast.parse(block)
    known: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            known |= {alias.name: getattr(module, alias.name) for alias in node.names}
    called = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            arguments = {str(one.arg): None for one in node.keywords}
            inspect.signature(known[node.func.id]).bind(*[None] * len(node.args), **arguments)
            called.add(node.func.id)
    assert len(called) > 1


def test_the_tutorial_pipeline_is_built() -> None:
    scope: dict[str, Any] = {"__name__": "tutorial"}
    exec(compile(BLOCKS[0], "porting.md", "exec"), scope)
    stages = scope["create_image_curation_pipeline"]().build()
    assert [type(one).__name__ for one in stages] == [
        "FilePartitioningStage",
        "ImageReaderStage",
        "ImageEmbeddingStage",
        "ImageAestheticFilterStage",
        "ImageNSFWFilterStage",
        "ImageWriterStage",
    ]


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert [link for link in links if "://" not in link and not (ROOT / "docs" / link).exists()] == []
