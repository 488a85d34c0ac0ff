"""The last stage of a pipeline: writes images, with all that is known of them, as a dataset."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash

from nemo_image import schema
from nemo_image.errors import ArgumentError, DatasetError, PipelineError
from nemo_image.shards import files
from nemo_image.stages.base import Fields, ProcessingStage, RunContext
from nemo_image.stages.record import GroupRecord
from nemo_image.stages.tasks import FileGroup, ImageBatch, Task
from nemo_image.stages.writing.group_output import GroupOutput, images_of, write_group, write_results
from nemo_image.stages.writing.output_folder import (
    PACKED,
    claim,
    earlier_output,
    remove_leftovers,
    remove_remainders,
    require_inputs_elsewhere,
    sweep,
)
from nemo_image.stages.writing.packing import pack
from nemo_image.stages.writing.shard_output import OutputSettings

logger = logging.getLogger("nemo_image")

SHARDS = "shards"
"""What the metadata of our output tasks say, and of no others: they are those of `GroupOutput`."""


@dataclass
class ImageWriterStage(ProcessingStage[ImageBatch, FileGroup]):
    """Writes images as tars of exactly `images_per_tar`, with an index and a Parquet file beside each.

    Every member of a sample is copied byte for byte; what stages changed (captions, image bytes, added files) is
    written as changed. The Parquet file has a row for each image: its key, the shard and key that it comes from, the
    caption, all metadata, width and height, embedding, scores, and why it could not be decoded. The folder loads with
    ``ImageTextPairDataset.from_webdataset``, `webdataset` and pandas.

    A file group writes its full tars, ``<group>-00000.tar`` and on. What is left over waits in
    ``_nemo_image/remainders`` until all groups are done, and is then packed in the groups' order into
    ``packed-00000.tar`` and on, so that only the last tar of the run is short.

    Keys stay as they are. A key that its tar has already gets the name of its shard in front, a key that would lead out
    of the folder that a tar is unpacked in is made harmless; then the ``key`` in the sample's JSON is changed too.

    Parameters
    ----------
    output_dir : str
        A folder or any fsspec URL, which all workers can write to. It holds nothing else, and no input.
    images_per_tar : int, default 1000
    verbose : bool, default False
        Log a line for each file group.
    deterministic_name : bool, default True
        Names are always made of the input's names; False is refused.
    remove_image_data : bool, default False
        Free the decoded pixels once an image is written.
    write_images : bool, default True
        With False, no tars: one Parquet file for each source shard, under its name, of the results alone. Such a folder
        serves as one of the ``sidecars`` of ``from_webdataset`` for the source.
    replace : bool, default False
        Remove what another pipeline, or this one for input of another folder, has written to `output_dir`. Nothing else
        is ever removed.
    storage_options : dict, optional
        For fsspec.

    Raises
    ------
    ArgumentError
        If an argument is out of range.
    """

    output_dir: str
    images_per_tar: int = 1000
    verbose: bool = False
    deterministic_name: bool = True
    remove_image_data: bool = False
    write_images: bool = True
    replace: bool = False
    storage_options: dict[str, Any] | None = None
    name: str = "image_writer"
    _token: str = field(default="", init=False, repr=False)
    _inputs: frozenset[str] = field(default=frozenset(), init=False, repr=False)
    _replaced: frozenset[str] = field(default=frozenset(), init=False, repr=False)
    _columns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, init=False, repr=False)

    thread_safe = True

    def __post_init__(self) -> None:
        if not isinstance(self.output_dir, str | os.PathLike) or not os.fspath(self.output_dir):
            raise ArgumentError(f"output_dir must be a folder or URL, not {self.output_dir!r}")
        self.output_dir = files.folder(self.output_dir)
        size = self.images_per_tar
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ArgumentError(f"images_per_tar must be a whole number, at least 1, not {size!r}")
        if not self.deterministic_name:
            raise ArgumentError(
                "deterministic_name=False: names are always made of the input's names, so that a repeated task writes "
                "the same files again; leave it True"
            )

    def inputs(self) -> Fields:
        """Return what the stage needs."""
        return ["data"], ["image_id"]

    def outputs(self) -> Fields:
        """Return what the stage adds."""
        return ["data"], []

    def output_folder(self) -> str:
        """Return the folder that the stage writes to."""
        return self.output_dir

    def outputs_intact(self, outputs: Sequence[Task[Any]]) -> bool:
        """Tell whether all files that were written for a group, its remainder included, are still there."""
        settings = self._settings()
        done = [GroupOutput.from_dict(task.metadata) for task in outputs if SHARDS in task.metadata]
        return bool(done) and all(settings.size(name) == size for one in done for name, size in one.files.items())

    # On the client ---------------------------------------------------------------------------------------------------

    def prepare(self, context: RunContext) -> ImageWriterStage:
        """Look at the output folder.

        Raises
        ------
        ArgumentError
            If it holds an input file.
        DatasetError
            If it holds another dataset.
        """
        prepared = copy.copy(self)
        prepared._token = context.token
        settings = prepared._settings()
        require_inputs_elsewhere(settings, context.groups)
        prepared._inputs = frozenset(group.root for group in context.groups)
        prepared._replaced = earlier_output(settings, prepared._inputs, replace=self.replace)
        return prepared

    def connect(self, earlier: Sequence[ProcessingStage[Any, Any]], later: Sequence[ProcessingStage[Any, Any]]) -> None:
        """Learn which columns of results the stages before make, and make the output folder the pipeline's own.

        Raises
        ------
        PipelineError
            If there is a stage behind: what is written changes until all groups are done.
        """
        if later:
            raise PipelineError(
                f"stage {later[0].name!r} comes after {self.name!r}, which must be the last: its tars are complete "
                "only when all file groups are done"
            )
        made_by = {name: made for stage in earlier for name, made in stage.column_fingerprints().items()}
        # Those of the source stay, and are no stage's.
        self._columns = {name: made for name, made in made_by.items() if name not in (schema.WIDTH, schema.HEIGHT)}

        # Not before: nothing is removed for a pipeline that is refused.
        claim(self._settings(), self._inputs, self._replaced)
        self._replaced = frozenset()

    def finish(self, context: RunContext, finished: Sequence[GroupRecord]) -> dict[str, Any]:
        """Pack what groups have left over, and remove what is no output of this run.

        Raises
        ------
        RunError
            If tars could not be packed.
        DatasetError
            If a record does not say what was written.
        """
        settings = self._settings()
        done = [self._written(record) for record in finished]
        remainders = [one.remainder for one in done if one.remainder is not None]
        packed = pack(settings, remainders)
        shards = [*(shard for one in done for shard in one.shards), *(one.shard for one in packed)]
        groups = {*(group.name for group in context.groups), *(record.name for record in finished)}
        removed = remove_leftovers(settings, set(shards), groups)
        if removed:
            logger.info("%s: removed %d shards of earlier runs or failed groups", self.name, len(removed))
        remove_remainders(settings, [one.name for one in remainders] if context.checkpoint_path else ())
        sweep(settings)
        return {
            "shards": len(shards),
            "rows": sum(one.rows for one in done),
            "output_dir": self.output_dir,
            "rewritten keys": sum(one.renamed for one in done) + sum(one.renamed for one in packed),
        }

    def _written(self, record: GroupRecord) -> GroupOutput:
        for task in record.outputs:
            if SHARDS in task.metadata:
                return GroupOutput.from_dict(task.metadata)
        raise DatasetError(
            f"the record of file group {record.name!r} does not say what was written for it: remove the checkpoint, "
            "and run again"
        )

    # In a task -------------------------------------------------------------------------------------------------------

    def process(self, task: ImageBatch) -> FileGroup:
        """Write one batch, as a file group of its own that leaves nothing over: its last tar may be short."""
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", task.task_id) or _name_of(task)
        return self._write(iter([task]), FileGroup(name=name), leaves_rest=False)

    def stream(self, tasks: Iterator[ImageBatch], group: FileGroup) -> Iterator[FileGroup]:
        """Write the batches of a file group as they come; yield one task, at the end."""
        yield self._write(tasks, group, leaves_rest=True)

    def _write(self, tasks: Iterator[ImageBatch], group: FileGroup, *, leaves_rest: bool) -> FileGroup:
        if not group.name or "/" in group.name or group.name.startswith(".") or group.name == PACKED:
            raise ArgumentError(
                f"the file group's name {group.name!r} is to name tars: give one without slashes, not beginning with a "
                f"dot, and not {PACKED!r}"
            )
        settings = self._settings()
        images = images_of(tasks, drop_pixels=self.remove_image_data)
        if self.write_images:
            done = write_group(settings, group.name, images, leaves_rest=leaves_rest)
        else:
            done = write_results(settings, images)
        if done.renamed_in_all:
            self.log_metric("renamed", done.renamed_in_all)
        if self.verbose:
            left = done.remainder.rows if done.remainder else 0
            logger.info(
                "%s: %s: %d images in %d files, %d of them left over",
                self.name,
                group.name,
                done.rows,
                len(done.shards),
                left,
            )
        wanted = [name for shard in done.shards for name in (f"{shard}.tar", f"{shard}.parquet") if name in done.files]
        return FileGroup(
            data=[settings.url(name) for name in wanted],
            task_id=group.task_id or group.name,
            dataset_name=group.dataset_name,
            metadata=done.to_dict(),
            name=group.name,
            index=group.index,
            root=settings.root,
            storage_options=settings.storage_options,
        )

    def _settings(self) -> OutputSettings:
        return OutputSettings(
            root=self.output_dir.rstrip("/") or "/",
            images_per_tar=self.images_per_tar,
            token=self._token,
            columns=self._columns,
            nested=not self.write_images,
            storage_options=self.storage_options or {},
        )


def _name_of(task: ImageBatch) -> str:
    """Return a name for a batch that has none, made of its images' names."""
    names = "\n".join(f"{image.shard}/{image.image_id}" for image in task.data)
    return f"batch-{xxhash.xxh3_64_hexdigest(names.encode('utf-8', 'surrogatepass'))[:8]}"
