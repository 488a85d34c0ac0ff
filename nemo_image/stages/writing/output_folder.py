"""The output folder of a pipeline: whose it is, and which of its files belong to a run.

.. code-block:: text

    <output>/<group>-00000.tar, .idx, .parquet     full tars of a file group
    <output>/packed-00000.tar, …                what groups had left over
    <output>/_nemo_image/pipeline.json             whose output it is
    <output>/_nemo_image/remainders/<group>.*      what a group has left over, until it is packed

A shard is a pipeline's own if its Parquet file's footer says so; of a tar without one, only its name tells.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import posixpath
import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from nemo_image.datasets.footers import each, in_chunks
from nemo_image.engine.ledger import FOLDER
from nemo_image.errors import ArgumentError, DatasetError
from nemo_image.shards import files, parquet, retries
from nemo_image.stages.tasks import FileGroup
from nemo_image.stages.writing.shard_output import REMAINDERS, WRITER, OutputSettings

MANIFEST = f"{FOLDER}/pipeline.json"
PACKED = "packed"
"""What the names of the last step's tars begin with."""

_SUFFIXES = (".tar", ".idx", ".parquet")
# Names that the groups of FilePartitioningStage give, and those of the last step.
_OWN_NAME = re.compile(rf"(.+-[0-9a-f]{{8}}|{PACKED})-[0-9]{{5,}}")


def require_inputs_elsewhere(settings: OutputSettings, groups: Iterable[FileGroup]) -> None:
    """Raise if an input file lies in the output folder.

    Raises
    ------
    ArgumentError
        Naming the first one.
    """
    fs, root = files.open_fs(settings.root, settings.storage_options)
    is_local = isinstance(fs, LocalFileSystem)
    real = functools.lru_cache(os.path.realpath)
    inside = (real(root) if is_local else root).rstrip("/") + "/"
    protocol = settings.root.partition("://")[0]
    for group in groups:
        for url in group.data:
            if is_local:
                if not retries.is_local(url):
                    continue
                folder, _, name = fs._strip_protocol(url).rpartition("/")
                path = f"{real(folder or '/').rstrip('/')}/{name}"
            elif url.partition("://")[0] == protocol:
                path = fs._strip_protocol(url)
            else:
                continue
            if path.startswith(inside):
                raise ArgumentError(f"output_dir {settings.root} holds the input {url}: give another folder")


def earlier_output(settings: OutputSettings, inputs: Collection[str], *, replace: bool) -> frozenset[str]:
    """Return the shards in the output folder that a run is to replace.

    Parameters
    ----------
    inputs : collection of str
        The folders that the input lies in.
    replace : bool
        Whether what another pipeline of nemo_image wrote there may be replaced. Nothing else ever is.

    Raises
    ------
    DatasetError
        If the folder holds anything else.
    """
    said = _read_manifest(settings)
    same = said is not None and said.get("token") == settings.token
    # What a run has no input for is removed at its end: that must not be all that another run has written.
    others = sorted({*(said or {}).get("inputs", ())} - {*inputs}) if same else []
    if same and not others:
        return frozenset()
    names = _list(dataclasses.replace(settings, nested=settings.nested or bool((said or {}).get("nested"))))
    owners = _owners(settings, names)
    orphans = {shard for shard in _without_rows(names) if said is not None and _OWN_NAME.fullmatch(shard)}
    own = {shard for shard, owner in owners.items() if owner is not None} | orphans
    foreign = [name for name in names if _stem(name) not in own and not name.endswith(".idx")]
    if foreign:
        raise DatasetError(
            f"{settings.root} holds another dataset ({foreign[0]}, …): give an empty folder (replace=True replaces "
            "only what a pipeline of nemo_image has written)"
        )
    if {*owners.values()} <= {settings.token} and not orphans and not (others and own):
        return frozenset()  # empty, or only the manifest was lost
    if not replace:
        what = (
            f"this pipeline for other input ({others[0]}" if others else "another pipeline (other stages or arguments"
        )
        raise DatasetError(
            f"{settings.root} holds the output of {what}; {names[0]}, …): give an empty folder, or replace=True to put "
            "this one in its place"
        )
    return frozenset(own)


def claim(settings: OutputSettings, inputs: Collection[str], replaced: Collection[str]) -> None:
    """Make the output folder that of this pipeline and its input, without the earlier shards in `replaced`."""
    if replaced:
        # A run that is killed here leaves an output of no pipeline, which none takes for its own.
        _write_manifest(settings, "", ())
        _remove(settings, replaced)
        remove_remainders(settings)
    _write_manifest(settings, settings.token, inputs)
    sweep(settings)


def remove_leftovers(settings: OutputSettings, shards: Collection[str], groups: Collection[str]) -> list[str]:
    """Remove shards that the pipeline wrote in earlier runs or for groups that failed; return their names.

    Parameters
    ----------
    shards : collection of str
        The run's output, which stays.
    groups : collection of str
        Names of groups that the run knows.
    """
    names = [name for name in _list(settings) if _stem(name) not in shards]
    old = {shard for shard, owner in _owners(settings, names).items() if owner == settings.token}
    for shard in _without_rows(names):
        if _OWN_NAME.fullmatch(shard) or shard.rpartition("-")[0] in groups:
            old.add(shard)
    _remove(settings, old)
    return sorted(old)


def remove_remainders(settings: OutputSettings, keep: Collection[str] = ()) -> None:
    """Remove what groups have left over, but for the groups in `keep`."""
    folder = settings.url(REMAINDERS)
    if not files.exists(folder, settings.storage_options):
        return
    if not keep:
        _delete(settings, REMAINDERS, recursive=True)
        return
    for suffix in (".tar", ".parquet"):
        for name in files.list_files(folder, suffix, settings.storage_options):
            if _stem(name) not in keep:
                _delete(settings, f"{REMAINDERS}/{name}")


def sweep(settings: OutputSettings) -> None:
    """Remove what killed writers left under temporary names."""
    folders = {"", FOLDER, REMAINDERS}
    if settings.nested:
        folders |= {posixpath.dirname(name) for name in _list(settings)}
    files.sweep_temporaries(settings.root, storage_options=settings.storage_options, folders=sorted(folders))


def move(settings: OutputSettings, name: str, new_name: str) -> None:
    """Move a finished file within the output folder."""
    source, target = settings.url(name), settings.url(new_name)
    fs, old = files.open_fs(source, settings.storage_options)
    _, new = files.open_fs(target, settings.storage_options)
    if isinstance(fs, AsyncFileSystem):
        # Object stores: copied there, without the data passing through this machine.
        retries.call(target, lambda: fs.cp_file(old, new))
        _delete(settings, name)
        return
    fs.makedirs(new.rpartition("/")[0], exist_ok=True)
    if isinstance(fs, LocalFileSystem):
        os.replace(old, new)
    else:
        fs.mv(old, new)


def _delete(settings: OutputSettings, name: str, *, recursive: bool = False) -> None:
    """Remove something in the output folder that may be gone already."""
    fs, path = files.open_fs(settings.url(name), settings.storage_options)
    with suppress(FileNotFoundError):
        retries.call(settings.url(name), lambda: fs.rm(path, recursive=True) if recursive else fs.rm_file(path))


def _list(settings: OutputSettings) -> list[str]:
    """Return the names of the shards' files in the output folder, none where there is no folder."""
    if settings.nested:
        fs, root = files.open_fs(settings.root, settings.storage_options)
        paths = retries.call(settings.root, lambda: fs.find(root))
        below = (str(path).removeprefix(root.rstrip("/") + "/") for path in paths)
        return sorted(name for name in below if name.endswith(_SUFFIXES) and not _is_hidden(name))
    try:
        lists = [files.list_files(settings.root, suffix, settings.storage_options) for suffix in _SUFFIXES]
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        raise DatasetError(str(error)) from error
    return sorted(name for names in lists for name in names)


def _is_hidden(name: str) -> bool:
    return any(part == FOLDER or part.startswith(".") for part in name.split("/"))


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _without_rows(names: Sequence[str]) -> set[str]:
    """Return the shards that have a tar or an index, but no Parquet file."""
    stems = {suffix: {_stem(name) for name in names if name.endswith(suffix)} for suffix in _SUFFIXES}
    return (stems[".tar"] | stems[".idx"]) - stems[".parquet"]


def _owners(settings: OutputSettings, names: Sequence[str]) -> dict[str, str | None]:
    """Return, for each Parquet file among names, the token of the pipeline that wrote it; None for a foreign one."""
    shards = [_stem(name) for name in names if name.endswith(".parquet")]
    work = _ReadOwners(settings)
    found: dict[str, str | None] = {}
    for part in in_chunks(work, shards, settings.root, settings.storage_options):
        found |= part
    return found


def _remove(settings: OutputSettings, shards: Collection[str]) -> None:
    for _ in in_chunks(_RemoveShards(settings), sorted(shards), settings.root, settings.storage_options):
        pass


@dataclass(frozen=True)
class _ReadOwners:
    """Reads the footers of some shards."""

    settings: OutputSettings
    task_name = "nemo-image-footers"

    def __call__(self, shards: Sequence[str]) -> dict[str, str | None]:
        owners = each(self._owner, shards, self.settings.root, self.settings.storage_options)
        return dict(zip(shards, owners, strict=True))

    def _owner(self, shard: str) -> str | None:
        summary = parquet.summary_or_none(self.settings.url(f"{shard}.parquet"), self.settings.storage_options)
        footer = None if summary is None else summary.footer
        return footer.plan or "" if footer is not None and footer.record.get("writer") == WRITER else None


@dataclass(frozen=True)
class _RemoveShards:
    """Removes some shards' files; the Parquet file, which says whose they are, last."""

    settings: OutputSettings
    task_name = "nemo-image-remove"

    def __call__(self, shards: Sequence[str]) -> None:
        each(self._remove, shards, self.settings.root, self.settings.storage_options)

    def _remove(self, shard: str) -> None:
        for suffix in _SUFFIXES:
            _delete(self.settings, shard + suffix)


def _read_manifest(settings: OutputSettings) -> dict[str, Any] | None:
    try:
        return dict(json.loads(files.read_bytes(settings.url(MANIFEST), settings.storage_options)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError):
        return {}


def _write_manifest(settings: OutputSettings, token: str, inputs: Collection[str]) -> None:
    values = {"token": token, "nested": settings.nested, "inputs": sorted(inputs)}
    with files.atomic_writer(settings.url(MANIFEST), settings.storage_options) as out:
        out.write(json.dumps(values, sort_keys=True).encode() + b"\n")
