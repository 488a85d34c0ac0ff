"""Users' own modules with stages: found beside the configuration, and sent to workers that do not have them."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

import cloudpickle

from nemo_image.errors import ArgumentError, one_line
from nemo_image.pipeline.configuration.targets import check_prefixes, import_module

logger = logging.getLogger("nemo_image")


def import_own(prefix: str, folders: Sequence[Path]) -> str:
    """Import a user's package or module, and say which it is.

    One that is installed goes first: workers must have it too. Else it is ``<prefix>.py``, or the folder of a package,
    in one of the folders; its classes then travel to the workers with the stages. Nothing else is imported from there.

    Parameters
    ----------
    prefix : str
        A dotted name.
    folders : sequence of path
        Where to look, in order.

    Returns
    -------
    str
        The file that was imported.

    Raises
    ------
    ArgumentError
        If there is no such module, or it cannot be imported.
    """
    check_prefixes([prefix])
    top = prefix.partition(".")[0]
    own = [folder.resolve() for folder in folders]
    if not _is_known(top):
        _import_file(top, own)
    module = import_module(prefix)
    path = _file_of(top)
    if path is not None and _lies_in(path, own):
        cloudpickle.register_pickle_by_value(sys.modules[top])
    where = str(getattr(module, "__file__", None) or path)
    logger.info("stages of %s come from %s", prefix, where)
    return where


def _is_known(top: str) -> bool:
    try:
        return top in sys.modules or importlib.util.find_spec(top) is not None
    except ValueError:
        return True


def _import_file(top: str, folders: Sequence[Path]) -> None:
    found = [path for folder in folders for path in (folder / f"{top}.py", folder / top / "__init__.py")]
    files = [path for path in found if path.is_file()]
    if not files:
        looked = ", ".join(dict.fromkeys(str(folder) for folder in folders))
        raise ArgumentError(f"--allow {top}: it is not installed, and there is no {top}.py in {looked}")
    path = files[0]
    package = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(top, path, submodule_search_locations=package)
    assert isinstance(spec, ModuleSpec)
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[top] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[top]
        raise ArgumentError(f"--allow {top}: {path} cannot be imported: {one_line(error)}") from error


def _file_of(top: str) -> Path | None:
    path = getattr(sys.modules[top], "__file__", None)
    return None if path is None else Path(path).resolve()


def _lies_in(path: Path, folders: Sequence[Path]) -> bool:
    """Tell whether a module's file, or its package's folder, lies directly in one of the folders."""
    home = path.parent.parent if path.name == "__init__.py" else path.parent
    return home in folders
