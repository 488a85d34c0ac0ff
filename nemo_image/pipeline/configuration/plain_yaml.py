"""YAML as plain values: no tags, no objects, and no more values than a configuration needs.

Values are made of YAML's nodes here, so that their number is bounded: a few lines of aliases can stand for more than
memory holds.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from nemo_image.errors import ArgumentError

MAX_VALUES = 100_000
"""The most values, aliases and interpolations expanded."""

MAX_CHARACTERS = 1 << 22
"""The most characters of all text, aliases and interpolations expanded."""

MAX_DEPTH = 50
"""The deepest nesting of lists and mappings, and of references to references."""

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    _TAG + kind: getattr(yaml.SafeLoader, f"construct_yaml_{kind}") for kind in ("null", "bool", "int", "float", "str")
}
_MAP, _LIST, _MERGE, _TEXT, _TIME = (_TAG + kind for kind in ("map", "seq", "merge", "str", "timestamp"))

_EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+")
"""Numbers that YAML 1.1 takes for text."""


class Size:
    """Counts values and characters, and stops at what no configuration needs."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.values = 0
        self.characters = 0

    def add(self, depth: int, characters: int = 0) -> None:
        """Count a value.

        Raises
        ------
        ArgumentError
            If there are too many of something.
        """
        self.values += 1
        self.characters += characters
        for count, most, what in (
            (self.values, MAX_VALUES, "values"),
            (self.characters, MAX_CHARACTERS, "characters"),
            (depth, MAX_DEPTH, "levels"),
        ):
            if count > most:
                raise ArgumentError(f"{self.where}: with aliases and references it has more than {most:,} {what}")


def parse(text: str, where: str) -> Any:
    """Return what YAML says: None, bool, int, float, str, list, dict.

    Numbers are as in YAML 1.1, but that ``1e-3`` is one; dates are text; keys are text, and each is there once.

    Parameters
    ----------
    text : str
    where : str
        Begins the errors' messages.

    Raises
    ------
    ArgumentError
        If it is no YAML, has tags, or is too large.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        return None if node is None else _Plain(loader, where).value(node, 0)
    except ArgumentError:
        raise
    except RecursionError as error:
        raise ArgumentError(f"{where} is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ArgumentError(f"{where} is no plain YAML: {' '.join(str(error).split())}") from error


def parse_scalar(text: str) -> Any:
    """Return what YAML takes a single unquoted value for, whatever marks are in it: ``a: b`` and ``#1`` are text."""
    loader: Any = yaml.SafeLoader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    try:
        return _scalar(loader, yaml.ScalarNode(tag, text)) if tag in _SCALARS else text
    except ValueError:
        return text


def _scalar(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    if node.tag in (_TEXT, _TIME):
        return float(node.value) if node.style is None and _EXPONENT.fullmatch(node.value) else node.value
    return _SCALARS[node.tag](loader, node)


class _Plain:
    """Makes plain values of nodes; an alias is the same node again."""

    def __init__(self, loader: yaml.SafeLoader, where: str) -> None:
        self.loader = loader
        self.where = where
        self.size = Size(where)

    def value(self, node: yaml.Node, depth: int) -> Any:
        self.size.add(depth, len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        if isinstance(node, yaml.ScalarNode) and (node.tag in _SCALARS or node.tag == _TIME):
            return _scalar(self.loader, node)
        if isinstance(node, yaml.SequenceNode) and node.tag == _LIST:
            return [self.value(one, depth + 1) for one in node.value]
        if isinstance(node, yaml.MappingNode) and node.tag == _MAP:
            return self._mapping(node, depth)
        raise self._error(node, f"{node.tag.removeprefix(_TAG)!r} is not a plain value")

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                for one in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    if not isinstance(one, yaml.MappingNode):
                        raise self._error(key_node, "'<<' takes mappings")
                    # The first of several counts.
                    merged = self.value(one, depth + 1) | merged
                continue
            key = self.value(key_node, depth) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                name = f"the key {key_node.value!r}" if isinstance(key_node, yaml.ScalarNode) else "a key"
                raise self._error(key_node, f"{name} is no text: put it in quotes")
            if key in own:
                raise self._error(key_node, f"the key {key!r} is there twice")
            own[key] = self.value(value_node, depth + 1)
        return merged | own

    def _error(self, node: yaml.Node, text: str) -> ArgumentError:
        return ArgumentError(f"{self.where}, line {node.start_mark.line + 1}: {text}")
