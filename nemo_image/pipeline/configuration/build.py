"""Build what a configuration describes: a pipeline of stages, or a workflow. A restricted walk, not an import of names.

A class is looked for only inside the allowed packages and must be a stage (or a workflow, under ``workflow:``);
arguments are plain values and are checked against its constructor before anything is called. There are no positional
arguments, no partial calls, and no classes inside arguments but a stage's ``resources`` and a workflow's
``ranking_strategy``.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_image.errors import ArgumentError
from nemo_image.pipeline.configuration.config import IGNORED, OWN_KEYS, PARTS
from nemo_image.pipeline.configuration.interpolation import MISSING, TARGET, near_name
from nemo_image.pipeline.configuration.old_names import OLD, our_arguments, our_target
from nemo_image.pipeline.configuration.targets import OURS, check_prefixes, find_class
from nemo_image.pipeline.pipeline import Pipeline
from nemo_image.stages.base import ProcessingStage

logger = logging.getLogger("nemo_image")

SETTINGS = ("name", "resources", "batch_size")
"""What every stage has, whatever its constructor takes."""

NESTED = {
    "stages": {"resources": "nemo_image.stages.Resources"},
    "workflow": {"ranking_strategy": "nemo_image.pipeline.workflows.RankingStrategy"},
}
"""Arguments that are mappings of another class's arguments, with or without that class's ``_target_``."""

BASES = frozenset({"ProcessingStage", "CompositeStage", "ImageFilterStage", "ScoreFilterStage"})
"""Our classes that stages are made from."""

_SPECIAL = re.compile(r"_.*_")
"""Keys that mean something to Hydra: ``_args_``, ``_partial_``."""


@dataclass(frozen=True)
class Entry:
    """A class that a configuration names, checked, with its arguments.

    Attributes
    ----------
    place : str
        Where it stands: ``stages.2``.
    cls : type
    arguments : dict
        Of the constructor.
    settings : dict
        Of ``with_``.
    """

    place: str
    cls: type
    arguments: dict[str, Any]
    settings: dict[str, Any]

    def make(self) -> Any:
        """Call the constructor.

        Raises
        ------
        ArgumentError
            If it does not take the arguments.
        """
        try:
            made = self.cls(**self.arguments)
            return made.with_(**self.settings) if self.settings else made
        except (ArgumentError, TypeError, ValueError) as error:
            raise ArgumentError(f"{self.place} ({self.cls.__name__}): {error}") from error


@dataclass
class Plan:
    """What a configuration describes, checked, not made yet.

    Attributes
    ----------
    part : str
        ``"stages"`` or ``"workflow"``.
    entries : list of Entry
    name : str
    description : str or None
    notes : list of str
        Names of NeMo Curator that were read as ours, and keys that were ignored.
    """

    part: str
    entries: list[Entry]
    name: str
    description: str | None = None
    notes: list[str] = field(default_factory=list)

    def build(self) -> Any:
        """Return the pipeline, its stages found to fit together; or the workflow.

        Raises
        ------
        ArgumentError
            If a constructor does not take its arguments, or stages do not fit.
        """
        if self.part == "workflow":
            return self.entries[0].make()
        pipeline = Pipeline(self.name, self.description, [entry.make() for entry in self.entries])
        pipeline.build()
        return pipeline


def build_pipeline(config: Mapping[str, Any], allowed: Sequence[str] = (OURS,)) -> Any:
    """Build the pipeline, or the workflow, that a configuration describes.

    Parameters
    ----------
    config : mapping
        As :func:`load_config` returns it: ``stages``, a list of mappings with ``_target_``, a stage's class, and its
        arguments; or ``workflow``, one such mapping or a list of one. ``name`` and ``description`` are the
        pipeline's.
    allowed : sequence of str, default ("nemo_image",)
        Packages and modules whose classes may be named. Naming a package of yours has it imported.

    Returns
    -------
    Pipeline, or a workflow

    Raises
    ------
    ArgumentError
        Naming the stage, its target and the argument that is wrong.
    """
    return read_plan(config, allowed).build()


def read_plan(config: Mapping[str, Any], allowed: Sequence[str] = (OURS,)) -> Plan:
    """Check a configuration, without calling any constructor; as :func:`build_pipeline`."""
    prefixes = check_prefixes(allowed)
    part = _part(config)
    notes = list(_ignored(config))
    written = config[part]
    is_single = part == "workflow" and isinstance(written, Mapping)
    if is_single:
        written = [written]
    if not isinstance(written, Sequence) or isinstance(written, str) or not written:
        what = "a mapping with _target_, or a list of one" if part == "workflow" else "a list of mappings with _target_"
        raise ArgumentError(f"{part!r} must be {what}")
    if part == "workflow" and len(written) != 1:
        raise ArgumentError(f"'workflow' must be a list of one, not of {len(written)}")
    for key in ("name", "description"):
        if not isinstance(config.get(key, ""), str):
            raise ArgumentError(f"{key!r} must be text, not {config[key]!r}")
    reader = _EntryReader(part, prefixes, notes)
    entries = [reader.read(one, part if is_single else f"{part}.{number}") for number, one in enumerate(written)]
    plan = Plan(part, entries, config.get("name", "pipeline"), config.get("description"), list(dict.fromkeys(notes)))
    if plan.notes:
        logger.warning("of the configuration: %s", "; ".join(plan.notes))
    return plan


def _ignored(config: Mapping[str, Any]) -> Iterator[str]:
    defaults = config.get("defaults") or ()
    for entry in defaults if isinstance(defaults, Sequence) and not isinstance(defaults, str) else [defaults]:
        name = next(iter(entry)) if isinstance(entry, Mapping) and entry else entry
        if name != "_self_" and not str(name).startswith("override hydra/"):
            raise ArgumentError(f"defaults: {name!r}: other files are not merged; copy what it says into this one")
    for key, why in IGNORED.items():
        if key in config and key != "defaults":
            yield f"{key} is ignored: {why}"


def _part(config: Mapping[str, Any]) -> str:
    if not isinstance(config, Mapping):
        raise ArgumentError(f"a configuration is a mapping, not {type(config).__name__}: load_config reads one")
    found = [part for part in PARTS if part in config]
    if len(found) == 2:
        raise ArgumentError("the configuration has both 'stages' and 'workflow': leave one out")
    if not found:
        near = next((near for key in config if (near := near_name(key, PARTS)) and key not in OWN_KEYS), "")
        raise ArgumentError(f"the configuration has neither 'stages' nor 'workflow'{near}")
    return found[0]


class _EntryReader:
    """Reads entries of the list of stages, or of the workflow."""

    def __init__(self, part: str, allowed: Sequence[str], notes: list[str]) -> None:
        self.part = part
        self.allowed = allowed
        self.notes = notes

    def read(self, written: Any, place: str) -> Entry:
        if not isinstance(written, Mapping) or TARGET not in written:
            raise ArgumentError(f"{place}: it must be a mapping with _target_, a class's dotted name")
        target = written[TARGET]
        try:
            cls = self._class(target)
            given = _plain({key: value for key, value in written.items() if key != TARGET}, "", NESTED[self.part])
            for name, nested in NESTED[self.part].items():
                if given.get(name) is not None:
                    given[name] = _nested(name, nested, given[name], self.notes)
            return self._entry(cls, given, place, _is_old(target))
        except ArgumentError as error:
            named = f" ({target})" if isinstance(target, str) and target not in str(error) else ""
            raise ArgumentError(f"{place}{named}: {error}") from error

    def _class(self, target: Any) -> type:
        cls = find_class(our_target(target, self.notes), self.allowed)
        if self.part == "stages":
            is_base = cls.__name__ in BASES and cls.__module__.partition(".")[0] == OURS
            if not issubclass(cls, ProcessingStage) or is_base or inspect.isabstract(cls):
                what = "what stages are made from" if issubclass(cls, ProcessingStage) else "no stage"
                raise ArgumentError(f"{target} is {what}: 'stages' takes classes made from ProcessingStage")
        elif not any(issubclass(cls, one) for one in _workflows()):
            names = ", ".join(one.__name__ for one in _workflows())
            raise ArgumentError(f"{target} is no workflow: 'workflow' takes {names}")
        return cls

    def _entry(self, cls: type, given: dict[str, Any], place: str, is_old: bool) -> Entry:
        parameters = inspect.signature(cls).parameters
        takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
        names = [name for name, one in parameters.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        arguments = our_arguments(cls, names, given, is_old, self.notes)
        shared = SETTINGS if self.part == "stages" else ()
        settings: dict[str, Any] = {}
        for name in [one for one in arguments if one not in names]:
            if name in shared:
                settings[name] = arguments.pop(name)
            elif not takes_any:
                known = ", ".join(dict.fromkeys([*names, *shared]))
                near = near_name(name, [*names, *shared])
                raise ArgumentError(f"there is no argument {name!r}{near} (it takes {known})")
        required = [name for name in names if parameters[name].default is inspect.Parameter.empty]
        lacking = [name for name in required if name not in arguments]
        if lacking:
            raise ArgumentError(f"the argument {', '.join(map(repr, lacking))} is missing")
        return Entry(place, cls, arguments, settings)


def _workflows() -> tuple[type, ...]:
    from nemo_image.pipeline.workflows import (
        ExactDeduplicationWorkflow,
        KeepWorkflow,
        PerceptualDeduplicationWorkflow,
        SemanticDeduplicationWorkflow,
    )

    return SemanticDeduplicationWorkflow, ExactDeduplicationWorkflow, PerceptualDeduplicationWorkflow, KeepWorkflow


def _nested(name: str, ours: str, written: Any, notes: list[str]) -> Any:
    """Return what a mapping of a class's arguments makes."""
    if not isinstance(written, Mapping):
        raise ArgumentError(f"{name} must be a mapping of the arguments of {ours}, not {written!r}")
    cls = find_class(ours, (OURS,))
    given = {key: value for key, value in written.items() if key != TARGET}
    target = written.get(TARGET)
    if TARGET in written and find_class(our_target(target, notes), (OURS,)) is not cls:
        raise ArgumentError(f"{name}: {target!r} is not {ours}")
    names = list(inspect.signature(cls).parameters)
    arguments = our_arguments(cls, names, given, _is_old(target), notes)
    for one in arguments:
        if one not in names:
            raise ArgumentError(f"{name}: there is no {one!r}{near_name(one, names)} (it takes {', '.join(names)})")
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name}: {error}") from error


def _is_old(target: Any) -> bool:
    return isinstance(target, str) and target.startswith(OLD + ".")


def _plain(value: Any, path: str, nested: Collection[str]) -> Any:
    """Return a copy of an argument, which must be made of plain values; `nested` are paths that may have a target."""
    if isinstance(value, str):
        if "${" in value or value == MISSING:
            raise ArgumentError(f"{path}: {value!r} is not put in yet: read the configuration by load_config")
        return value
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {_key(key, path, nested): _plain(one, _below(path, key), nested) for key, one in value.items()}
    if isinstance(value, Sequence):
        return [_plain(one, _below(path, number), nested) for number, one in enumerate(value)]
    raise ArgumentError(f"{path}: {value!r} is no plain value (text, number, true, false, null, list or mapping)")


def _key(key: Any, path: str, nested: Collection[str]) -> str:
    if not isinstance(key, str):
        raise ArgumentError(f"{path}: the key {key!r} is no text")
    if _SPECIAL.fullmatch(key) and not (key == TARGET and path in nested):
        raise ArgumentError(f"{_below(path, key)}: {key} is not taken: arguments are plain values, by name")
    return key


def _below(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
