"""Find the samples of rows in their shard's tar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_image.datasets.load import read_rows
from nemo_image.datasets.shard_pass import match_rows
from nemo_image.datasets.source import DatasetSource
from nemo_image.errors import IdMismatchError
from nemo_image.shards.index import Member, Sample
from nemo_image.shards.read import ShardReader, match_samples


def samples_of_rows(
    reader: ShardReader, source: DatasetSource, shard: str, ids: Sequence[Any]
) -> tuple[dict[int, Member], dict[int, str]]:
    """Return the image of each row by its position, and the reason of each row that has none.

    Raises
    ------
    IdMismatchError
        If no row of the shard at all, these or others, names a sample of its tar.
    """
    _, images, errors = samples_with_images(reader, source, shard, ids)
    return images, errors


def samples_with_images(
    reader: ShardReader, source: DatasetSource, shard: str, ids: Sequence[Any]
) -> tuple[dict[int, Sample], dict[int, Member], dict[int, str]]:
    """Return the sample and the image of each row that has an image, by its position, and the others' reasons.

    Raises
    ------
    IdMismatchError
        If no row of the shard at all, these or others, names a sample of its tar.
    """
    found = match_rows(reader, source, shard, list(ids))
    if len(ids) and not (found >= 0).any():
        require_some_match(reader, source, shard)
    samples: dict[int, Sample] = {}
    images: dict[int, Member] = {}
    errors: dict[int, str] = {}
    for row, place in enumerate(found.tolist()):
        if place < 0:
            errors[row] = f"missing: {shard}.tar has no sample with {source.id_col} {ids[row]!r}"
            continue
        sample = reader.index.samples[place]
        image = sample.image
        if image is None:
            names = ", ".join(member.extension for member in sample.members)
            errors[row] = f"missing: sample {sample.key!r} of {shard}.tar has no image, only {names}"
        else:
            samples[row], images[row] = sample, image
    return samples, images, errors


def require_some_match(reader: ShardReader, source: DatasetSource, shard: str) -> None:
    """Raise if the ids of a shard's metadata name none of the tar's samples.

    A filter may leave only rows whose downloads failed, so a part of the rows that matches nothing proves nothing.
    """
    if not len(reader.index):
        return
    ids = read_rows(source, shard, [source.id_col])[source.id_col].to_pylist()
    if ids and not (match_samples(reader, ids, source.id_col) >= 0).any():
        raise IdMismatchError(
            f"none of the {len(ids)} values of {source.id_col!r} in {source.parquet_url(shard)} (the first is "
            f"{ids[0]!r}) names a "
            f"sample of {source.tar_url(shard)} (the first is {reader.index.samples[0].key!r}): give id_col the "
            "column that does"
        )
