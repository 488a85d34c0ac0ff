"""Write the images of one file group: full tars, and a remainder for the last step; or their results alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import count, groupby, islice
from typing import Any

import pyarrow as pa

from nemo_image.errors import ArgumentError
from nemo_image.shards import files, parquet
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.tasks import ImageBatch
from nemo_image.stages.writing.output_folder import move
from nemo_image.stages.writing.output_keys import OutputKeys
from nemo_image.stages.writing.rows import Rows
from nemo_image.stages.writing.sample_members import SourceReaders, contents_of, write_sample
from nemo_image.stages.writing.shard_output import (
    REMAINDERS,
    OutputSettings,
    TarOutput,
    complete_shard,
    tar_output,
    write_rows,
)

Images = Iterator[tuple[ImageObject, pa.Schema]]
"""Images, with the types of their metadata."""


@dataclass(frozen=True)
class Remainder:
    """What a group has left over: a tar and a Parquet file of its name in `REMAINDERS`.

    Attributes
    ----------
    name : str
        The group's.
    rows : int
    bytes : int
        Of the tar.
    digest : str
        Of both files' contents.
    """

    name: str
    rows: int
    bytes: int
    digest: str


@dataclass
class GroupOutput:
    """What was written for a group.

    Attributes
    ----------
    shards : list of str
        Finished output shards.
    rows : int
        All images, those of the remainder included.
    renamed : int
        Images in finished shards that have another key there.
    renamed_in_all : int
        The same, those of the remainder included.
    remainder : Remainder or None
    files : dict of str to int
        All files, by their names in the output folder, with their sizes in bytes.
    """

    shards: list[str] = field(default_factory=list)
    rows: int = 0
    renamed: int = 0
    renamed_in_all: int = 0
    remainder: Remainder | None = None
    files: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> GroupOutput:
        """Rebuild what :meth:`to_dict` gave."""
        known = {name: values[name] for name in cls.__dataclass_fields__}
        left = known["remainder"]
        return cls(**{**known, "remainder": None if left is None else Remainder(**left)})


def images_of(tasks: Iterator[ImageBatch], *, drop_pixels: bool) -> Images:
    """Yield the images of batches; a batch is let go before the next one is drawn."""
    for task in tasks:
        images, fields = task.data, task.fields
        del task
        for image in images:
            yield image, fields
            if drop_pixels:
                image.drop_pixels()
        del images


def write_group(settings: OutputSettings, group: str, images: Images, *, leaves_rest: bool) -> GroupOutput:
    """Write a group's images into tars of ``images_per_tar``.

    Parameters
    ----------
    images : iterator
        Drawn as they are written: no bytes are held but those of the image under work.
    leaves_rest : bool
        Whether what does not fill a tar goes to `REMAINDERS`; else it is a short tar.
    """
    done = GroupOutput()
    for number in count():
        first = next(images, None)
        if first is None:
            break
        shard = f"{group}-{number:05d}"
        some = _after(first, islice(images, settings.images_per_tar - 1))
        del first
        # Whether it will be full is not known yet: a short one is moved.
        with tar_output(settings, f"{shard}.tar") as tar:
            rows, renamed = _write_images(tar, some)
        done.rows += len(rows)
        done.renamed_in_all += renamed
        if leaves_rest and len(rows) < settings.images_per_tar:
            done.remainder = _leave(settings, group, shard, tar, rows, done.files)
            break
        done.shards.append(shard)
        done.renamed += renamed
        done.files |= complete_shard(settings, shard, tar.index, rows.table(shard, settings.columns))
    return done


def _after(first: tuple[ImageObject, pa.Schema], rest: Images) -> Images:
    """Yield one image, which is let go then (a chain would hold it to the end), and others."""
    yield first
    del first
    yield from rest


def _write_images(tar: TarOutput, images: Iterable[tuple[ImageObject, pa.Schema]]) -> tuple[Rows, int]:
    """Write samples; return their rows, and how many have another key now."""
    rows, keys, renamed = Rows(), OutputKeys(), 0
    with SourceReaders() as readers:
        for image, fields in images:
            if not image.image_id:
                raise ArgumentError(
                    f"the image {image.image_path!r} has no image_id, which names it in the tar: give it one"
                )
            key = keys.give(image.image_id, image.shard)
            write_sample(tar.writer, key, image.image_id, contents_of(image, readers))
            rows.add(image, key, fields)
            renamed += key != image.image_id
    return rows, renamed


def _leave(
    settings: OutputSettings, name: str, shard: str, tar: TarOutput, rows: Rows, written: dict[str, int]
) -> Remainder:
    """Put a short tar and its rows where the last step finds them."""
    stem = f"{REMAINDERS}/{name}"
    move(settings, f"{shard}.tar", f"{stem}.tar")
    written[f"{stem}.tar"] = tar.index.size
    written |= write_rows(settings, f"{stem}.parquet", rows.table(name, settings.columns))
    footer = parquet.read_summary(settings.url(f"{stem}.parquet"), settings.storage_options).footer
    assert footer is not None
    return Remainder(name, len(rows), tar.index.size, f"{tar.digest}-{footer.digest}")


def write_results(settings: OutputSettings, images: Images) -> GroupOutput:
    """Write the images' results alone: one Parquet file for each source shard, under its name.

    Raises
    ------
    ArgumentError
        If an image says no shard, or the images of one shard do not follow each other.
    """
    done = GroupOutput()
    for shard, some in groupby(images, key=lambda one: one[0].shard):
        rows, names, source = Rows(), set[str](), None
        for image, fields in some:
            if not shard or shard in done.shards:
                why = "says no shard" if not shard else f"comes after those of other shards than its own, {shard!r}"
                raise ArgumentError(
                    f"image {image.image_id!r} ({image.image_path!r}) {why}: with write_images=False, results are "
                    "written shard by shard"
                )
            rows.add(image, image.image_id, fields)
            names |= {*fields.names} or _json_names(image)
            source = source or image.source
        identity = None if source is None else files.identify(source.tar_url, source.storage_options).to_dict()
        table = rows.results_table(shard, settings.columns, names)
        done.shards.append(shard)
        done.rows += len(rows)
        done.files |= write_rows(settings, f"{shard}.parquet", table, source=identity)
    return done


def _json_names(image: ImageObject) -> set[str]:
    """Return the fields of a sample's JSON: a source without Parquet has these as columns."""
    try:
        fields = json.loads(image.files.get("json", b"{}"))
    except (ValueError, RecursionError):
        return set()
    return {*fields} if isinstance(fields, dict) else set()
