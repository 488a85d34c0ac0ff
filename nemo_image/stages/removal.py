"""Remove the images whose ids are on a list."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_image.errors import ArgumentError, DatasetError, IdMismatchError
from nemo_image.shards import files
from nemo_image.shards.keys import match_ids
from nemo_image.shards.read import ShardReader
from nemo_image.stages.base import Fields, ProcessingStage, RunContext
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.reading.samples import shard_name
from nemo_image.stages.removing.id_set import Ids, number_of
from nemo_image.stages.removing.removal_list import RemovalList
from nemo_image.stages.tasks import FileGroup, ImageBatch

logger = logging.getLogger("nemo_image")


@dataclass
class ImageDuplicatesRemovalStage(ProcessingStage[ImageBatch, ImageBatch]):
    """Removes images whose ids are in Parquet files, such as a deduplication workflow writes.

    Where the files have a column ``shard`` (the tar's path below the input folder, without ``.tar``), an image is
    removed by its shard and id, because ids may repeat in other shards, and a task reads the ids of its own shards
    alone (files sorted by shard are read in part). Without it, an image is removed by its id, whatever its shard, and
    each process holds all ids once.

    An id that is a string names the key that equals it, an integer the key that is a decimal number of that value,
    zero-padded or not; failing that, the last part of the key's path counts, as in datasets.

    Parameters
    ----------
    removal_parquets_dir : str
        Parquet files in and below this folder are read (names that begin with a dot or an underscore do not count).
        Files without rows are fine.
    duplicate_id_field : str, default "id"
        Their column of ids.
    verbose : bool, default False
        Log a line for each file group.
    num_workers_per_node : None
        Not needed: all tasks of a process share one copy of the ids.
    storage_options : dict, optional
        For fsspec, of the list.
    remove_image_data : bool, default False
        Free the decoded pixels afterwards. The stored file stays.

    Raises
    ------
    ArgumentError
        If an argument is unusable.
    """

    removal_parquets_dir: str
    duplicate_id_field: str = "id"
    verbose: bool = False
    num_workers_per_node: int | None = None
    storage_options: dict[str, Any] | None = None
    remove_image_data: bool = False
    name: str = "image_dedup_filter"
    _list: RemovalList | None = field(default=None, init=False, repr=False)

    thread_safe = True

    def __post_init__(self) -> None:
        if not os.fspath(self.removal_parquets_dir):
            raise ArgumentError("removal_parquets_dir is empty: give the folder of the ids to remove")
        self.removal_parquets_dir = files.folder(self.removal_parquets_dir)
        if not isinstance(self.duplicate_id_field, str) or not self.duplicate_id_field:
            raise ArgumentError(f"duplicate_id_field must be the name of a column, not {self.duplicate_id_field!r}")
        if self.num_workers_per_node is not None:
            raise ArgumentError(
                f"num_workers_per_node={self.num_workers_per_node!r} is not needed: it kept many copies of the ids "
                "from filling the memory, and here all tasks of a process share one; leave it out"
            )

    def inputs(self) -> Fields:
        """Return what the stage needs."""
        return ["data"], ["image_id", "shard"]

    def outputs(self) -> Fields:
        """Return what the stage adds."""
        return ["data"], []

    def prepare(self, context: RunContext) -> ImageDuplicatesRemovalStage:
        """Look at the list.

        Raises
        ------
        DatasetError
            If there is no list, or it names none of the run's shards.
        MissingColumnError
            If a file of it has no column of ids.
        IdMismatchError
            If ids are null, or neither strings nor integers.
        """
        prepared = copy.copy(self)
        tars = ((url, group.root) for group in context.groups for url in group.data if url.lower().endswith(".tar"))
        shards = [shard_name(url, root) for url, root in tars]
        prepared._list = self._open(shards)
        return prepared

    def made_of(self) -> Any:
        """Return what tells the list from others."""
        return None if self._list is None else self._list.token

    def process(self, task: ImageBatch) -> ImageBatch:
        """Return a batch without the images on the list."""
        return next(self.stream(iter([task]), FileGroup()))

    def stream(self, tasks: Iterator[ImageBatch], group: FileGroup) -> Iterator[ImageBatch]:
        """Yield each batch without the images on the list.

        Raises
        ------
        DatasetError
            If the list says shards, and an image does not.
        IdMismatchError
            If an integer names several keys of a shard.
        """
        if self._list is None:
            self._list = self._open([])
        finder = _Finder(self._list)
        seen = removed = 0
        for task in tasks:
            kept = [image for image, goes in zip(task.data, finder.find(task.data), strict=True) if not goes]
            seen, removed = seen + len(task.data), removed + len(task.data) - len(kept)
            if self.remove_image_data:
                for image in kept:
                    image.drop_pixels()
            self.log_metric("removed", len(task.data) - len(kept))
            yield task.with_images(kept)
        if self.verbose:
            logger.info("%s: %s: %d of %d images removed", self.name, group.name or group.task_id, removed, seen)

    def _open(self, shards: Sequence[str]) -> RemovalList:
        return RemovalList.open(self.removal_parquets_dir, self.duplicate_id_field, shards, self.storage_options)


class _Finder:
    """Finds the images of a file group that are on a list, shard by shard."""

    def __init__(self, removal: RemovalList) -> None:
        self._removal = removal
        self._shard: str | None = None
        self._ids: Ids | None = None
        self._named: dict[str, str] = {}
        self._keys: Sequence[str] | None = None

    def find(self, images: Sequence[ImageObject]) -> list[bool]:
        """Tell which images are on the list."""
        found: list[bool] = []
        start = 0
        while start < len(images):
            shard = images[start].shard
            stop = next((n for n in range(start, len(images)) if images[n].shard != shard), len(images))
            if shard != self._shard:
                self._enter(shard, images[start])
            found += self._find(images[start:stop])
            start = stop
        return found

    def _enter(self, shard: str, image: ImageObject) -> None:
        if self._removal.by_shard and not shard:
            raise DatasetError(
                f"{image!r} says no shard, but {self._removal.root} lists ids by shard: read the images with "
                "ImageReaderStage, or give a list without a column 'shard'"
            )
        self._shard, self._named, self._keys = shard, {}, None
        self._ids = self._removal.ids_of(shard) if self._removal.by_shard else self._removal.ids()

    def _find(self, images: Sequence[ImageObject]) -> list[bool]:
        assert self._ids is not None
        keys = [image.image_id for image in images]
        if not len(self._ids):
            return [False] * len(keys)
        numbers = [number_of(key) for key in keys] if len(self._ids.numbers) else [None] * len(keys)
        by_text, by_number = self._ids.texts.has(keys), self._ids.numbers.has(numbers)
        for key, number, is_named in zip(keys, numbers, by_number, strict=True):
            if is_named and number is not None:
                self._name(number, key)
        return [
            text or number or ("/" in image.image_id and self._by_base_name(image))
            for text, number, image in zip(by_text, by_number, images, strict=True)
        ]

    def _name(self, number: str, key: str) -> None:
        """Note which key an integer names; raise if it names two."""
        other = self._named.setdefault(number, key)
        if other != key:
            raise IdMismatchError(
                f"{self._removal.root}: the id {number} names several samples of shard {self._shard!r}, {other!r} and "
                f"{key!r}: give ids that equal the keys as strings"
            )

    def _by_base_name(self, image: ImageObject) -> bool:
        """Tell whether the last part of a key's path is on the list, and means this key and no other of its tar."""
        assert self._ids is not None
        base = image.image_id.rpartition("/")[2]
        number = number_of(base)
        candidates: list[str | int] = [base] if self._ids.texts.has([base])[0] else []
        if number is not None and self._ids.numbers.has([number])[0]:
            candidates.append(int(number))
        if not candidates or image.source is None:
            return False
        if self._keys is None:
            options: Mapping[str, Any] = image.source.storage_options
            with ShardReader(image.source.tar_url, options) as reader:
                self._keys = [sample.key for sample in reader.index.samples]
        return any(place >= 0 and self._keys[place] == image.image_id for place in match_ids(candidates, self._keys))
