"""The package around the code: what is public, what is declared, what the documents promise."""

from __future__ import annotations

import ast
import configparser
import importlib
import inspect
import json
import logging
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest

import nemo_image
from nemo_image import cli

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = [
    "nemo_image",
    *(f"nemo_image.{found.name}" for found in pkgutil.iter_modules(nemo_image.__path__) if found.ispkg),
]
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cudf": "cudf-cu13",
    "cuml": "cuml-cu13",
    "cupy": "cuml-cu13",
    "dask_cuda": "dask-cuda",
    "nvidia": "nvidia-dali-cuda130",
    "open_clip": "open-clip-torch",
    "rmm": "dask-cuda",
    "sklearn": "scikit-learn",
    "threadpoolctl": "scikit-learn",
    "yaml": "pyyaml",
}
"""Of modules that are not named like the distribution that brings them; some come with another one."""
NOT_DECLARED = {"huggingface_hub", "IPython"}
"""Imported only where they happen to be installed."""
NEED_TORCH = ("nemo_image.dedup", "nemo_image.embedders", "nemo_image.pipeline", "nemo_image.stages")
HEAVY = ("torch", "torchvision", "timm", "safetensors", "nvidia", "sklearn", "open_clip", "imagehash")


def read_setup() -> configparser.ConfigParser:
    setup = configparser.ConfigParser()
    assert setup.read(ROOT / "setup.cfg")
    return setup


def names_of(requirements: str) -> set[str]:
    lines = [line for line in requirements.splitlines() if line.strip()]
    return {re.match(r"[\w.-]+", line.strip())[0].lower().replace("_", "-") for line in lines}  # type: ignore[index]


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


# What is public -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKAGES)
def test_all_is_sorted_and_complete(name: str) -> None:
    package = importlib.import_module(name)
    listed = getattr(package, "__all__", [])
    assert listed == sorted(listed)
    tree = ast.parse(Path(inspect.getfile(package)).read_text())
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module != "__future__"
        for alias in node.names
    }
    public = {one for one in imported if not one.startswith("_")}
    assert public <= set(listed), f"{name} imports names that its __all__ lacks"
    for one in listed:
        assert hasattr(package, one)


def test_every_public_thing_is_documented() -> None:
    undocumented = [
        f"{name}.{one}"
        for name in PACKAGES
        for one in getattr(importlib.import_module(name), "__all__", [])
        if not one.startswith("__") and not inspect.getdoc(getattr(importlib.import_module(name), one))
    ]
    assert undocumented == []


def test_the_packages_of_the_specification_are_there() -> None:
    wanted = {
        "nemo_image": ["get_client", "get_num_workers"],
        "nemo_image.datasets": ["ImageTextPairDataset"],
        "nemo_image.dedup": [
            "ClusteringModel",
            "ExactDedup",
            "PerceptualDedup",
            "SemanticClusterLevelDedup",
            "SemanticDedup",
            "kept_fraction",
        ],
        "nemo_image.embedders": ["ImageEmbedder", "TimmImageEmbedder"],
        "nemo_image.classifiers": ["AestheticClassifier", "ImageClassifier", "NsfwClassifier"],
    }
    for name, things in wanted.items():
        assert set(things) <= set(importlib.import_module(name).__all__)


# What is declared -----------------------------------------------------------------------------------------------------


def test_versions_agree() -> None:
    assert read_setup()["metadata"]["version"] == "attr: nemo_image.__version__"
    newest = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == nemo_image.__version__


def test_every_folder_with_code_is_packaged() -> None:
    setuptools = pytest.importorskip("setuptools", reason="setuptools builds the package; it is not installed here")
    include = read_setup()["options.packages.find"]["include"].split()
    found = {name.replace(".", "/") for name in setuptools.find_packages(ROOT, include=include)}
    code = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "nemo_image").rglob("*.py")}
    assert found == code
    assert (ROOT / "nemo_image" / "py.typed").is_file()


def test_every_import_is_declared() -> None:
    setup = read_setup()
    declared = names_of(setup["options"]["install_requires"]).union(
        *(names_of(extra) for extra in setup["options.extras_require"].values())
    )
    unknown = {}
    for path in (ROOT / "nemo_image").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [str(node.module)]
            for module in modules:
                top = module.partition(".")[0]
                distribution = DISTRIBUTIONS.get(top, top).lower().replace("_", "-")
                if top not in sys.stdlib_module_names | NOT_DECLARED | {"nemo_image"} and distribution not in declared:
                    unknown[top] = path.relative_to(ROOT).as_posix()
    assert unknown == {}


@pytest.fixture(scope="module")
def errors_without_extras() -> dict[str, str]:
    """What importing each package raises in a process that has none of the extras' packages."""
    code = f"""
import importlib, json, sys
for name in {HEAVY!r}:
    sys.modules[name] = None
errors = {{}}
for name in {PACKAGES!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        errors[name] = f"{{type(error).__name__}}: {{error}}"
print(json.dumps(errors))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    errors: dict[str, str] = json.loads(done.stdout)
    return errors


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_imports_without_the_extras_or_says_what_to_install(
    name: str, errors_without_extras: dict[str, str]
) -> None:
    error = errors_without_extras.get(name)
    assert error is None or (error.startswith("MissingDependencyError") and "pip install" in error)
    assert error is None or name in NEED_TORCH


# The layers -----------------------------------------------------------------------------------------------------------


def lint_imports(config: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    linter = pytest.importorskip("importlinter.cli", reason="import-linter is in the extra 'test'")
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    # The linter disables loggers that others have made.
    monkeypatch.setattr(logging.getLogger("nemo_image"), "disabled", False)
    status: int = linter.lint_imports(config_filename=str(config), cache_dir=None, no_cache=True)
    return status


def test_imports_point_down(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lint_imports(ROOT / "setup.cfg", monkeypatch) == 0


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("    engine\n    shards\n", "    shards\n    engine\n"),
        ("    datasets\n    export\n", "    datasets | export\n"),
        ("    reports\n", ""),
    ],
    ids=["swapped", "made siblings", "left out"],
)
def test_the_contract_sees_a_wrong_order(
    line: str, instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "setup.cfg").read_text()
    assert line in text
    config = tmp_path / "setup.cfg"
    config.write_text(text.replace(line, instead))
    assert lint_imports(config, monkeypatch) != 0


# What the documents promise -------------------------------------------------------------------------------------------


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("document", ["README.md", "docs/architecture.md", "CHANGELOG.md"])
def test_named_make_targets_exist(document: str) -> None:
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", (ROOT / document).read_text(), re.MULTILINE))
    assert named
    assert named <= make_targets()


def test_ci_only_calls_make() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "set -euo pipefail"
    assert lines[1].startswith("cd ")
    called = [line.removeprefix("make ") for line in lines[2:]]
    assert called == ["lint", "types", "contract", "test"]
    assert set(called) <= make_targets()


def commands() -> list[str]:
    return [line for block in blocks("README.md", "bash") for line in block.splitlines() if "nemo-image " in line[:11]]


def test_the_commands_of_the_readme_are_understood() -> None:
    assert {line.split()[1] for line in commands()} == {"curate", "dedup", "run", "inspect", "index", "report"}
    for line in commands():
        _, name, *arguments = shlex.split(line)
        command = cli.main.get_command(click.Context(cli.main), name)
        assert command is not None
        command.make_context(name, arguments)


def test_the_calls_of_the_readme_fit_the_signatures() -> None:
    (block,) = blocks("README.md", "python")
    tree = ast.parse(block)
    known: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module: ModuleType = importlib.import_module(str(node.module))
            known |= {alias.name: getattr(module, alias.name) for alias in node.names}
    dataset = known["ImageTextPairDataset"]
    called = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        places: list[object] = [None] * len(node.args)
        if isinstance(node.func, ast.Name) and node.func.id in known:
            name, function = node.func.id, known[node.func.id]
        elif isinstance(node.func, ast.Attribute):
            name, function = node.func.attr, getattr(dataset, node.func.attr)
            # Called on the class or on an object: the latter is its first argument.
            places = places if inspect.ismethod(function) else [None, *places]
        else:
            continue
        assert callable(function)
        inspect.signature(function).bind(*places, **{str(one.arg): None for one in node.keywords})
        called.add(name)
    assert {"from_webdataset", "TimmImageEmbedder", "save_metadata", "to_webdataset", "get_client"} <= called


def test_links_of_the_documents_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []
