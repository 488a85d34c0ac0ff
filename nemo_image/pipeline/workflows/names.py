"""Make sure that the names in a list of duplicates mean one row only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from nemo_image import schema
from nemo_image.datasets.parquet_folder import split_names
from nemo_image.datasets.passes import run_all
from nemo_image.dedup.exchange.runs import MAX_BUCKETS, RunWriter, read_batch
from nemo_image.dedup.exchange.work import remove
from nemo_image.errors import DatasetError
from nemo_image.pipeline.workflows.listing import Listing, plain
from nemo_image.shards import files

BUCKET_ROWS = 2_000_000
"""Rows whose names one task compares, about."""


def require_clear_names(listing: Listing, parts: Sequence[list[str]], folder: str) -> None:
    """Raise if the name of a row to remove is also that of a row to keep, in another file.

    Parameters
    ----------
    parts : sequence of list of str
        The shards, by task.
    folder : str
        For the names of all rows, by bucket, while they are compared.

    Raises
    ------
    DatasetError
        With an example.
    """
    buckets = max(1, min(listing.rows // BUCKET_ROWS, MAX_BUCKETS))
    scattering = ScatterNames(listing, folder, buckets)
    urls = [url for found in run_all("look at ids", scattering, enumerate(parts), len(parts)) for url in found]
    examples = run_all("compare ids", CompareNames(urls, listing.options), range(buckets), buckets)
    remove(folder, listing.options)
    example = next((one for one in examples if one is not None), None)
    if example is None:
        return
    name, kept, removed = example
    if listing.naming == "row":
        ids, shards = split_names(pa.array([name]), listing.id_type)
        said = f"id {ids[0].as_py()!r} of shard {shards[0].as_py()!r}"
        advice = "give each image one row"
    else:
        said = f"id {name!r}"
        advice = (
            f"give the files a column {schema.SHARD!r} that says each row's tar (its path below the dataset's, without "
            ".tar), or ids that differ"
        )
    raise DatasetError(
        f"{listing.source.metadata_root}: {said} stands in {removed}, where it is a duplicate, and in {kept}, where it "
        f"is kept: a list of ids cannot say which is meant; {advice}"
    )


@dataclass
class ScatterNames:
    """Writes the names of the rows of some shards by bucket, each with the file and whether it is to be removed."""

    listing: Listing
    folder: str
    buckets: int
    task_name: str = field(default="nemo-image-names", init=False)

    def __call__(self, item: tuple[int, list[str]]) -> list[str]:
        """Write those of one group of shards; return the files."""
        number, shards = item
        listing = self.listing
        runs = RunWriter(files.join(self.folder, f"{number:06d}"), self.buckets, listing.options)
        for shard in shards:
            names = listing.names(shard).cast(pa.string())
            found = listing.removed(shard)[listing.source.id_col].cast(pa.string()).combine_chunks()
            removed = pc.is_in(names, value_set=found)
            place = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(names), np.int32)), pa.array([shard]))
            table = pa.table({"name": names, "removed": removed, schema.SHARD: place})
            hashes = pd.util.hash_array(names.to_numpy(zero_copy_only=False)) if self.buckets > 1 else 0
            runs.add(table, np.broadcast_to(np.asarray(hashes % np.uint64(self.buckets), np.int64), len(table)))
        runs.close()
        return runs.urls


@dataclass
class CompareNames:
    """Finds a name in a bucket that is to be removed in one file and kept in another."""

    urls: Sequence[str]
    storage_options: Mapping[str, Any]

    def __call__(self, bucket: int) -> tuple[str, str, str] | None:
        """Return the name, the file where it is kept, and that where it is removed; None if there is none."""
        tables = [plain(read_batch(url, bucket, None, self.storage_options)) for url in self.urls]
        table = pa.concat_tables(tables)
        removed = table.filter(table["removed"])
        kept = table.filter(pc.invert(table["removed"]))
        both = kept.filter(pc.is_in(kept["name"], value_set=removed["name"].combine_chunks()))
        if not len(both):
            return None
        name = both["name"][0].as_py()
        there = removed.filter(pc.equal(removed["name"], name))
        return name, both[schema.SHARD][0].as_py() + ".parquet", there[schema.SHARD][0].as_py() + ".parquet"
