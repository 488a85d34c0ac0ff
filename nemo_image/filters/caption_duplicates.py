"""Captions that stand more than once in a dataset."""

from __future__ import annotations

import os
import unicodedata
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import xxhash
from dask.base import tokenize

from nemo_image import schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.columns import rows_by_shard
from nemo_image.datasets.load import rows_by_id
from nemo_image.datasets.passes import file_identities, one_task_a_shard
from nemo_image.datasets.source import DatasetSource
from nemo_image.engine.ledger import FOLDER
from nemo_image.engine.run_lock import run_lock
from nemo_image.errors import DatasetError, ShardError
from nemo_image.filters.captions import TarCaptions, caption_column, captions_of
from nemo_image.filters.equal_keys import ROWS, EqualKeys, Table
from nemo_image.shards import files

CAPTION_COUNT = "caption_count"
"""Rows of the dataset that have a row's caption (int64), itself included; 0 where there is none."""

CAPTION_IS_DUPLICATE = "caption_is_duplicate"
"""Whether a row's caption stands in a row before it, in the order of shards and of their rows (bool)."""

DONE, PLAN = "done", "plan"


class CaptionDuplicates:
    """Adds how often each caption stands in the whole dataset, and whether it stands in an earlier row.

    Adds ``caption_count`` (int64) and ``caption_is_duplicate`` (bool); 0 and false where there is no caption. Captions
    are compared without regard to case, to Unicode's compatibility forms (NFKC) and to how much white space there is,
    by XXH3-128: of 5 billion different captions, the chance that any two are taken for equal is 4e-20.

    The dataset is gone through when the operator is called, in bounded memory: hashes go to files, sorted, and are
    compared range by range. The result's files stay, and are found again by the next call on the same rows.

    Parameters
    ----------
    caption_column : str, optional
        As for :class:`CaptionStats`.
    output_dir : str, optional
        The folder of the result's files; by default one below the dataset's ``_nemo_image``.
    """

    def __init__(self, caption_column: str | None = None, output_dir: str | os.PathLike[str] | None = None) -> None:
        self.caption_column = caption_column
        self.output_dir = None if output_dir is None else files.folder(output_dir)

    def __call__(self, dataset: ImageTextPairDataset) -> ImageTextPairDataset:
        """Count now; return the dataset with the columns, which read the result.

        Raises
        ------
        MissingColumnError, ArgumentError
            If `caption_column` is not there, or holds no text.
        DatasetError
            If `output_dir` holds something else.
        RunError
            If shards could not be read.
        """
        column = caption_column(dataset, self.caption_column)
        columns = [] if column is None else [column]
        dataset = one_task_a_shard(dataset, columns)
        names = [schema.SHARD, dataset.id_col, *columns]
        token = str(tokenize(dataset.metadata[names], file_identities(dataset), column, unicodedata.unidata_version))
        options = dataset.source.storage_options
        folder = self.output_dir or files.join(dataset.path, FOLDER, f"captions-{token[:16]}")
        with run_lock(folder, "caption duplicates", options):
            if not _is_done(folder, token, options):
                keying = KeyByCaption(dataset.source, column)
                EqualKeys(dataset, columns, folder, keying, CAPTION_COUNT, CAPTION_IS_DUPLICATE).run()
                _write(files.join(folder, DONE), token, options)
        made_by = {"operator": "CaptionDuplicates", "captions": column, "result": token}
        kinds = {CAPTION_COUNT: "int64", CAPTION_IS_DUPLICATE: "bool"}
        outputs = {name: schema.arrow_dtype(kind) for name, kind in kinds.items()}
        reading = ReadCounts(dataset.source, folder, outputs)
        return dataset.map_columns(reading, outputs=outputs, fingerprints=dict.fromkeys(outputs, made_by))

    def __repr__(self) -> str:
        return f"CaptionDuplicates(caption_column={self.caption_column!r}, output_dir={self.output_dir!r})"


def normalize_caption(text: str) -> str:
    """Return a caption as it is compared: NFKC, case folded, white space of any length as one space."""
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


class KeyByCaption:
    """Hashes the captions of a frame's rows."""

    def __init__(self, source: DatasetSource, column: str | None) -> None:
        self.source = source
        self.column = column

    def __call__(self, frame: pd.DataFrame) -> tuple[Table, Any]:
        """Return the keys, (n, 2) uint64, and which rows have a caption."""
        if self.column is not None:
            texts = captions_of(frame[self.column])
        else:
            texts, errors = TarCaptions(self.source)(frame)
            failed = [reason for reason in errors.values() if reason.startswith(schema.SHARD_FAILED + ":")]
            if failed:
                raise ShardError(failed[0].partition(": ")[2])
        normal = [normalize_caption(text) for text in texts]
        digest = xxhash.xxh3_128_digest
        blob = b"".join(digest(text.encode("utf-8", "surrogatepass")) for text in normal)
        keys = np.frombuffer(blob, ">u8").reshape(len(texts), 2).astype(np.uint64)
        return keys, np.fromiter(map(bool, normal), bool, len(texts))


class ReadCounts:
    """Reads the counts of a partition's rows from the result's files."""

    row_by_row = True
    only_reads = True

    def __init__(self, source: DatasetSource, folder: str, outputs: dict[str, Any]) -> None:
        self.source = source
        self.folder = folder
        self.outputs = outputs

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the columns for `frame`."""
        made = {name: np.empty(len(frame), object) for name in self.outputs}
        for shard, places in rows_by_shard(frame).items():
            url = files.join(self.folder, ROWS, shard + ".parquet")
            ids = pa.array(frame[self.source.id_col].iloc[places], from_pandas=True)
            found, table = rows_by_id(self.source, shard, url, ids, list(self.outputs))
            for name, values in made.items():
                values[places[found]] = table[name].to_numpy()
        return pd.DataFrame({name: pd.Series(values, frame.index, self.outputs[name]) for name, values in made.items()})

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return ("ReadCounts", self.source.__dask_tokenize__(), self.folder, str(self.outputs))


def _is_done(folder: str, token: str, options: Any) -> bool:
    """Tell whether a folder holds this result; a new one becomes its folder.

    Raises
    ------
    DatasetError
        If it holds something else.
    """
    for name in (DONE, PLAN):
        try:
            holds = files.read_bytes(files.join(folder, name), options).decode()
        except FileNotFoundError:
            continue
        if holds != token:
            raise DatasetError(f"{folder} holds the result of other rows: give an empty output_dir, or remove it")
        return name == DONE
    if files.exists(folder, options):
        fs, path = files.open_fs(folder, options)
        there = [one.rstrip("/").rpartition("/")[2] for one in fs.ls(path, detail=False)]
        others = [name for name in there if name != FOLDER]
        if others:
            raise DatasetError(f"{folder} holds something else ({min(others)}): give an empty output_dir")
    _write(files.join(folder, PLAN), token, options)
    return False


def _write(url: str, text: str, options: Any) -> None:
    with files.atomic_writer(url, options) as out:
        out.write(text.encode())
