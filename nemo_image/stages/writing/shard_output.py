"""Files of one output shard of a pipeline: its tar, its index, and last its Parquet file, each written atomically."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import pyarrow as pa

from nemo_image.engine.ledger import FOLDER, ShardRecord
from nemo_image.errors import ArgumentError
from nemo_image.shards import files, parquet
from nemo_image.shards.idx_file import write_idx
from nemo_image.shards.index import TarIndex
from nemo_image.shards.write import TarWriter

WRITER = "pipeline"
"""What the footers of a pipeline's own files say under ``writer``: an output folder may hold others' files."""

REMAINDERS = f"{FOLDER}/remainders"
"""The folder, below the output, of what groups have left over for the last step."""


@dataclass(frozen=True)
class OutputSettings:
    """What all output shards of a run share.

    Attributes
    ----------
    root : str
        The output folder.
    images_per_tar : int
    token : str
        Names the pipeline.
    columns : dict of str to dict
        The fingerprint of each column of results that stages make.
    nested : bool
        Whether shards may lie in folders of the output folder, as those of the input may.
    storage_options : dict
        For fsspec.
    """

    root: str
    images_per_tar: int
    token: str = ""
    columns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    nested: bool = False
    storage_options: Mapping[str, Any] = field(default_factory=dict)

    def url(self, name: str) -> str:
        """Return the URL of something in the output folder."""
        return files.join(self.root, name)

    def size(self, name: str) -> int | None:
        """Return the size in bytes of a file in the output folder, None if there is no such file."""
        try:
            return files.identify(self.url(name), self.storage_options).size
        except (FileNotFoundError, NotADirectoryError):
            return None


class TarOutput:
    """A tar that is being written.

    Attributes
    ----------
    writer : TarWriter
    index : TarIndex
        Known once the tar is whole.
    """

    index: TarIndex

    def __init__(self, file: BinaryIO) -> None:
        self._file = files.HashedFile(file)
        self.writer = TarWriter(cast(BinaryIO, self._file))

    @property
    def digest(self) -> str:
        """XXH3-128 of what has been written."""
        return self._file.hash.hexdigest()


@contextmanager
def tar_output(settings: OutputSettings, name: str) -> Iterator[TarOutput]:
    """Write a tar, which appears under its name, whole, at the end of the ``with`` block."""
    with files.atomic_writer(settings.url(name), settings.storage_options) as file:
        tar = TarOutput(file)
        yield tar
        tar.writer.close()
        tar.index = tar.writer.index()


def complete_shard(
    settings: OutputSettings, shard: str, index: TarIndex, table: pa.Table, said: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Write what belongs beside a shard's tar.

    Parameters
    ----------
    index : TarIndex
        Of the tar.
    table : pyarrow.Table
        The rows.
    said : mapping, optional
        What the footer's record is to say besides.

    Returns
    -------
    dict of str to int
        The shard's files, by their names in the output folder, with their sizes in bytes.
    """
    sizes = {f"{shard}.tar": index.size}
    notes = []
    try:
        write_idx(index, settings.url(f"{shard}.idx"), settings.storage_options)
    except ArgumentError as error:
        notes.append(f"no .idx: {error}")
    else:
        sizes[f"{shard}.idx"] = settings.size(f"{shard}.idx") or 0
    sizes |= write_rows(
        settings,
        f"{shard}.parquet",
        table,
        source=files.FileIdentity(index.size).to_dict(),
        idx_size=sizes.get(f"{shard}.idx"),
        said={"notes": notes, **(said or {})},
    )
    return sizes


def write_rows(
    settings: OutputSettings,
    name: str,
    table: pa.Table,
    source: Mapping[str, Any] | None = None,
    idx_size: int | None = None,
    said: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Write a Parquet file with our footer; return its size in bytes by its name."""
    made_by = {column: made for column, made in settings.columns.items() if column in table.column_names}
    rows = len(table)
    record = ShardRecord(name.removesuffix(".parquet"), rows_in=rows, rows_out=rows, samples=rows)
    record.note_results(table, made_by)
    account = {key: value for key, value in record.to_dict().items() if key not in ("seconds", "error", "status")}
    footer = parquet.Footer(
        columns=made_by,
        pending=parquet.count_pending(table, made_by),
        source=source,
        idx_size=idx_size,
        plan=settings.token,
        record={**account, "writer": WRITER, **(said or {})},
    )
    with parquet.table_writer(settings.url(name), table.schema, settings.storage_options) as writer:
        writer.write(table)
        writer.footer = footer
    return {name: settings.size(name) or 0}
