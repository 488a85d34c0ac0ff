"""Where a dataset's shards lie. Small and picklable: each task carries one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from nemo_image.shards import files

OnMismatch = Literal["null", "drop", "raise"]
Frames = Literal["pandas", "cudf"]


@dataclass(frozen=True)
class DatasetSource:
    """The place of a dataset's files and the types of its columns.

    Attributes
    ----------
    tar_root : str
        The folder (or URL) under which ``<shard>.tar`` lies for each shard.
    metadata_root : str
        The folder under which ``<shard>.parquet`` lies.
    id_col : str
        The column that names a row's sample.
    schema : pyarrow.Schema
        Columns of the metadata, with types that hold every shard's values; those of the sidecars included.
    built_from_tars : bool
        Whether shards without a Parquet file get their rows from the tar's own JSON and captions.
    sidecars : dict of str to list of str
        The columns taken from each sidecar folder.
    on_mismatch : {"null", "drop", "raise"}
        What happens to rows without a sample.
    storage_options : dict
        Passed to fsspec.
    frames : {"pandas", "cudf"}
        What the user's metadata is held in.
    """

    tar_root: str
    metadata_root: str
    id_col: str
    schema: pa.Schema
    built_from_tars: bool = False
    sidecars: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    on_mismatch: OnMismatch = "null"
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    frames: Frames = "pandas"

    def __post_init__(self) -> None:
        # Tasks may run in other folders.
        object.__setattr__(self, "tar_root", files.folder(self.tar_root))
        object.__setattr__(self, "metadata_root", files.folder(self.metadata_root))
        object.__setattr__(self, "sidecars", {files.folder(at): names for at, names in self.sidecars.items()})

    def tar_url(self, shard: str) -> str:
        """Return the URL of a shard's tar."""
        return files.join(self.tar_root, shard + ".tar")

    def parquet_url(self, shard: str) -> str:
        """Return the URL of a shard's metadata."""
        return files.join(self.metadata_root, shard + ".parquet")

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return (
            "DatasetSource",
            self.tar_root,
            self.metadata_root,
            self.id_col,
            self.schema.to_string(show_schema_metadata=False),
            self.built_from_tars,
            sorted(self.sidecars.items()),
            self.on_mismatch,
        )
