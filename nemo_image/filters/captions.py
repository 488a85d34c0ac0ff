"""Captions of a partition's rows: from a column of the metadata, or from the tars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa

from nemo_image import backend, schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.columns import rows_by_shard
from nemo_image.datasets.shard_pass import current, match_rows, open_tar
from nemo_image.datasets.source import DatasetSource
from nemo_image.errors import ArgumentError, ShardError
from nemo_image.filters.image_columns import map_with_errors
from nemo_image.shards.index import Sample
from nemo_image.shards.read import ShardReader

Describe = Callable[[str], tuple[Any, ...]]


class CaptionColumns:
    """Makes columns of the captions of a partition's rows.

    Parameters
    ----------
    source : DatasetSource
    column : str or None
        The column of captions; None reads them from the tars.
    describe : callable
        From a caption to the values of the outputs. A row without a caption has the empty one.
    outputs : dict of str to dtype
        The columns, and ``image_error`` where the tars are read.
    """

    row_by_row = True

    def __init__(
        self, source: DatasetSource, column: str | None, describe: Describe, outputs: Mapping[str, Any]
    ) -> None:
        self.source = source
        self.column = column
        self.describe = describe
        self.outputs = dict(outputs)

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the columns for `frame`."""
        errors: dict[int, str] = {}
        if self.column is None:
            captions, errors = TarCaptions(self.source)(frame)
        else:
            captions = captions_of(frame[self.column])
        names = [name for name in self.outputs if name != schema.IMAGE_ERROR]
        nothing = (None,) * len(names)
        rows = [nothing if row in errors else self.describe(text) for row, text in enumerate(captions)]
        made: dict[str, list[Any]] = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
        made[schema.IMAGE_ERROR] = [errors.get(row) for row in range(len(frame))]
        arrays = {name: pa.array(made[name], dtype.pyarrow_dtype) for name, dtype in self.outputs.items()}
        return pd.DataFrame(
            {name: pd.Series(pd.arrays.ArrowExtensionArray(one), frame.index) for name, one in arrays.items()}
        )

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        name = f"{type(self.describe).__name__}.{getattr(self.describe, '__qualname__', self.describe)}"
        return ("CaptionColumns", self.source.__dask_tokenize__(), self.column, name, str(self.outputs))


class TarCaptions:
    """Reads the captions of a partition's rows from the tars."""

    def __init__(self, source: DatasetSource) -> None:
        self.source = source

    def __call__(self, frame: pd.DataFrame) -> tuple[list[str], dict[int, str]]:
        """Return the caption of each row, ``""`` for none, and the reasons of rows without a sample by position.

        A shard that cannot be read marks its rows, as an embedder does.
        """
        captions = [""] * len(frame)
        errors: dict[int, str] = {}
        for shard, places in rows_by_shard(frame).items():
            ids = frame[self.source.id_col].iloc[places].tolist()
            try:
                with open_tar(self.source, shard) as reader:
                    samples = match_rows(reader, self.source, shard, ids).tolist()
                    found = self._of_tar(reader, shard, [place for place in samples if place >= 0])
            except ShardError as error:
                errors |= dict.fromkeys(places.tolist(), f"{schema.SHARD_FAILED}: {error}")
                continue
            for row, name, place in zip(places.tolist(), ids, samples, strict=True):
                if place < 0:
                    errors[row] = f"missing: {shard}.tar has no sample with {self.source.id_col} {name!r}"
                else:
                    captions[row] = found[place]
        return captions, errors

    def _of_tar(self, reader: ShardReader, shard: str, places: Sequence[int]) -> dict[int, str]:
        """Return captions by their samples' places; in a shard's pass they are read once, whatever filters ask."""
        samples = reader.index.samples
        under_way = current(self.source, shard)
        if under_way is None:
            return dict(zip(places, read_captions(reader, [samples[place] for place in places]), strict=True))
        table = under_way.whole("captions", lambda: pa.table({"caption": read_captions(reader, samples)}))
        found = table["caption"].take(pa.array(places, pa.int64())).to_pylist()
        return dict(zip(places, found, strict=True))


def read_captions(reader: ShardReader, samples: Sequence[Sample]) -> list[str]:
    """Return the caption of each sample: its ``.txt``, or else the field ``caption`` of its JSON, or else ``""``."""
    texts = [sample for sample in samples if sample.caption is not None]
    blobs = reader.read_many([sample.caption for sample in texts if sample.caption is not None])
    found = {id(sample): blob.decode("utf-8-sig", "replace") for sample, blob in zip(texts, blobs, strict=True)}
    others = [sample for sample in samples if sample.caption is None]
    for sample, fields in zip(others, reader.read_jsons(others), strict=True):
        found[id(sample)] = _plain((fields or {}).get(schema.CAPTION)).encode("utf-8", "replace").decode()
    return [found[id(sample)] for sample in samples]


def captions_of(column: pd.Series) -> list[str]:
    """Return the values of a column of captions; null is ``""``, and of a list of captions the first one counts."""
    return [_plain(value) for value in backend.arrow_values(column).to_pylist()]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        value = next((one for one in value if one is not None), None)
    return "" if value is None else str(value)


def caption_column(dataset: ImageTextPairDataset, wanted: str | None) -> str | None:
    """Return the column of captions to read, or None for those in the tars.

    Parameters
    ----------
    wanted : str or None
        The column that the user names; None means ``caption`` where there is one.

    Raises
    ------
    MissingColumnError
        If the column that the user names is not there.
    ArgumentError
        If it holds no text.
    """
    column = wanted
    if column is None:
        if schema.CAPTION not in dataset.metadata.columns:
            return None
        column = schema.CAPTION
    dataset.require_columns([column])
    kind = backend.arrow_type_of(dataset.metadata._meta[column])
    text = kind.value_type if pa.types.is_list(kind) else kind
    if not (pa.types.is_string(text) or pa.types.is_null(text)):
        raise ArgumentError(f"caption_column: column {column!r} holds {kind}, not text")
    return column


def add_caption_columns(
    dataset: ImageTextPairDataset,
    column: str | None,
    describe: Describe,
    kinds: Mapping[str, str],
    made_by: Mapping[str, Any],
) -> ImageTextPairDataset:
    """Return the dataset with a filter's columns, lazily; `column` as :class:`CaptionColumns` takes it."""
    outputs = {name: schema.arrow_dtype(kind) for name, kind in kinds.items()}
    made = {**made_by, "captions": column}
    if column is None:
        outputs[schema.IMAGE_ERROR] = schema.arrow_dtype("string")
        return map_with_errors(dataset, CaptionColumns(dataset.source, None, describe, outputs), [], made)
    function = CaptionColumns(dataset.source, column, describe, outputs)
    return dataset.map_columns(
        function, inputs=[column], outputs=outputs, fingerprints=dict.fromkeys(outputs, made), reads_images=False
    )
