"""Selections that the count of an export leaves for the tasks that write: no tar is walked through a second time.

An input shard may go into many output shards, whose tasks run anywhere. Each needs to know where its samples lie. The
files are scratch: they are removed when the export is finished, and what is missing, or of other input, is found
anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nemo_image.datasets import shard_pass
from nemo_image.engine.ledger import FOLDER
from nemo_image.shards import files
from nemo_image.shards.index import Member, Sample

SELECTIONS = "selections"

_RECORD, _FILES = b"selection", b"files"


@dataclass(frozen=True)
class Selection:
    """The rows of a shard that pass and have a sample, in the order of their offset in the tar.

    Attributes
    ----------
    rows : ndarray of int64, shape (n,)
        Their positions in the user's frame.
    ids : pyarrow array of length n
        Their ids.
    keys : pyarrow array of length n
        The samples' keys.
    members : pyarrow array of length n
        Their members, as :class:`~nemo_image.shards.index.Member` has them; names as bytes.
    lengths : tuple of int
        Rows of the user's frame in each window.
    files_token : bytes
        The tar and the metadata that it was found in.
    digest : str
        What tells this selection from others.
    """

    rows: npt.NDArray[np.int64]
    ids: pa.Array
    keys: pa.StringArray
    members: pa.ListArray
    lengths: tuple[int, ...]
    files_token: bytes
    digest: str

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.rows)

    def samples(self, positions: npt.NDArray[np.int64]) -> list[Sample]:
        """Return the samples at some positions of the selection, in that order."""
        places = pa.array(positions)
        found = self.members.take(places)
        columns = [found.flatten().field(place).to_pylist() for place in range(4)]
        texts = [name.decode("utf-8", "surrogateescape") for name in columns[0]]
        members = map(Member, texts, *columns[1:])
        lengths = found.value_lengths().to_pylist()
        keys = self.keys.take(places).to_pylist()
        return [Sample(key, tuple(islice(members, length))) for key, length in zip(keys, lengths, strict=True)]


def members_of(samples: Sequence[Sample]) -> pa.ListArray:
    """Return samples' members as :class:`Selection` keeps them."""
    members = [member for sample in samples for member in sample.members]
    fields = {
        "name": pa.array([member.name.encode("utf-8", "surrogateescape") for member in members], pa.binary()),
        "extension": pa.array([member.extension for member in members], pa.string()),
        "offset": pa.array([member.offset for member in members], pa.int64()),
        "size": pa.array([member.size for member in members], pa.int64()),
    }
    ends = np.cumsum([0, *(len(sample.members) for sample in samples)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.StructArray.from_arrays(list(fields.values()), list(fields)))


def folder_of(target: str) -> str:
    """Return the folder below an export's where the selections lie."""
    return files.join(target, FOLDER, SELECTIONS)


def write_selection(folder: str, shard: str, found: Selection, options: Mapping[str, Any]) -> None:
    """Leave a shard's selection for the tasks that write."""
    table = pa.table({"row": pa.array(found.rows), "id": found.ids, "key": found.keys, "members": found.members})
    record = {"digest": found.digest, "lengths": found.lengths, "window": shard_pass.WINDOW_ROWS}
    table = table.replace_schema_metadata({_RECORD: json.dumps(record).encode(), _FILES: found.files_token})
    how = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
    with (
        files.atomic_writer(_url(folder, shard), options) as out,
        pa.ipc.new_file(out, table.schema, options=how) as writer,
    ):
        writer.write_table(table)


def read_selection(folder: str, shard: str, digest: str, options: Mapping[str, Any]) -> Selection | None:
    """Return the selection that was left of a shard; None where there is none with this digest."""
    try:
        table = pa.ipc.open_file(files.read_bytes(_url(folder, shard), options)).read_all()
        metadata = table.schema.metadata or {}
        record, files_token = json.loads(metadata[_RECORD]), metadata[_FILES]
    except (FileNotFoundError, NotADirectoryError, pa.ArrowInvalid, ValueError, KeyError):
        return None
    if record["digest"] != digest or record["window"] != shard_pass.WINDOW_ROWS:
        return None
    rows, ids, keys, members = (table[name].combine_chunks() for name in ("row", "id", "key", "members"))
    return Selection(rows.to_numpy(), ids, keys, members, tuple(record["lengths"]), files_token, digest)


def remove_selections(target: str, options: Mapping[str, Any]) -> None:
    """Remove all that were left."""
    fs, path = files.open_fs(folder_of(target), options)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def _url(folder: str, shard: str) -> str:
    return files.join(folder, shard + ".arrow")
