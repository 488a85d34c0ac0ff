"""``${key}`` in a configuration: the value that stands at that key, and nothing else.

Libraries for configurations offer resolvers such as ``${oc.env:HOME}``, registered for the whole process, and expand
references without bound; there is none of that here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from nemo_image.errors import ArgumentError
from nemo_image.pipeline.configuration.plain_yaml import Size

MISSING = "???"
"""A value that the file leaves to the caller."""

TARGET = "_target_"
"""The key that names a class."""

KEY = re.compile(r"[A-Za-z_][\w-]*(?:\.[\w-]+|\[\d+\])*")
"""A place in a configuration: ``stages.2.score_threshold`` or ``stages[2].score_threshold``."""

_INTERPOLATION = re.compile(r"\$\{([^{}]*)\}")


def steps_of(key: str) -> list[str]:
    """Return the steps of a key that `KEY` matches."""
    return re.findall(r"[^.\[\]]+", key)


def names_in(text: str) -> list[str]:
    """Return what stands in the ``${…}`` of a text."""
    return [name.strip() for name in _INTERPOLATION.findall(text)]


def near_name(name: str, known: Iterable[str]) -> str:
    """Return words that propose the known name most like an unknown one; none if none is."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


class Resolver:
    """Puts into a configuration what it refers to.

    Parameters
    ----------
    config : mapping
    left : mapping of str to str
        Top-level keys that are left as they are and cannot be referred to, and why.

    Attributes
    ----------
    missing : list of str
        Mandatory values (``???``) that were not given.
    used : set of str
        Top-level keys that something refers to.
    """

    def __init__(self, config: Mapping[str, Any], left: Mapping[str, str]) -> None:
        self.config = config
        self.left = left
        self.missing: list[str] = []
        self.used: set[str] = set()
        self.size = Size("the configuration")

    def resolve(self) -> dict[str, Any]:
        """Return the configuration with everything put in.

        Raises
        ------
        ArgumentError
            If a ``${…}`` is not a key of it, leads back to itself, or there is too much to put in.
        """
        return {
            key: value if key in self.left else self._value(value, (key,), (), 0) for key, value in self.config.items()
        }

    def _value(self, value: Any, path: tuple[str, ...], active: tuple[str, ...], depth: int) -> Any:
        """Return a value with everything in it put in; `active` are the references being followed."""
        self.size.add(depth, len(value) if isinstance(value, str) else 0)
        if isinstance(value, dict):
            return {key: self._value(one, (*path, key), active, depth + 1) for key, one in value.items()}
        if isinstance(value, list):
            return [self._value(one, (*path, str(place)), active, depth + 1) for place, one in enumerate(value)]
        if not isinstance(value, str):
            return value
        if value == MISSING:
            if ".".join(path) not in self.missing:
                self.missing.append(".".join(path))
            return value
        return self._text(value, path, active, depth) if "${" in value else value

    def _text(self, text: str, path: tuple[str, ...], active: tuple[str, ...], depth: int) -> Any:
        place = ".".join(path)
        if path[-1] == TARGET:
            raise ArgumentError(f"{place}: {text!r}: a target is written out, not put together")
        names = names_in(text)
        if not all(KEY.fullmatch(name) for name in names) or "${" in _INTERPOLATION.sub("", text):
            raise ArgumentError(
                f"{place}: {text!r}: only keys of this configuration may stand in ${{…}}, as in ${{input_path}}; there "
                "are no resolvers such as oc.env"
            )
        found = [self._reference(name, place, active, depth) for name in names]
        if _INTERPOLATION.fullmatch(text):
            return found[0]
        for name, one in zip(names, found, strict=True):
            if one is None or isinstance(one, dict | list):
                kind = {dict: "a mapping", list: "a list", type(None): "null"}[type(one)]
                raise ArgumentError(f"{place}: {text!r}: {name!r} is {kind}, which does not fit into text")
        values = iter(found)
        put = _INTERPOLATION.sub(lambda match: _as_text(next(values)), text)
        self.size.add(depth, len(put))
        return put

    def _reference(self, name: str, place: str, active: tuple[str, ...], depth: int) -> Any:
        steps = tuple(steps_of(name))
        key = ".".join(steps)
        if key in active:
            raise ArgumentError(f"{place}: ${{{name}}} leads back to itself: {' -> '.join((*active, key))}")
        if steps[0] in self.left:
            raise ArgumentError(f"{place}: ${{{name}}}: {steps[0]!r} is ignored ({self.left[steps[0]]})")
        self.used.add(steps[0])
        value: Any = self.config
        for number, step in enumerate(steps):
            if isinstance(value, str) and "${" in value:
                value = self._value(value, steps[:number], (*active, key), depth + 1)
            if isinstance(value, Mapping) and step in value:
                value = value[step]
            elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
                value = value[int(step)]
            else:
                near = near_name(step, value) if isinstance(value, Mapping) else ""
                raise ArgumentError(f"{place}: ${{{name}}}: there is no {step!r} in the configuration{near}")
        return self._value(value, steps, (*active, key), depth + 1)


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
