"""What filters that look at stored images share: the images of a partition's rows, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any

import pandas as pd
import pyarrow as pa

from nemo_image import schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.columns import rows_by_shard
from nemo_image.datasets.samples import samples_of_rows
from nemo_image.datasets.shard_pass import open_tar
from nemo_image.datasets.source import DatasetSource
from nemo_image.errors import ImageError, ShardError
from nemo_image.shards.index import Member
from nemo_image.shards.read import ShardReader

Values = tuple[Any, ...]
Measured = Generator[Values | ImageError, None, None]


class ImageColumns:
    """Makes columns of the images of a partition's rows; a base class.

    Parameters
    ----------
    source : DatasetSource
    outputs : dict of str to dtype
        The columns that are wanted, and ``image_error``.

    Attributes
    ----------
    names : tuple of str
        The columns that :meth:`measure` makes, in the order of its values.
    """

    row_by_row = True
    names: tuple[str, ...] = ()

    def __init__(self, source: DatasetSource, outputs: Mapping[str, Any]) -> None:
        self.source = source
        self.outputs = dict(outputs)

    def measure(self, reader: ShardReader, members: Sequence[Member]) -> Measured:
        """Yield the values of each image, or why there are none, in their order."""
        raise NotImplementedError

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the columns for `frame`.

        A shard that cannot be read marks its rows instead of raising, so that the other shards' rows of the partition
        are not lost with it; saving turns the mark into a failed shard.
        """
        values: dict[int, Values] = {}
        errors: dict[int, str] = {}
        for shard, places in rows_by_shard(frame).items():
            ids = frame[self.source.id_col].iloc[places].tolist()
            try:
                found, reasons = self._of_rows(shard, ids)
            except ShardError as error:
                errors |= dict.fromkeys(places.tolist(), f"{schema.SHARD_FAILED}: {error}")
                continue
            values |= {int(places[row]): one for row, one in found.items()}
            errors |= {int(places[row]): reason for row, reason in reasons.items()}
        nothing = (None,) * len(self.names)
        rows = [values.get(row, nothing) for row in range(len(frame))]
        made: dict[str, list[Any]] = dict(zip(self.names, map(list, zip(*rows, strict=True)), strict=True))
        made[schema.IMAGE_ERROR] = [errors.get(row) for row in range(len(frame))]
        arrays = {name: pa.array(made[name], dtype.pyarrow_dtype) for name, dtype in self.outputs.items()}
        return pd.DataFrame(
            {name: pd.Series(pd.arrays.ArrowExtensionArray(one), frame.index) for name, one in arrays.items()}
        )

    def _of_rows(self, shard: str, ids: Sequence[Any]) -> tuple[dict[int, Values], dict[int, str]]:
        """Return the values of each row by its position, and the reason of each row that has none."""
        values: dict[int, Values] = {}
        with open_tar(self.source, shard) as reader:
            images, errors = samples_of_rows(reader, self.source, shard, ids)
            rows = sorted(images, key=lambda row: images[row].offset)
            with closing(self.measure(reader, [images[row] for row in rows])) as outcomes:
                for row, outcome in zip(rows, outcomes, strict=True):
                    if isinstance(outcome, ImageError):
                        errors[row] = outcome.reason
                    else:
                        values[row] = outcome
        return values, errors

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return (type(self).__name__, self.source.__dask_tokenize__(), self.names, str(self.outputs))


def add_image_columns(
    dataset: ImageTextPairDataset,
    make: Callable[[DatasetSource, Mapping[str, Any]], ImageColumns],
    kinds: Mapping[str, str],
    made_by: Mapping[str, Any],
) -> ImageTextPairDataset:
    """Return the dataset with a filter's columns, lazily; sizes that are there from elsewhere stay as they are.

    Parameters
    ----------
    make : callable
        Makes the function from the dataset's source and the columns to add.
    kinds : dict of str to str
        The columns that it can make, and their types.
    made_by : dict
        What makes them: values for JSON.
    """
    there, provenance = dataset.metadata.columns, dataset.provenance
    stays = [name for name in (schema.WIDTH, schema.HEIGHT) if name in there and provenance.get(name) != made_by]
    outputs = {name: schema.arrow_dtype(kind) for name, kind in kinds.items() if name not in stays}
    return map_with_errors(
        dataset, make(dataset.source, outputs | {schema.IMAGE_ERROR: schema.arrow_dtype("string")}), [], made_by
    )


def map_with_errors(
    dataset: ImageTextPairDataset, function: Any, inputs: Sequence[str], made_by: Mapping[str, Any]
) -> ImageTextPairDataset:
    """Add a filter's columns, ``image_error`` among them, which filters share with whatever wrote to it before.

    The reasons that others gave stay, and so does their fingerprint: what an embedder could not decode must not look
    as if it were not computed yet, and its embeddings not as if they had to be made anew.
    """
    fingerprint = dataset.provenance.get(schema.IMAGE_ERROR, dict(made_by))
    errors_of_others = schema.IMAGE_ERROR in dataset.metadata.columns and fingerprint != dict(made_by)
    return dataset.map_columns(
        KeepReasons(function) if errors_of_others else function,
        inputs=[*inputs, *([schema.IMAGE_ERROR] if errors_of_others else [])],
        outputs=function.outputs,
        fingerprints={name: fingerprint if name == schema.IMAGE_ERROR else made_by for name in function.outputs},
        reads_images=True,
    )


class KeepReasons:
    """Calls a filter's function, and leaves the reasons of ``image_error`` that are there."""

    row_by_row = True

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the filter's columns for `frame`."""
        made: pd.DataFrame = self.function(frame)
        before = frame[schema.IMAGE_ERROR]
        return made.assign(**{schema.IMAGE_ERROR: before.where(before.notna(), made[schema.IMAGE_ERROR])})

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return ("KeepReasons", self.function.__dask_tokenize__())
