"""Embeds the images of batches with a timm model: CLIP ViT-L/14 by default."""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_image import schema
from nemo_image.embedders import TimmImageEmbedder
from nemo_image.embedders.base import finished
from nemo_image.embedders.prepared import PreparedNetworkEmbedder
from nemo_image.embedders.preprocess import Preprocessor, normalize, preprocess_pixels, spec_from_transform
from nemo_image.engine import threads
from nemo_image.engine.in_order import map_in_order
from nemo_image.errors import ArgumentError
from nemo_image.stages.base import Fields, ProcessingStage, Resources, RunContext
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.models import check_model_dir, provide_weights, timm_name
from nemo_image.stages.tasks import FileGroup, ImageBatch

logger = logging.getLogger("nemo_image")

_Vectors = list[npt.NDArray[Any] | None]


@dataclass
class ImageEmbeddingStage(ProcessingStage[ImageBatch, ImageBatch]):
    """Gives each image its embedding, L2-normalised: ``image.embedding``, float32 (size,).

    The embeddings are those that :class:`~nemo_image.embedders.TimmImageEmbedder` makes: the reader prepares the
    model's input while it decodes, with the same preprocessing.

    Parameters
    ----------
    model_dir : str, optional
        A folder with ``<model name>.safetensors``, ``.pt`` or ``.pth``; weights that are not there are brought there
        from the hub. Without it, the hub's own cache is used. All workers must see it.
    num_gpus_per_worker : float, default 0.25
        The share of a GPU: with 0.25, four tasks of a worker use it at once, with one copy of the model. 0 is the CPU.
    model_inference_batch_size : int, default 32
        Images that the model sees at once, whatever the batches that flow by.
    verbose : bool, default False
        Log a line for each file group.
    remove_image_data : bool, default False
        Free the decoded pixels afterwards. The stored file stays.
    model_name : str, default "openai/clip-vit-large-patch14"
        The hub's or timm's name.
    autocast : bool, default True
        Let a probe on the client choose reduced precision, where that is faster and keeps a cosine of 0.999.
    random_weights : bool, default False
        Take a network with seeded random weights: for tests.

    Raises
    ------
    ArgumentError
        If an argument is out of range.
    """

    model_dir: str | None = None
    num_gpus_per_worker: float = 0.25
    model_inference_batch_size: int = 32
    verbose: bool = False
    remove_image_data: bool = False
    name: str = "image_embedding"
    model_name: str = "openai/clip-vit-large-patch14"
    autocast: bool = True
    random_weights: bool = False
    _embedder: PreparedNetworkEmbedder | None = field(default=None, init=False, repr=False)

    thread_safe = True

    def __post_init__(self) -> None:
        self.model_dir = check_model_dir(self.model_dir)
        size = self.model_inference_batch_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ArgumentError(f"model_inference_batch_size must be a whole number, at least 1, not {size!r}")
        if self.random_weights and self.model_dir is not None:
            raise ArgumentError("give model_dir or random_weights=True, not both")
        self.resources = Resources(gpus=self.num_gpus_per_worker)

    def inputs(self) -> Fields:
        """Return what the stage needs."""
        return ["data"], ["image_data"]

    def outputs(self) -> Fields:
        """Return what the stage adds."""
        return ["data"], ["embedding"]

    # On the client ---------------------------------------------------------------------------------------------------

    def prepare(self, context: RunContext) -> ImageEmbeddingStage:
        """Find the weights, build the model, and settle the number type.

        Raises
        ------
        UnknownModelError, WeightsError
            Before any task starts.
        """
        prepared = copy.copy(self)
        prepared._embedder = self.load_embedder(context.device(self.resources.gpus))
        before = context.settled.get(self.name, {}).get("dtype")
        if before is not None:
            prepared._embedder.dtype = before
        elif self.autocast and context.groups:
            first = context.groups[0]
            tars = [url for url in first.data if url.endswith(".tar")]
            prepared._embedder.dtype = prepared._embedder.probed_dtype(tars[:3], first.storage_options)
        return prepared

    def load_embedder(self, device: str) -> PreparedNetworkEmbedder:
        """Find the weights, and return the embedder on a device."""
        weights = None if self.model_dir is None else provide_weights(self.model_dir, self.model_name)
        embedder = TimmImageEmbedder(
            timm_name(self.model_name),
            weights=weights,
            pretrained=weights is None and not self.random_weights,
            batch_size=self.model_inference_batch_size,
            autocast=self.autocast,
        )
        return embedder.load(device)

    def settled(self) -> dict[str, Any]:
        """Return what the client found out: the number type."""
        return {} if self._embedder is None else {"dtype": self._embedder.dtype}

    def column_fingerprints(self) -> Mapping[str, Mapping[str, Any]]:
        """Return what makes the embeddings, as the operator says it."""
        return {} if self._embedder is None else {schema.IMAGE_EMBEDDING: self._embedder.fingerprint()}

    def model_input(self) -> NetworkInput | None:
        """Return what the reader can make ahead of the model."""
        return None if self._embedder is None else NetworkInput(self._embedder)

    # In a task -------------------------------------------------------------------------------------------------------

    def process(self, task: ImageBatch) -> ImageBatch:
        """Embed the images of one batch."""
        return next(self.stream(iter([task]), FileGroup()))

    def stream(self, tasks: Iterator[ImageBatch], group: FileGroup) -> Iterator[ImageBatch]:
        """Embed images as they come, in model batches that reach across the batches that flow by.

        Where a task may keep several cores busy, several model batches are computed at once, each with one thread, as
        the operator does: other numbers of threads would give other last bits.
        """
        if self._embedder is None:
            self._embedder = self.load_embedder("cpu")
        self._embedder.model()
        waiting: deque[tuple[ImageBatch, int]] = deque()
        drawn = done = 0

        def model_batches() -> Iterator[list[ImageObject]]:
            nonlocal drawn
            rest: list[ImageObject] = []
            for task in tasks:
                drawn += len(task.data)
                waiting.append((task, drawn))
                rest += task.data
                while len(rest) >= self.model_inference_batch_size:
                    yield rest[: self.model_inference_batch_size]
                    rest = rest[self.model_inference_batch_size :]
            if rest:
                yield rest

        workers = threads.task_share() if self._embedder.device == "cpu" else 1
        alone = partial(threads.set_own_torch_threads, 1)
        work = self.work(self._embedder)
        with threads.torch_threads(1):
            for images, vectors in map_in_order(work, model_batches(), workers, alone):
                self._note(images, vectors)
                done += len(images)
                while waiting and waiting[0][1] <= done:
                    yield waiting.popleft()[0]
            while waiting:
                yield waiting.popleft()[0]
        if self.verbose:
            logger.info("%s: %s: %d images", self.name, group.name, drawn)

    def work(self, embedder: PreparedNetworkEmbedder) -> Embedding:
        """Return what embeds images, as many as the model is to see at once."""
        return Embedding(embedder)

    def _note(self, images: Sequence[ImageObject], vectors: _Vectors) -> None:
        for image, vector in zip(images, vectors, strict=True):
            image.embedding = vector
            if vector is None:
                self.log_metric("without embedding")
            if self.remove_image_data:
                image.drop_pixels()
            else:
                image.prepared = {}


class NetworkInput:
    """The input of a library's network, for the reader to make."""

    def __init__(self, embedder: PreparedNetworkEmbedder) -> None:
        self._embedder = embedder

    @property
    def key(self) -> str:
        """Equal for equal inputs."""
        return str(sorted(self._embedder.preprocessing.items()))

    def preprocessor(self, num_threads: int) -> Preprocessor:
        """Return what makes it of the bytes of pictures."""
        return self._embedder.preprocessor(self._embedder.device, num_threads)


class Embedding:
    """Embeds images, as many as the model is to see at once."""

    def __init__(self, embedder: PreparedNetworkEmbedder) -> None:
        self.embedder = embedder
        self.key = NetworkInput(embedder).key

    def __call__(self, images: list[ImageObject]) -> tuple[list[ImageObject], _Vectors]:
        """Return the images with the embedding of each; None where there is none: ``image_error`` says why."""
        ready = [row for row, image in enumerate(images) if self._is_ready(image)]
        vectors: _Vectors = [None] * len(images)
        if ready:
            made = finished(
                self.embedder.embed(self._input([images[row] for row in ready])),
                np.arange(len(ready)),
                {},
                normalize=self.embedder.normalize_embeddings,
            )
            for place, vector in zip(made.rows.tolist(), made.matrix, strict=True):
                vectors[ready[place]] = vector
            for place, reason in made.errors.items():
                images[ready[place]].image_error = reason
        return images, vectors

    def _is_ready(self, image: ImageObject) -> bool:
        """Tell whether there is an input for the image, making it if need be."""
        if image.image_error is None and self.key not in image.prepared:
            self._prepare(image)
        return image.image_error is None and self.key in image.prepared

    def _prepare(self, image: ImageObject) -> None:
        """Make the input of an image that the reader did not prepare, or whose pixels a stage has changed."""
        if image.holds_pixels:
            batch = preprocess_pixels(self.embedder.transform, [image.image_data])  # type: ignore[list-item]
        else:
            batch = self.embedder.preprocessor("cpu", 1)([image.image_bytes])
        if batch.errors[0] is not None:
            image.image_error = batch.errors[0]
            return
        image.prepared[self.key] = batch.pixels[0]

    def _input(self, images: Sequence[ImageObject]) -> Any:
        import torch

        device = self.embedder.device
        pixels = torch.stack([image.prepared[self.key].to(device) for image in images])
        spec = spec_from_transform(self.embedder.transform)
        return pixels if spec is None or pixels.dtype != torch.uint8 else normalize(pixels, spec)
