"""Tokens of operators that users write, also in notebooks.

Dask's own tokens pickle an object with its class; a class that refers to a lock, an open file or a client cannot be
pickled by value, and would then get a new token each time, or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

PLAIN = (str, int, float, bool, bytes, type(None))
DEEPEST = 8


def behaviour_token(operator: Any) -> str:
    """Return a token of an operator: its class, the code that the user wrote for it, and its values.

    Equal for equal operators in every process; another one when a notebook defines the class anew with other code.
    Classes of nemo_image itself count by name, so that a new version of the library does not undo finished work.
    """
    parts = [_class_text(owner) for owner in type(operator).__mro__[:-1]]
    parts.append(_value_text(getattr(operator, "__dict__", {}), 0))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _class_text(owner: type) -> str:
    name = f"{owner.__module__}.{owner.__qualname__}"
    return name if owner.__module__.split(".")[0] == "nemo_image" else f"{name}:{_members_text(owner)}"


def _members_text(owner: type) -> str:
    """Return the code of a class's methods and its plain attributes.

    Bytecode, because `inspect.getsource` finds classes by their name, which a notebook gives to one after the other.
    """
    parts = []
    for name, member in sorted(vars(owner).items()):
        functions = [member.fget, member.fset, member.fdel] if isinstance(member, property) else [member]
        functions = [getattr(one, "__func__", one) for one in functions]
        texts = [_function_text(one, 0) for one in functions if isinstance(one, FunctionType)]
        if texts:
            parts.append(f"{name}={texts}")
        elif isinstance(member, PLAIN) and not name.startswith("__"):
            parts.append(f"{name}={member!r}")
    return ";".join(parts)


def _function_text(function: FunctionType, depth: int) -> str:
    """Return a function's code and what it takes from around it: defaults, closure, and its module's own names."""
    cells = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not assigned yet
            cells[name] = cell.cell_contents
    known = function.__globals__
    names = sorted({name for code in _codes(function.__code__) for name in code.co_names if name in known})
    # Helpers of helpers are looked into, no deeper: they may call each other.
    used = {name: _value_text(known[name], depth + DEEPEST // 2) for name in names if _is_own(known[name], function)}
    # Lists, dictionaries and sets around a function are often its notes, which change as it runs.
    cells = {name: value for name, value in cells.items() if not isinstance(value, list | dict | set)}
    around = (function.__defaults__, function.__kwdefaults__, cells)
    return f"{_code_text(function.__code__)}({_value_text(around, depth + 1)}{used})"


def _is_own(value: Any, user: FunctionType) -> bool:
    """Tell whether a global is a plain value or a function of the same module, and not a library's."""
    if isinstance(value, FunctionType):
        return value.__module__ == user.__module__
    return isinstance(value, (*PLAIN, tuple, frozenset))


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _code_text(code: CodeType) -> str:
    constants = [_code_text(one) if isinstance(one, CodeType) else _value_text(one, 0) for one in code.co_consts]
    return f"{code.co_code.hex()}/{code.co_names}/{constants}"


def _value_text(value: Any, depth: int) -> str:
    if isinstance(value, PLAIN):
        return repr(value)
    if depth > DEEPEST:
        return "…"
    if isinstance(value, dict):
        items = sorted((str(key), _value_text(one, depth + 1)) for key, one in value.items())
        return "{" + ",".join(f"{key}:{one}" for key, one in items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_value_text(one, depth + 1) for one in value) + "]"
    if isinstance(value, set | frozenset):
        return "{" + ",".join(sorted(_value_text(one, depth + 1) for one in value)) + "}"
    if hasattr(value, "__dask_tokenize__") and not isinstance(value, type):
        return repr(value.__dask_tokenize__())
    return _object_text(value, depth)


def _object_text(value: Any, depth: int) -> str:
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, os.PathLike):
        return repr(os.fspath(value))
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if hasattr(value, "tobytes") and hasattr(value, "dtype"):
        return f"{value.dtype}{getattr(value, 'shape', ())}:{hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, FunctionType):
        return _function_text(value, depth)
    # A lock, say, has no values: it counts by its type.
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    return f"<{name} {_value_text(getattr(value, '__dict__', {}), depth + 1)}>"
