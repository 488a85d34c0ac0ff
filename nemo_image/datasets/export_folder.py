"""The output folder of an export: whose it is, and what an earlier export left there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nemo_image.engine.ledger import FOLDER
from nemo_image.errors import DatasetError
from nemo_image.export.write import ExportSettings
from nemo_image.shards import files

MANIFEST = "export.json"


def require_free(target: str, options: Mapping[str, Any]) -> None:
    """Refuse a folder that holds something other than an export, and a file.

    Raises
    ------
    DatasetError
        Saying what is there.
    """
    if _read_manifest(target, options) is not None or not files.exists(target, options):
        return
    if not files.is_folder(target, options):
        raise DatasetError(f"{target} is a file: give a folder for the new dataset")
    there = [name for suffix in (".tar", ".parquet") for name in files.list_files(target, suffix, options)]
    if there:
        raise DatasetError(f"{target} holds another dataset ({there[0]}, …): give an empty folder")


def take_over(settings: ExportSettings, tar_root: str, replace: bool) -> None:
    """Make the output folder this export's own, whatever an earlier run of it left there."""
    target, storage_options = settings.root, settings.storage_options
    before = _read_manifest(target, storage_options)
    if before is not None and before.get("token") != settings.token:
        if not replace and not before:
            raise DatasetError(
                f"{target}/{FOLDER}/{MANIFEST} is garbled, so that nobody knows whose export this is: give an empty "
                "folder, or replace=True (--replace) to write this one in its place"
            )
        if not replace:
            raise DatasetError(
                f"{target} holds another export (of other rows, values or settings): give an empty folder, or "
                "replace=True (--replace) to put this one in its place"
            )
        # The manifest goes first: a run that is killed here leaves an export of no token, which none takes for its own.
        _write_manifest(target, {"token": "", "source": tar_root}, storage_options)
        _remove_shards(target, storage_options)
    files.sweep_temporaries(target, storage_options=storage_options, folders=("", FOLDER))
    _write_manifest(target, {"token": settings.token, "source": tar_root}, storage_options)


def _remove_shards(target: str, storage_options: Mapping[str, Any]) -> None:
    """Remove the shards of an export; only those, by the names that exports give."""
    for suffix in (".parquet", ".idx", ".tar"):
        for name in files.list_files(target, suffix, storage_options):
            if name.removesuffix(suffix).isdecimal():
                fs, path = files.open_fs(files.join(target, name), storage_options)
                fs.rm_file(path)


def _read_manifest(target: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        return dict(json.loads(files.read_bytes(files.join(target, FOLDER, MANIFEST), options)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}


def _write_manifest(target: str, values: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    with files.atomic_writer(files.join(target, FOLDER, MANIFEST), options) as out:
        out.write(json.dumps(values, indent=1, sort_keys=True).encode() + b"\n")
