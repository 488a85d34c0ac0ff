"""Configurations in YAML: a file's values, overridden by ``key=value``, with what they refer to put in."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_image.errors import ArgumentError
from nemo_image.pipeline.configuration.interpolation import KEY, Resolver, names_in, near_name, steps_of
from nemo_image.pipeline.configuration.plain_yaml import parse, parse_scalar
from nemo_image.shards import files

logger = logging.getLogger("nemo_image")

MAX_BYTES = 1 << 20
"""Largest file, in bytes."""

PARTS = ("stages", "workflow")
"""Keys of what is built."""

OWN_KEYS = (*PARTS, "name", "description", "documentation")
"""Keys that mean something here, or are for readers; all others are variables of the file."""

_CLUSTER = "choose the cluster by --workers, --scheduler-address or --scheduler-file"

IGNORED = {
    "hydra": "Hydra is not used: overrides are given as key=value",
    "defaults": "no other files are merged",
    "ray_client": f"there is no Ray: {_CLUSTER}",
    "backend": f"pipelines run on Dask: {_CLUSTER}",
    "executor": f"pipelines run on Dask: {_CLUSTER}",
    "executor_config": f"pipelines run on Dask: {_CLUSTER}",
    "execution_mode": "all stages of a file group run in one task",
}
"""Top-level keys of other systems' configurations, and why they are ignored."""


def load_config(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a configuration, with overrides, and put the values in that it refers to.

    Parameters
    ----------
    source : str or path
        A file's path or URL; or, if it has a line break, the YAML itself.
    overrides : sequence of str
        ``key=value`` replaces a value, which may lie deeper: ``stages.2.score_threshold=5.5`` (counted from 0).
        ``+key=value`` adds one, and ``++key=value`` does either. Values are written as in YAML.

    Returns
    -------
    dict
        Plain values: None, bool, int, float, str, list, dict. Keys in `IGNORED` are left as they were.

    Raises
    ------
    ArgumentError
        If the file is no plain YAML or too large, an override names no key, a ``${…}`` is more than a key of the file,
        or mandatory values (``???``) are not given, which are all listed.
    FileNotFoundError
        If there is no such file.
    """
    text, where = _read(source)
    config = parse(text, where)
    if not isinstance(config, dict):
        raise ArgumentError(f"{where} is no mapping: it needs a list 'stages:', or 'workflow:'")
    keys = [_Override(override).carry_out(config) for override in overrides]
    resolver = Resolver(config, IGNORED)
    resolved = resolver.resolve()
    if resolver.missing:
        how = " ".join(f"{path}=…" for path in resolver.missing)
        raise ArgumentError(f"{where} leaves values to you: give {how}")
    _report_unused(config, resolver.used, keys, where)
    return resolved


# The file ------------------------------------------------------------------------------------------------------------


def _read(source: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the text of a configuration, and its name for errors."""
    if isinstance(source, str) and "\n" in source:
        data, where = source.encode(), "the configuration"
    else:
        where = os.fspath(source)
        data = files.read_bytes(where) if "://" in where else _read_local(where)
    if len(data) > MAX_BYTES:
        raise ArgumentError(f"{where} has more than {MAX_BYTES:,} bytes: it is no configuration")
    try:
        return data.decode("utf-8-sig"), where
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{where} is not UTF-8: {error}") from error


def _read_local(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(MAX_BYTES + 1)


# Overrides -----------------------------------------------------------------------------------------------------------


class _Override:
    """``key=value``, ``+key=value`` or ``++key=value``."""

    def __init__(self, text: str) -> None:
        self.text = text
        written, equals, value = text.partition("=")
        self.key = written.lstrip("+")
        self.sign = written[: len(written) - len(self.key)]
        if not equals or self.sign not in ("", "+", "++") or not KEY.fullmatch(self.key):
            raise self._error(
                "it is not key=value, +key=value or ++key=value, with a key such as stages.2.score_threshold"
            )
        self.steps = steps_of(self.key)
        self.value = self._value(value)

    def _value(self, text: str) -> Any:
        if text[:1] + text[-1:] in ("[]", "{}", "''", '""'):
            return parse(text, f"the override {self.text!r}")
        return parse_scalar(text) if text else ""

    def carry_out(self, config: dict[str, Any]) -> str:
        """Change the configuration; return the key."""
        *path, last = self.steps
        if self.steps[0] in IGNORED:
            config.setdefault(self.steps[0], None)
            return self.key
        holder: Any = config
        for number, step in enumerate(path):
            if self.sign and isinstance(holder, dict) and step not in holder:
                holder[step] = {}
            self._require(holder, step, path[:number])
            holder = holder[int(step)] if isinstance(holder, list) else holder[step]
        if not (isinstance(holder, dict) and (self.sign or self._is_checked_later())):
            self._require(holder, last, path)
        if self.sign == "+" and (isinstance(holder, list) or last in holder):
            raise self._error(f"{last!r} is there already; leave out the '+'")
        holder[int(last) if isinstance(holder, list) else last] = self.value
        return self.key

    def _is_checked_later(self) -> bool:
        """Tell whether the key is an argument of a stage, which the stage knows better than the file."""
        if self.key in OWN_KEYS:
            return True
        first_argument = 1 if self.steps[0] == "workflow" and not self.steps[1].isdecimal() else 2
        return self.steps[0] in PARTS and len(self.steps) > first_argument

    def _require(self, holder: Any, step: str, path: Sequence[str]) -> None:
        above = ".".join(path) or "the configuration"
        if isinstance(holder, list):
            if not step.isdecimal() or int(step) >= len(holder):
                raise self._error(f"{above} is a list of {len(holder)}, counted from 0; it has no {step!r}")
        elif not isinstance(holder, dict):
            raise self._error(f"{above} is {holder!r}, there is nothing in it")
        elif step not in holder:
            raise self._error(
                f"there is no key {step!r} in {above}{near_name(step, holder)} (+ before the key adds one; there: "
                f"{', '.join(map(repr, holder)) or 'none'})"
            )

    def _error(self, text: str) -> ArgumentError:
        return ArgumentError(f"the override {self.text!r}: {text}")


def _report_unused(config: Mapping[str, Any], used: set[str], overrides: Sequence[str], where: str) -> None:
    """Tell of variables that change nothing: an override of one is an error."""
    elsewhere = {steps_of(name)[0] for key in IGNORED for name in names_in(str(config.get(key))) if KEY.fullmatch(name)}
    variables = [key for key in config if key not in {*used, *elsewhere, *OWN_KEYS, *IGNORED}]
    for key in overrides:
        if steps_of(key)[0] in variables:
            raise ArgumentError(f"the override of {key!r} changes nothing: no value refers to it")
    # A mapping may be there for its anchor.
    idle = [repr(key) for key in variables if not isinstance(config[key], dict)]
    if idle:
        logger.warning("%s: no value refers to %s", where, ", ".join(idle))
