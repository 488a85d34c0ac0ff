"""The class that a configuration's ``_target_`` names: one of ours, or of a package that the caller allows."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from nemo_image.errors import ArgumentError, NemoImageError, one_line

OURS = "nemo_image"

_PART = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
"""A part of a dotted name: nothing private, and no ``__globals__``."""


def check_prefixes(allowed: Sequence[str]) -> tuple[str, ...]:
    """Return the allowed packages and modules.

    Raises
    ------
    ArgumentError
        If one is no dotted name.
    """
    if isinstance(allowed, str):
        raise ArgumentError(f"allowed must be a list of packages or modules: [{allowed!r}]")
    for prefix in allowed:
        if not isinstance(prefix, str) or not all(_PART.fullmatch(part) for part in prefix.split(".")):
            raise ArgumentError(f"allowed: {prefix!r} is not the name of a package or module, such as my_filters")
    return tuple(dict.fromkeys(allowed))


def find_class(target: Any, allowed: Sequence[str]) -> type:
    """Return the class that a dotted name means.

    Only modules inside an allowed package are imported, every step after them is a class, and the class found is one
    that was defined inside an allowed package, not merely imported there.

    Parameters
    ----------
    target : str
        ``package.module.Class``; package and module as one imports them.
    allowed : sequence of str
        Packages or modules; the name must begin with one of them and a dot.

    Raises
    ------
    ArgumentError
        If it does not, or there is no such class.
    """
    if not isinstance(target, str):
        raise ArgumentError(f"_target_ must be a class's dotted name, not {target!r}")
    parts = target.split(".")
    if not all(_PART.fullmatch(part) for part in parts):
        raise ArgumentError(f"_target_ {target!r} is not the dotted name of a public class")
    inside = [prefix for prefix in allowed if target.startswith(prefix + ".")]
    if not inside:
        top = parts[0]
        raise ArgumentError(
            f"_target_ {target!r} lies in none of the allowed packages ({', '.join(allowed) or 'there are none'}): a "
            f"configuration may name classes of these only. If {top!r} is yours, allow it: --allow {top}, or "
            f"allowed=[{OURS!r}, {top!r}] in Python"
        )
    prefix = max(inside, key=len)
    module, rest = _import(prefix, parts[prefix.count(".") + 1 :])
    return _class_in(module, rest, target, allowed)


def import_module(name: str) -> ModuleType:
    """Import a module; what goes wrong in it is an error of the argument that names it.

    Raises
    ------
    ArgumentError
        Unless it is an error of this library.
    """
    try:
        return importlib.import_module(name)
    except NemoImageError:
        raise
    except Exception as error:
        raise ArgumentError(f"{name} cannot be imported: {one_line(error)}") from error


def is_inside(name: str, allowed: Sequence[str]) -> bool:
    """Tell whether a module is one of the allowed packages, or in one."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)


def _import(prefix: str, parts: Sequence[str]) -> tuple[ModuleType, list[str]]:
    """Import the prefix and the modules below it; return the last one, and the parts that are no modules."""
    name, rest = prefix, list(parts)
    module = import_module(name)
    while rest and hasattr(module, "__path__") and _is_module(f"{name}.{rest[0]}"):
        name = f"{name}.{rest.pop(0)}"
        module = import_module(name)
    return module, rest


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module that says nothing of itself
        return True


def _class_in(module: ModuleType, names: Sequence[str], target: str, allowed: Sequence[str]) -> type:
    if not names:
        raise ArgumentError(f"_target_ {target!r} is a module, not a class")
    found: Any = module
    for name in names:
        holder = found
        found = vars(holder).get(name) if isinstance(holder, type) else getattr(holder, name, None)
        if found is None:
            raise ArgumentError(f"_target_ {target!r}: there is no {name!r} in {holder.__name__}")
        if not isinstance(found, type):
            raise ArgumentError(f"_target_ {target!r}: {name!r} is a {type(found).__name__}, not a class")
        if not is_inside(found.__module__, allowed):
            raise ArgumentError(
                f"_target_ {target!r}: {name!r} comes from {found.__module__}, which is not in an allowed package "
                f"({', '.join(allowed)})"
            )
    assert isinstance(found, type)
    return found
