"""Hashes of images, as columns: of the stored bytes, and of what is to be seen.

Both are functions for `ImageTextPairDataset.map_columns`, which add a column of hashes and ``image_error``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pandas as pd
import xxhash

from nemo_image import schema
from nemo_image.datasets.columns import rows_by_shard
from nemo_image.datasets.samples import samples_of_rows
from nemo_image.datasets.shard_pass import open_tar
from nemo_image.datasets.source import DatasetSource
from nemo_image.engine.decoding.each import value_of_each
from nemo_image.errors import ArgumentError, ImageError, MissingDependencyError, ShardError
from nemo_image.shards.decode import decode_pillow

HashName = Literal["phash", "dhash", "ahash"]

Hashed = Generator[str | ImageError, None, None]

_FUNCTIONS = {"phash": "phash", "dhash": "dhash", "ahash": "average_hash"}  # imagehash's names


class _ImageHash:
    """Hashes the images of a partition's rows, shard by shard."""

    row_by_row = True

    def __init__(self, source: DatasetSource, column: str) -> None:
        self.source = source
        self.column = column

    def hash_all(self, blobs: Iterable[bytes]) -> Hashed:
        """Yield the hash of each image, or why there is none, in their order."""
        raise NotImplementedError

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the columns of hashes and of ``image_error`` for `frame`.

        A shard that cannot be read marks its rows instead of raising, so that the other shards' rows of the partition
        are not lost with it; saving turns the mark into a failed shard.
        """
        hashes: dict[int, str] = {}
        errors: dict[int, str] = {}
        for shard, places in rows_by_shard(frame).items():
            ids = frame[self.source.id_col].iloc[places].tolist()
            try:
                found, reasons = self._hash_rows(shard, ids)
            except ShardError as error:
                errors |= dict.fromkeys(places.tolist(), f"{schema.SHARD_FAILED}: {error}")
                continue
            hashes |= {int(places[row]): value for row, value in found.items()}
            errors |= {int(places[row]): reason for row, reason in reasons.items()}
        columns = {self.column: hashes, schema.IMAGE_ERROR: errors}
        dtype = schema.arrow_dtype("string")
        rows = range(len(frame))
        return pd.DataFrame(
            {name: pd.Series([values.get(row) for row in rows], frame.index, dtype) for name, values in columns.items()}
        )

    def _hash_rows(self, shard: str, ids: Sequence[Any]) -> tuple[dict[int, str], dict[int, str]]:
        """Return the hash of each row by its position, and the reason of each row that has none."""
        hashes: dict[int, str] = {}
        with open_tar(self.source, shard) as reader:
            images, errors = samples_of_rows(reader, self.source, shard, ids)
            rows = sorted(images, key=lambda row: images[row].offset)
            blobs = reader.read_many([images[row] for row in rows])
            with closing(self.hash_all(blobs)) as outcomes:
                for row, outcome in zip(rows, outcomes, strict=True):
                    if isinstance(outcome, ImageError):
                        errors[row] = outcome.reason
                    else:
                        hashes[row] = outcome
        return hashes, errors


class ContentHash(_ImageHash):
    """XXH3-128 of each image's stored bytes, in 32 hexadecimal digits, as the column ``image_hash``.

    The image is not decoded: one that is damaged has a hash too.

    Parameters
    ----------
    source : DatasetSource
        Where the shards lie.
    """

    def __init__(self, source: DatasetSource) -> None:
        super().__init__(source, "image_hash")

    def hash_all(self, blobs: Iterable[bytes]) -> Hashed:
        """Yield the hash of each image."""
        for blob in blobs:
            yield xxhash.xxh3_128_hexdigest(blob)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return ("ContentHash", self.source.__dask_tokenize__())


class PerceptualHash(_ImageHash):
    """A 64-bit hash of what each picture shows, in 16 hexadecimal digits, as the column ``image_phash`` (or other).

    It is imagehash's, of the upright RGB picture that `nemo_image.shards.decode` gives. Pictures of one colour share a
    hash, whichever colour it is.

    Parameters
    ----------
    source : DatasetSource
        Where the shards lie.
    hash : {"phash", "dhash", "ahash"}, default "phash"
        Signs of a cosine transform against their median, of differences of neighbours, or of pixels against their mean.
    num_threads : int, default 4
        Pictures that are decoded at the same time, if the task may use so many cores.

    Raises
    ------
    ArgumentError
        If an argument is unusable.
    MissingDependencyError
        If imagehash is not installed.
    """

    def __init__(self, source: DatasetSource, hash: HashName = "phash", num_threads: int = 4) -> None:
        if hash not in _FUNCTIONS:
            raise ArgumentError(f"hash must be one of {', '.join(map(repr, get_args(HashName)))}, not {hash!r}")
        if num_threads < 1:
            raise ArgumentError(f"num_threads must be at least 1, not {num_threads}")
        _hash_function(hash)
        super().__init__(source, f"image_{hash}")
        self.hash = hash
        self.num_threads = num_threads

    def hash_all(self, blobs: Iterable[bytes]) -> Hashed:
        """Return the hash of each picture, or why it cannot be decoded."""
        return value_of_each(blobs, _Hasher(self.hash), self.num_threads)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return ("PerceptualHash", self.source.__dask_tokenize__(), self.hash)


@dataclass(frozen=True)
class _Hasher:
    """Makes a hash of a picture."""

    hash: HashName

    def __call__(self, blob: bytes) -> str:
        return str(_hash_function(self.hash)(decode_pillow(blob)[1]))


def _hash_function(name: HashName) -> Callable[[Any], Any]:
    try:
        import imagehash
    except ImportError as error:
        raise MissingDependencyError(
            f"hash={name!r} needs the package imagehash ({error}): pip install 'nemo-image[image_cpu]', or just "
            "'pip install imagehash'"
        ) from error
    function: Callable[[Any], Any] = getattr(imagehash, _FUNCTIONS[name])
    return function
