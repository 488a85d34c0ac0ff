"""Find the shards that a path means, and pair tars with Parquet files by name."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_image.errors import ArgumentError, DatasetError
from nemo_image.shards import files

StorageOptions = Mapping[str, Any] | None

NAMED_AT_MOST = 5


@dataclass(frozen=True)
class Found:
    """Shards found below one root.

    Attributes
    ----------
    root : str
        The folder that shard names are relative to.
    shards : list of str
        Names without ``.tar``, sorted.
    without_parquet, without_tar : list of str
        Names that lack their partner.
    """

    root: str
    shards: list[str]
    without_parquet: list[str]
    without_tar: list[str]


def discover(path: str | os.PathLike[str] | Sequence[str], storage_options: StorageOptions = None) -> Found:
    """List the shards of a folder, a glob, a brace pattern or a list of tars.

    Parameters
    ----------
    path : str, path or sequence of str
        ``"/data/set"``, ``"s3://bucket/set/*.tar"``, ``"/data/set/{00000..00099}.tar"``, or tar files by name. A folder
        or a tar whose own name looks like a pattern is that folder or tar.

    Raises
    ------
    ArgumentError
        If `path` is empty or names something else than tars.
    DatasetError
        If there is no such folder, or no tar in it.
    """
    if isinstance(path, str | os.PathLike):
        text = os.fspath(path)
        if not text:
            raise ArgumentError("path is empty: give a folder of tars, a glob, a brace pattern or a list of tars")
        if not is_literal(text, storage_options):
            return _from_tars(_expand(text, storage_options), text, storage_options)
        if not text.endswith(".tar"):
            return _from_folder(text.rstrip("/") or "/", storage_options)
        return _from_tars([text], text, storage_options)
    tars = [os.fspath(one) for one in path]
    if not tars:
        raise ArgumentError("path is an empty list: name at least one tar")
    return _from_tars(tars, f"a list of {len(tars)} files", storage_options)


def is_literal(path: str, storage_options: StorageOptions = None) -> bool:
    """Tell whether a path is no glob and no brace pattern, or looks like one and is there."""
    if not any(char in path for char in "{*?["):
        return True
    if path.endswith(".tar"):
        return "://" not in path and os.path.exists(path)
    return not path.startswith(("http://", "https://")) and files.is_folder(path, storage_options)


def _from_folder(root: str, storage_options: StorageOptions) -> Found:
    is_web = root.startswith(("http://", "https://"))
    try:
        if not files.exists(root, storage_options):
            raise DatasetError(f"{root}: no such folder")
        if not files.is_folder(root, storage_options) and not is_web:
            raise DatasetError(
                f"{root} is a file that does not end in .tar: give a folder of tars, or tar files by name"
            )
    except PermissionError as error:
        if not is_web:
            raise
        raise DatasetError(_no_listing(root)) from error
    tars = {name.removesuffix(".tar") for name in files.list_files(root, ".tar", storage_options)}
    parquets = {name.removesuffix(".parquet") for name in files.list_files(root, ".parquet", storage_options)}
    if not tars:
        raise DatasetError(_no_listing(root) if is_web and not parquets else _no_tars(root, parquets, storage_options))
    return Found(root, sorted(tars), sorted(tars - parquets), sorted(parquets - tars))


def _no_listing(root: str) -> str:
    return (
        f"{root}: the web server lists no tars there: name them, as {root}/{{00000..00099}}.tar, or as a list "
        "(if no tar has a Parquet file beside it, the metadata is built from the tars)"
    )


def _no_tars(root: str, parquets: set[str], storage_options: StorageOptions) -> str:
    compressed = files.list_files(root, ".tar.gz", storage_options) or files.list_files(root, ".tgz", storage_options)
    if compressed:
        return (
            f"{root} holds compressed tars ({compressed[0]}, …), which cannot be read by index: decompress them first"
        )
    if parquets:
        return (
            f"{root} holds Parquet files ({sorted(parquets)[0]}.parquet, …) but no tar: give the folder with the tars"
        )
    return f"{root} holds no .tar file: give the folder that directly holds the shards"


def _expand(pattern: str, storage_options: StorageOptions) -> list[str]:
    from braceexpand import braceexpand

    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise ArgumentError(f"path {pattern!r}: {error}") from error
    tars: list[str] = []
    for name in names:
        if any(char in name for char in "*?["):
            tars += [one for one in files.glob(name, storage_options) if one.endswith(".tar")]
        else:
            tars.append(name)
    if not tars:
        raise DatasetError(f"no .tar file matches {pattern!r}")
    return tars


def _from_tars(tars: Sequence[str], said: str, storage_options: StorageOptions) -> Found:
    wrong = [name for name in tars if not name.endswith(".tar")]
    if wrong:
        raise ArgumentError(f"path names {wrong[0]!r}, which does not end in .tar")
    repeated = sorted({name for name in tars if tars.count(name) > 1}) if len(set(tars)) < len(tars) else []
    if repeated:
        raise ArgumentError(f"path names {repeated[0]!r} more than once")
    root = _common_root(tars)
    shards = sorted(posixpath.relpath(name, root).removesuffix(".tar") for name in tars)
    present = _names_below(root, shards, storage_options)
    if present is None:
        return Found(root, shards, [], [])
    missing = [shard for shard in shards if shard + ".tar" not in present]
    if missing:
        raise DatasetError(f"{said}: no such tar: {_some([files.join(root, shard + '.tar') for shard in missing])}")
    return Found(root, shards, [shard for shard in shards if shard + ".parquet" not in present], [])


def _common_root(tars: Sequence[str]) -> str:
    parents = [posixpath.dirname(name) for name in tars]
    first = parents[0]
    if all(parent == first for parent in parents):
        return first or "."
    protocols = {name.split("://")[0] if "://" in name else "" for name in tars}
    if len(protocols) > 1:
        raise ArgumentError(f"path mixes storage systems: {', '.join(sorted(protocols))}")
    protocol = protocols.pop()
    bare = [parent.split("://", 1)[-1] for parent in parents]
    common = posixpath.commonpath(bare)
    return f"{protocol}://{common}" if protocol else common or "."


def _names_below(root: str, shards: Sequence[str], storage_options: StorageOptions) -> set[str] | None:
    """List the folders that the shards lie in; None where the file system cannot list (plain HTTP)."""
    if root.startswith(("http://", "https://")):
        return None
    names: set[str] = set()
    for folder in sorted({posixpath.dirname(shard) for shard in shards}):
        for suffix in (".tar", ".parquet"):
            try:
                listed = files.list_files(files.join(root, folder) if folder else root, suffix, storage_options)
            except FileNotFoundError:
                continue
            names |= {posixpath.join(folder, name) for name in listed}
    return names


def require_partners(found: Found) -> None:
    """Raise if a tar or a Parquet file lacks its partner.

    Raises
    ------
    DatasetError
        With the names of the first few.
    """
    if found.without_tar:
        names = _some([shard + ".parquet" for shard in found.without_tar])
        raise DatasetError(f"{found.root}: Parquet without its tar: {names}. Bring the tars, or move these files away")
    if found.without_parquet:
        names = _some([shard + ".tar" for shard in found.without_parquet])
        raise DatasetError(
            f"{found.root}: tar without its Parquet: {names}. Bring the Parquet files, or move these tars away "
            "(if no tar had one, the metadata would be built from the tars)"
        )


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMED_AT_MOST
    return ", ".join(names[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
