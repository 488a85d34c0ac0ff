"""Configurations that would do harm: what was tried, and why it is refused. Each would leave a canary."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nemo_image.errors import ArgumentError
from nemo_image.pipeline.configuration.build import build_pipeline
from nemo_image.pipeline.configuration.config import load_config

EVIL = """
from pathlib import Path
from nemo_image.stages.base import ProcessingStage

Path({canary!r}).touch()


class X(ProcessingStage):
    def __init__(self, path=None):
        Path({canary!r}).touch()
"""

MINE = """
import os
from os import system
from pathlib import Path
from subprocess import Popen

from nemo_image.stages import ImageFilterStage


class Mine(ImageFilterStage):
    def __init__(self, rule=None, options=None):
        if callable(rule):
            rule("touch {canary}")

    def keep(self, image):
        return True

    @classmethod
    def make(cls, path):
        Path(path).touch()
"""

PLUGINS = ("nemo_image_evil", "my", "my_evil", "myevil")


class _Toucher:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that must not come into being; beside it, modules and a pickle that would make it."""
    path = tmp_path / "canary"
    for name in PLUGINS:
        (tmp_path / name).mkdir()
        text = MINE if name == "my" else EVIL
        (tmp_path / name / "__init__.py").write_text(
            text.replace("{canary!r}", repr(str(path))).replace("{canary}", str(path))
        )
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(_Toucher(path)))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CANARY", str(path))
    yield path
    for name in PLUGINS:
        sys.modules.pop(name, None)


@dataclass(frozen=True)
class Try:
    """A configuration, and words of the reason why it is refused."""

    text: str
    said: str
    overrides: Sequence[str] = ()
    allowed: Sequence[str] = ("nemo_image",)


def target(name: str, *arguments: str) -> str:
    """Return a file with one stage."""
    lines = [f"    {one}" for one in arguments]
    return "\n".join(["stages:", f"  - _target_: {name}", *lines, ""])


def mine(argument: str, said: str, name: str = "my.Mine") -> Try:
    """Return an attempt through a module of the user's, which is allowed."""
    return Try(target(name, argument), said, allowed=MINE_TOO)


GOOD = "nemo_image.stages.FilePartitioningStage"
DATA = "file_paths: /data"
FINE = target(GOOD, DATA)
MINE_TOO = ("nemo_image", "my")
NOT_ALLOWED = "lies in none of the allowed packages"
NOT_PUBLIC = "is not the dotted name of a public class"
NOT_PLAIN = "is not a plain value"

TRIES = {
    # Functions and classes of other packages.
    "os.system": Try(target("os.system", "command: touch $CANARY"), NOT_ALLOWED),
    "posix.system": Try(target("posix.system", "command: touch $CANARY"), NOT_ALLOWED),
    "eval": Try(target("builtins.eval", "source: open('canary', 'w')"), NOT_ALLOWED),
    "exec": Try(target("builtins.exec"), NOT_ALLOWED),
    "Popen": Try(target("subprocess.Popen", "args: [touch, canary]"), NOT_ALLOWED),
    "pathlib": Try(target("pathlib.Path.touch", "self: canary"), NOT_ALLOWED),
    "joblib.load": Try(target("joblib.load", "filename: evil.pkl"), NOT_ALLOWED),
    "pandas.read_pickle": Try(target("pandas.read_pickle", "filepath_or_buffer: evil.pkl"), NOT_ALLOWED),
    "torch.load": Try(target("torch.load", "f: evil.pkl", "weights_only: false"), NOT_ALLOWED),
    "numpy.load": Try(target("numpy.load", "file: evil.pkl", "allow_pickle: true"), NOT_ALLOWED),
    "hydra": Try(target("hydra.utils.instantiate"), NOT_ALLOWED),
    "nothing dotted": Try(target("system"), NOT_ALLOWED),
    # Names that only look like an allowed one.
    "nemo_image_evil": Try(target("nemo_image_evil.X"), NOT_ALLOWED),
    "my_evil": Try(target("my_evil.X"), NOT_ALLOWED, allowed=MINE_TOO),
    "myevil": Try(target("myevil.X"), NOT_ALLOWED, allowed=MINE_TOO),
    "nothing allowed": Try(target(GOOD), NOT_ALLOWED, allowed=()),
    "empty prefix": Try(target("nemo_image_evil.X"), "allowed: ''", allowed=("",)),
    "dot prefix": Try(target("nemo_image_evil.X"), "allowed: '.'", allowed=(".",)),
    "dot at the end": Try(target("nemo_image_evil.X"), "allowed: 'nemo_image.'", allowed=("nemo_image.",)),
    "star prefix": Try(target("nemo_image_evil.X"), "allowed: '*'", allowed=("*",)),
    "one text": Try(target("nemo_image_evil.X"), "allowed must be a list", allowed="nemo_image"),
    # Our own names, but not our stages.
    "np.load of ours": Try(target("nemo_image.stages.np.load", "file: evil.pkl"), "there is no 'np'"),
    "np.load of a module": Try(target("nemo_image.stages.image_object.np.load"), "'np' is a module"),
    "os of ours": Try(target("nemo_image.shards.files.os.system", "command: x"), "'os' is a module"),
    "foreign class": Try(target("nemo_image.stages.tasks.Generic"), "comes from typing"),
    "foreign path class": Try(target("nemo_image.cli.run.Path.touch", "self: canary"), "comes from pathlib"),
    "ShardReader elsewhere": Try(target("nemo_image.stages.image_object.ShardReader", "url: evil.pkl"), "is no stage"),
    "helper": Try(target("nemo_image.engine.state_dict.load_state_dict", "path: evil.pkl"), "not a class"),
    "helper that writes": Try(target("nemo_image.shards.atomic.write_local", "path: canary"), "not a class"),
    "class of ours": Try(target("nemo_image.shards.read.ShardReader", "url: evil.pkl"), "is no stage"),
    "errors": Try(target("nemo_image.errors.ArgumentError"), "is no stage"),
    "pipeline": Try(target("nemo_image.pipeline.Pipeline", "name: a"), "is no stage"),
    "executor": Try(target("nemo_image.pipeline.DaskExecutor"), "is no stage"),
    "method": Try(target("nemo_image.stages.base.ProcessingStage.with_", "name: a"), "is not a class|not a class"),
    "base": Try(target("nemo_image.stages.base.ProcessingStage"), "is what stages are made from"),
    "module": Try(target("nemo_image.stages.base"), "is a module, not a class"),
    "package": Try(target("nemo_image"), NOT_ALLOWED),
    "constant": Try(target("nemo_image.schema.KEY"), "'KEY' is a str, not a class"),
    # Names that lead elsewhere.
    "globals": Try(target(f"{GOOD}.__init__.__globals__"), NOT_PUBLIC),
    "class": Try(target(f"{GOOD}.__class__"), NOT_PUBLIC),
    "mro": Try(target(f"{GOOD}.mro"), "there is no 'mro'"),
    "subclasses": Try(target(f"{GOOD}.__subclasses__"), NOT_PUBLIC),
    "builtins": Try(target("nemo_image.__builtins__.eval"), NOT_PUBLIC),
    "loader": Try(target("nemo_image.__loader__.load_module"), NOT_PUBLIC),
    "main": Try(target("nemo_image.__main__"), NOT_PUBLIC),
    "private": Try(target("nemo_image.engine.state_dict._load"), NOT_PUBLIC),
    "dots": Try(target("nemo_image..stages.ImageReaderStage"), NOT_PUBLIC),
    "dot first": Try(target(".nemo_image.stages.ImageReaderStage"), NOT_PUBLIC),
    "colon": Try(target("'nemo_image.stages:os.system'"), NOT_PUBLIC),
    "line break": Try(target('"nemo_image.stages.ImageReaderStage\\n"'), NOT_PUBLIC),
    "slash": Try(target("nemo_image/../my_evil.X"), NOT_PUBLIC),
    "letters alike": Try(target("nemo_ımage.stages.ImageReaderStage"), NOT_PUBLIC),
    "empty": Try(target("''"), NOT_PUBLIC),
    "list": Try(target("[os.system]"), "must be a class's dotted name, not ['os.system']"),
    "mapping": Try(target("{_target_: os.system}"), "must be a class's dotted name"),
    "null": Try(target("null"), "must be a class's dotted name, not None"),
    # What an allowed module imports is not its own.
    "re-exported function": mine("command: touch canary", "not a class", "my.system"),
    "re-exported module": mine("command: touch canary", "'os' is a module", "my.os.system"),
    "re-exported class": mine("args: [touch, canary]", "comes from subprocess", "my.Popen"),
    "re-exported method": mine("self: canary", "comes from pathlib", "my.Path.touch"),
    "own method": mine("path: canary", "not a class", "my.Mine.make"),
    # Targets and calls inside arguments.
    "nested target": mine("rule: {_target_: os.system, command: touch canary}", "rule._target_"),
    "nested deeper": mine("options: {a: [{b: {_target_: my.Mine}}]}", "options.a.0.b._target_"),
    "nested partial": mine("rule: {_partial_: true, a: 1}", "rule._partial_"),
    "nested stage": mine(f"rule: {{_target_: {GOOD}}}", "rule._target_"),
    "resources": mine("resources: {_target_: os.system, command: x}", NOT_ALLOWED),
    "resources of mine": mine("resources: {_target_: my.Mine}", NOT_ALLOWED),
    "resources of ours": mine(f"resources: {{_target_: {GOOD}}}", "is not nemo_image.stages.Resources"),
    "resources args": mine("resources: {_args_: [1]}", "resources._args_"),
    "_args_": Try(target(GOOD, "_args_: [/data]"), "_args_ is not taken"),
    "_partial_": Try(target(GOOD, DATA, "_partial_: true"), "_partial_ is not taken"),
    "_recursive_": Try(target(GOOD, DATA, "_recursive_: true"), "_recursive_ is not taken"),
    "_convert_": Try(target(GOOD, DATA, "_convert_: object"), "_convert_ is not taken"),
    "__class__ argument": Try(target(GOOD, DATA, "__class__: x"), "__class__ is not taken"),
    "private argument": Try(target("nemo_image.stages.ImageReaderStage", "_needs_pixels: true"), "no argument"),
    "second target": Try(f"stages:\n  - _target_: {GOOD}\n    _target_: os.system\n", "'_target_' is there twice"),
    # Workflows.
    "workflow": Try("workflow:\n  - _target_: os.system\n    command: touch canary\n", NOT_ALLOWED),
    "workflow of a stage": Try(f"workflow:\n  - _target_: {GOOD}\n    file_paths: /data\n", "is no workflow"),
    "stage of a workflow": Try(target("nemo_image.pipeline.SemanticDeduplicationWorkflow"), "is no stage"),
    # Values that are not written out.
    "env": Try(target(GOOD, "file_paths: ${oc.env:CANARY}"), "there are no resolvers"),
    "decode": Try(target(GOOD, "file_paths: ${oc.decode:x}"), "there are no resolvers"),
    "select": Try(target(GOOD, "file_paths: ${oc.select:stages}"), "there are no resolvers"),
    "deprecated": Try(target(GOOD, "file_paths: ${oc.deprecated:stages}"), "there are no resolvers"),
    "nested name": Try("a: oc.env\n" + target(GOOD, "file_paths: ${${a}:CANARY}"), "there are no resolvers"),
    "interpolated target": Try("a: os.system\n" + target("${a}"), "a target is written out"),
    "half a target": Try("a: os\n" + target("${a}.system"), "a target is written out"),
    "interpolated stage": Try("a: {_target_: os.system}\nstages:\n  - ${a}\n", NOT_ALLOWED),
    "interpolated stages": Try("a: [{_target_: os.system}]\nstages: ${a}\n", NOT_ALLOWED),
    "interpolated argument": Try("a: {_target_: os.system}\n" + target(GOOD, "limit: ${a}"), "limit._target_"),
    # Overrides.
    "override of the target": Try(FINE, NOT_ALLOWED, ["stages.0._target_=os.system"]),
    "override by a reference": Try(FINE, "a target is written out", ["+a=os.system", "stages.0._target_=${a}"]),
    "override of a stage": Try(FINE, NOT_ALLOWED, ["stages.0={_target_: os.system}"]),
    "override with _args_": Try(FINE, "_args_ is not taken", ["+stages.0._args_=[a]"]),
    "override with a nested target": Try(target(GOOD), "limit._target_", ["stages.0.limit={_target_: os.system}"]),
    "override with env": Try(FINE, "there are no resolvers", ["stages.0.file_paths=${oc.env:HOME}"]),
    "override with a tag": Try(target(GOOD), NOT_PLAIN, ["stages.0.file_paths=[!!python/object/apply:os.system [x]]"]),
    # YAML itself.
    "tag": Try("a: !!python/object/apply:os.system ['touch canary']\n" + target(GOOD), NOT_PLAIN),
    "tag new": Try("a: !!python/object/new:os.system ['touch canary']\n" + target(GOOD), NOT_PLAIN),
    "tag name": Try("a: !!python/name:os.system\n" + target(GOOD), NOT_PLAIN),
    "tag module": Try("a: !!python/module:nemo_image_evil\n" + target(GOOD), NOT_PLAIN),
    "tag instance": Try("!!python/object:my_evil.X {}\n", NOT_PLAIN),
    "large": Try(FINE + "#" * (1 << 20), "more than 1,048,576 bytes"),
    "many": Try("a: [" + "x, " * 150_000 + "x]\n" + target(GOOD), "more than 100,000 values"),
    "deep": Try("a: " + "[" * 50_000 + "\n", "nested too deeply"),
    # NeMo Curator's names lead to ours only.
    "old name": Try(target("nemo_curator.os.system"), "has no equal here"),
    "old name, longer": Try(target("nemo_curator.stages.file_partitioning.FilePartitioningStage.os"), "has no equal"),
    "old name alike": Try(target("nemo_curator_evil.X"), NOT_ALLOWED),
}  # fmt: skip


@pytest.mark.parametrize("name", TRIES)
def test_it_is_refused(name: str, canary: Path) -> None:
    one = TRIES[name]
    with pytest.raises(ArgumentError) as raised:
        build_pipeline(load_config(one.text + "\n", one.overrides), one.allowed)
    assert any(words in str(raised.value) for words in one.said.split("|")), str(raised.value)
    assert not canary.exists()
    assert not {"nemo_image_evil", "my_evil", "myevil"} & set(sys.modules)


def test_the_canary_would_sing(canary: Path) -> None:
    """What the configurations above name does make the file, where it is called."""

    def sang() -> bool:
        found = canary.exists()
        canary.unlink(missing_ok=True)
        return found

    assert not sang()
    for name in ("nemo_image_evil", "my_evil", "myevil"):
        importlib.import_module(name)
        assert sang()
    pickle.loads((canary.parent / "evil.pkl").read_bytes())
    assert sang()
    os.system("touch $CANARY")
    assert sang()
    subprocess.run(["touch", "canary"], check=True)
    assert sang()
    importlib.import_module("my").Mine(rule=os.system)
    assert sang()


def test_the_same_files_without_the_harm_are_built(canary: Path) -> None:
    text = FINE + "  - _target_: nemo_image.stages.ImageReaderStage\n  - _target_: my.Mine\n"
    for key in ("ray_client", "executor", "hydra", "executor_config"):
        text += f"{key}: {{_target_: os.system, command: touch canary}}\n"
    assert len(build_pipeline(load_config(text), MINE_TOO).stages) == 3
    assert not canary.exists()
    # Allowed, even that module is imported.
    with pytest.raises(ArgumentError, match="the first stage"):
        build_pipeline(load_config(target("nemo_image_evil.X")), ("nemo_image", "nemo_image_evil"))
    assert canary.exists()
