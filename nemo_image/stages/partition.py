"""The first stage of a pipeline: finds the input's files, and groups them."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dask.utils import parse_bytes

from nemo_image.engine.ledger import FOLDER
from nemo_image.errors import ArgumentError, DatasetError
from nemo_image.shards import files
from nemo_image.stages.base import Fields, ProcessingStage, Resources
from nemo_image.stages.tasks import EmptyTask, FileGroup

_STEM = 60  # characters of a group's name that come from its first file


@dataclass
class FilePartitioningStage(ProcessingStage[EmptyTask, FileGroup]):
    """Finds files, and gives them on in groups; one group is one task of the run.

    Works on the client: only names are listed.

    Parameters
    ----------
    file_paths : str or list of str
        A folder (searched to any depth), a file, a glob, or a brace pattern (``{00000..00099}.tar``), on any file
        system that fsspec knows; or a list of such.
    files_per_partition : int, optional
        Files of a group; 1 by default.
    blocksize : int or str, optional
        In place of that, the size of a group in bytes at most (``"2GiB"``); a larger file is a group of its own.
    file_extensions : list of str, optional
        Files to take from folders; ``[".tar"]`` by default.
    storage_options : dict, optional
        For fsspec.
    limit : int, optional
        Groups at most.

    Raises
    ------
    ArgumentError
        If an argument is out of range.
    """

    file_paths: str | list[str]
    files_per_partition: int | None = None
    blocksize: int | str | None = None
    file_extensions: list[str] | None = None
    storage_options: dict[str, Any] | None = None
    limit: int | None = None
    name: str = "file_partitioning"

    def __post_init__(self) -> None:
        given: Any = self.file_paths
        several = given if isinstance(given, list | tuple) else [given]
        if not several or not all(isinstance(one, str | os.PathLike) and os.fspath(one) for one in several):
            raise ArgumentError(f"file_paths must be a path or a list of paths, not {given!r}")
        # Absolute, because workers may have another working folder.
        paths = [files.absolute(one) for one in several]
        self.file_paths = paths if isinstance(given, list | tuple) else paths[0]
        for name in ("files_per_partition", "limit"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ArgumentError(f"{name} must be a whole number, at least 1, not {value!r}")
        if self.files_per_partition is not None and self.blocksize is not None:
            raise ArgumentError("give files_per_partition or blocksize, not both")
        self._bytes = _as_bytes(self.blocksize)
        if isinstance(self.file_extensions, str):
            raise ArgumentError(f"file_extensions must be a list: [{self.file_extensions!r}]")
        self._suffixes = tuple("." + one.lstrip(".").lower() for one in self.file_extensions or [".tar"])
        self.resources = Resources(cpus=0.5)

    def outputs(self) -> Fields:
        """Return what the stage adds."""
        return ["data"], []

    def process(self, task: EmptyTask) -> list[FileGroup]:
        """Return the groups, in the order of the files' names.

        Raises
        ------
        DatasetError
            If there is no such file, or none with the extensions.
        """
        given = [self.file_paths] if isinstance(self.file_paths, str) else self.file_paths
        found = sorted(dict.fromkeys(url for one in given for url in self._find(one)))
        if not found:
            raise DatasetError(f"{', '.join(given)}: no file that ends in {' or '.join(self._suffixes)}")
        root = self._root(given, found)
        groups = []
        for index, urls in enumerate(self._grouped(found)):
            if self.limit is not None and index >= self.limit:
                break
            groups.append(
                FileGroup(
                    data=urls,
                    task_id=f"file_group_{index}",
                    dataset_name=posixpath.basename(root.rstrip("/")) or "dataset",
                    name=_group_name(urls, root),
                    index=index,
                    root=root,
                    storage_options=dict(self.storage_options or {}),
                )
            )
        return groups

    def _find(self, path: str) -> list[str]:
        if any(char in path for char in "{*?["):
            return self._expand(path)
        fs, inside = files.open_fs(path, self.storage_options)
        if path.lower().endswith(self._suffixes) and not files.is_folder(path, self.storage_options):
            if not files.exists(path, self.storage_options):
                raise DatasetError(f"{path}: no such file")
            return [path]
        if not files.exists(path, self.storage_options):
            raise DatasetError(f"{path}: no such folder")
        if not files.is_folder(path, self.storage_options):
            raise DatasetError(f"{path} does not end in {' or '.join(self._suffixes)}: give file_extensions")
        start = inside.rstrip("/") + "/"
        below = [name.removeprefix(start) for name in fs.find(inside)]
        # Our own records are no input.
        names = [name for name in below if self._is_input(name) and f"/{FOLDER}/" not in f"/{name}"]
        return [files.join(path.rstrip("/"), name) for name in names]

    def _is_input(self, name: str) -> bool:
        """Tell whether a file has an extension that is wanted; unfinished ones begin with a dot."""
        return not posixpath.basename(name).startswith(".") and name.lower().endswith(self._suffixes)

    def _expand(self, pattern: str) -> list[str]:
        from braceexpand import braceexpand

        try:
            names = list(braceexpand(pattern))
        except ValueError as error:
            raise ArgumentError(f"file_paths {pattern!r}: {error}") from error
        urls: list[str] = []
        for name in names:
            if any(char in name for char in "*?["):
                urls += [one for one in files.glob(name, self.storage_options) if self._is_input(one)]
            else:
                urls += self._find(name)
        return urls

    def _root(self, given: Sequence[str], found: Sequence[str]) -> str:
        """Return the folder given; else the one that all files lie in."""
        if len(given) == 1 and all(url.startswith(given[0].rstrip("/") + "/") for url in found):
            return given[0].rstrip("/")
        protocols = {url.partition("://")[0] if "://" in url else "" for url in found}
        if len(protocols) > 1:
            raise ArgumentError(f"file_paths mixes storage systems: {', '.join(sorted(protocols))}")
        protocol = protocols.pop()
        common = posixpath.commonpath([posixpath.dirname(url.partition("://")[2] or url) for url in found])
        return f"{protocol}://{common}" if protocol else common or "."

    def _grouped(self, urls: Sequence[str]) -> Iterator[list[str]]:
        if self._bytes is None:
            size = self.files_per_partition or 1
            for start in range(0, len(urls), size):
                yield list(urls[start : start + size])
            return
        group: list[str] = []
        held = 0
        for url in urls:
            size = files.identify(url, self.storage_options).size
            if group and held + size > self._bytes:
                yield group
                group, held = [], 0
            group.append(url)
            held += size
        yield group


def _group_name(urls: Sequence[str], root: str) -> str:
    """Return a name of its own for a group: the first file's, for people, and a hash of all names below the root."""
    names = [url.removeprefix(root).lstrip("/") for url in urls]
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", posixpath.basename(names[0]).partition(".")[0])[:_STEM]
    return f"{stem}-{hashlib.sha256(chr(10).join(names).encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _as_bytes(blocksize: int | str | None) -> int | None:
    if blocksize is None:
        return None
    try:
        size = int(parse_bytes(blocksize))
    except (ValueError, TypeError) as error:
        raise ArgumentError(
            f"blocksize must be a number of bytes, or a text such as '2GiB', not {blocksize!r}"
        ) from error
    if size < 1:
        raise ArgumentError(f"blocksize must be at least 1 byte, not {blocksize!r}")
    return size
