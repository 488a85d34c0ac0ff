"""Reads images from tars, and decodes them ahead of the stages that want their pixels."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from nemo_image import schema
from nemo_image.engine import threads
from nemo_image.engine.prefetch import prefetch
from nemo_image.errors import ArgumentError, ImageError
from nemo_image.shards.decode import MAX_PIXELS
from nemo_image.stages.base import Fields, ProcessingStage, Resources, RunContext
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.model_input import ModelInput
from nemo_image.stages.reading.pixels_ahead import PixelsAhead, Wanted
from nemo_image.stages.reading.samples import Chunk, tar_chunks
from nemo_image.stages.tasks import FileGroup, ImageBatch

logger = logging.getLogger("nemo_image")

OnError = Literal["skip", "raise", "keep"]

_BATCH_SIZE = 100


@dataclass
class ImageReaderStage(ProcessingStage[FileGroup, ImageBatch]):
    """Reads the samples of tars, with their captions, metadata and bytes, in batches.

    Metadata are the sample's row in the Parquet file beside the tar, found by its id; else the fields of its JSON. The
    caption is the sample's ``.txt``, else the metadata's ``caption``. Members larger than a MiB (a caption and JSON:
    16) stay in the tar, but for the image; they are copied when the sample is written.

    Pictures are decoded in threads while later stages work: to pixels if one of those needs ``image_data``, else to
    the inputs of the models that follow, else only to find the bad ones. With ``on_error="keep"`` that last is left
    out, and a bad picture is found by the first who asks for its pixels.

    Batches do not mix tars. They are cut where one would hold more than `batch_size` images, 128 MiB of files or
    512 MiB of pixels, so that memory is flat, whatever the pictures.

    Parameters
    ----------
    batch_size : int, default 100
        Images of a batch, at most.
    verbose : bool, default True
        Log a line for each file group.
    num_threads : int, default 8
        Decoding threads at most; the cores are shared out among the tasks of a machine.
    num_gpus_per_worker : float, default 0.25
        The share of a GPU, where the models that follow have their input decoded there.
    dali_batch_size : int, optional
        An older name of `batch_size`.
    on_error : {"skip", "raise", "keep"}
        What happens to a bad picture, and to a sample without one: it is left out, fails its file group, or is passed
        on with the reason in ``image_error``. Each is counted in any case.
    id_col : str, default "key"
        The column of the Parquet metadata that names a row's sample.
    use_index_files : bool, default False
        Read the tars by the ``.idx`` files beside them, where they are right.
    max_pixels : int, optional
        Larger pictures are bad ones; by default, and at most, 89,478,485 pixels.

    Raises
    ------
    ArgumentError
        If an argument is out of range.
    """

    batch_size: int = _BATCH_SIZE
    verbose: bool = True
    num_threads: int = 8
    num_gpus_per_worker: float = 0.25
    dali_batch_size: int | None = None
    on_error: OnError = "skip"
    id_col: str = "key"
    use_index_files: bool = False
    max_pixels: int = MAX_PIXELS
    name: str = "image_reader"
    _needs_pixels: bool = field(default=False, init=False, repr=False)
    _model_inputs: tuple[ModelInput, ...] = field(default=(), init=False, repr=False)

    thread_safe = True
    works_ahead = True

    def __post_init__(self) -> None:
        if self.dali_batch_size is not None:
            if self.batch_size not in (_BATCH_SIZE, self.dali_batch_size):
                raise ArgumentError("give batch_size or dali_batch_size, not both: they are the same")
            self.batch_size, self.dali_batch_size = self.dali_batch_size, None
        for name in ("batch_size", "num_threads", "max_pixels"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ArgumentError(f"{name} must be a whole number, at least 1, not {value!r}")
        if self.max_pixels > MAX_PIXELS:
            raise ArgumentError(f"max_pixels must be at most {MAX_PIXELS}, not {self.max_pixels}")
        if self.on_error not in get_args(OnError):
            raise ArgumentError(f"on_error must be one of {', '.join(get_args(OnError))}, not {self.on_error!r}")
        if not isinstance(self.id_col, str) or not self.id_col:
            raise ArgumentError(f"id_col must be the name of a column, not {self.id_col!r}")
        self.resources = Resources(gpus=self.num_gpus_per_worker)

    def inputs(self) -> Fields:
        """Return what the stage needs."""
        return ["data"], []

    def outputs(self) -> Fields:
        """Return what the stage adds."""
        added = ["image_path", "image_id", "image_data", "image_bytes", "caption", "metadata", "shard", "source"]
        return ["data"], [*added, "width", "height", "image_error"]

    # On the client ---------------------------------------------------------------------------------------------------

    def prepare(self, context: RunContext) -> ImageReaderStage:
        """Return a copy for the run, which :meth:`connect` may change."""
        return copy.copy(self)

    def connect(self, earlier: Sequence[ProcessingStage[Any, Any]], later: Sequence[ProcessingStage[Any, Any]]) -> None:
        """Find out what later stages want of the pictures."""
        models = [stage for stage in later if hasattr(stage, "model_input")]
        others = [stage for stage in later if not hasattr(stage, "model_input")]
        self._needs_pixels = any("image_data" in stage.inputs()[1] for stage in others)
        made = [one for stage in models if (one := stage.model_input()) is not None]
        self._model_inputs = tuple({one.key: one for one in made}.values())

    # In a task -------------------------------------------------------------------------------------------------------

    def process(self, task: FileGroup) -> list[ImageBatch]:
        """Return all batches of a file group at once; a run streams them.

        Raises
        ------
        ShardError, ImageError
            As :meth:`stream`.
        """
        return list(self.stream(iter([task]), task))

    def stream(self, tasks: Iterator[FileGroup], group: FileGroup) -> Iterator[ImageBatch]:
        """Yield the batches of file groups, tar by tar.

        Raises
        ------
        ShardError
            If a tar or the Parquet file beside it is unreadable, or the two do not fit.
        ImageError
            For a bad picture, with ``on_error="raise"``.
        """
        # Asked here: the batches may be drawn in a thread that knows nothing of the task's share.
        num_threads = max(1, min(self.num_threads, threads.task_share()))
        return self._stream(tasks, group, num_threads)

    def _stream(self, tasks: Iterator[FileGroup], group: FileGroup, num_threads: int) -> Iterator[ImageBatch]:
        account = _Account()
        with contextlib.ExitStack() as stack:
            chunks = stack.enter_context(contextlib.closing(prefetch(self._chunks(tasks), depth=1)))
            ahead = stack.enter_context(PixelsAhead(self._wanted(), num_threads))
            for batch in self._batches(chunks, ahead, account):
                account.pause(len(batch.data))
                yield batch
                del batch  # or its pixels would be held while the next ones are decoded
                account.go_on()
        account.pause(0)
        if self.verbose:
            logger.info("%s: %s: %s", self.name, group.name or group.task_id, account)

    def _wanted(self) -> Wanted:
        if self._needs_pixels:
            return Wanted("pixels", (), self.max_pixels)
        checks = not self._model_inputs and self.on_error != "keep"
        return Wanted("check" if checks else "nothing", self._model_inputs, self.max_pixels)

    def _chunks(self, tasks: Iterator[FileGroup]) -> Iterator[Chunk]:
        for task in tasks:
            for url in task.data:
                yield from tar_chunks(
                    url, task, size=self.batch_size, id_col=self.id_col, use_index_file=self.use_index_files
                )

    def _batches(self, chunks: Iterator[Chunk], ahead: PixelsAhead, account: _Account) -> Iterator[ImageBatch]:
        for chunk in chunks:
            for name, count in chunk.counts.items():
                if count:
                    self.log_metric(name, count)
            first = chunk.first
            for images in ahead.fill(chunk.images):
                kept = [image for image in images if image.image_error is None or self._keeps(image, account)]
                task_id, first = f"{chunk.shard}:{first}", first + len(images)
                del images
                if kept:
                    group = chunk.group
                    yield ImageBatch(kept, task_id, group.dataset_name, dict(group.metadata), chunk.fields)
                del kept

    def _keeps(self, image: ImageObject, account: _Account) -> bool:
        """Count an image that has an error; tell whether it is passed on.

        Raises
        ------
        ImageError
            If it is not to be borne.
        """
        assert image.image_error is not None
        category, _, detail = image.image_error.partition(": ")
        account.bad[category] += 1
        if category == schema.MISSING:
            self.log_metric("samples_without_image")
        else:
            self.log_metric(f"error: {category}")
            if self.on_error == "skip":
                self.log_metric("skipped")
        if self.on_error == "raise":
            raise ImageError(category, f"{image.image_path}: {detail} (on_error='skip' leaves such images out)")
        return self.on_error == "keep"


class _Account:
    """What a file group's line in the log says."""

    def __init__(self) -> None:
        self.bad: Counter[str] = Counter()
        self._images = 0
        self._seconds = 0.0
        self._since = time.perf_counter()

    def pause(self, images: int) -> None:
        self._images += images
        self._seconds += time.perf_counter() - self._since

    def go_on(self) -> None:
        self._since = time.perf_counter()

    def __str__(self) -> str:
        bad = ", ".join(f"{count} {category}" for category, count in sorted(self.bad.items()))
        rate = self._images / self._seconds if self._seconds else 0.0
        return f"{self._images} images, {self.bad.total()} bad{f' ({bad})' if bad else ''}, {rate:.0f} images/s"
