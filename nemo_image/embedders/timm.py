"""Embeddings from any timm model."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from nemo_image import schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.samples import samples_of_rows
from nemo_image.datasets.shard_pass import open_tar
from nemo_image.datasets.source import DatasetSource
from nemo_image.embedders import timm_models
from nemo_image.embedders.autocast import candidate_dtype, probe_dtype
from nemo_image.embedders.base import ImageEmbedder, ShardEmbeddings, finished
from nemo_image.embedders.forward import embed, forward, on_device, ready_to_run, require_compiler
from nemo_image.embedders.pictures import prepared_batches
from nemo_image.embedders.preprocess import (
    GuardedPreprocessor,
    IsolatedPreprocessor,
    PreprocessedBatch,
    Preprocessor,
    make_preprocessor,
    spec_from_transform,
    start_ahead,
)
from nemo_image.engine import threads
from nemo_image.engine.in_order import map_in_order
from nemo_image.engine.model_cache import ModelSpec, get_model
from nemo_image.errors import ArgumentError, WeightsError
from nemo_image.shards.read import ShardReader

logger = logging.getLogger("nemo_image")

AUTO_BATCH_SIZE = {"cpu": 32, "cuda": 256}
CONVOLUTIONS_BATCH_SIZE = 8
"""On the CPU: the layers of more pictures leave the caches (``docs/performance.md``)."""
PROBED_IMAGES = 64

_Prepared = tuple[range, PreprocessedBatch]
_Embedded = tuple[range, PreprocessedBatch, npt.NDArray[Any] | None]

Decoder = Literal["auto", "torchvision", "dali", "pillow"]


class TimmImageEmbedder(ImageEmbedder):
    """Adds embeddings from a `timm <https://github.com/huggingface/pytorch-image-models>`_ model.

    CLIP image towers keep their projection head; other models give their pooled features.

    Parameters
    ----------
    model_name : str
        A timm name, for example ``"vit_large_patch14_clip_quickgelu_224.openai"``.
    pretrained : bool, default False
        Take the weights from the hub (or its cache on this machine). With neither this nor `weights` the network is
        random (seeded, the same on every worker), which suits tests only.
    weights : str or path, optional
        A local file of weights: ``.safetensors``, ``.pt`` or ``.pth``.
    batch_size : int or "auto", default "auto"
        Images at once. By default 256 on a GPU; on the CPU 8 for convolutional networks and 32 for others.
    num_threads_per_worker : int, default 4
        Decoding threads of a task at most; the cores are shared out among the tasks of a machine.
    image_embedding_column : str, default "image_embedding"
        The column to add.
    normalize_embeddings : bool, default True
        Whether to divide each embedding by its L2 norm, as this project's classifiers expect.
    classifiers : iterable of ImageClassifier
        Score the embeddings in the same pass.
    autocast : bool, default True
        Let a probe on the client choose reduced precision, where that is faster and keeps a cosine of 0.999.
    use_index_files : bool, default False
        Read the tars by the ``.idx`` files beside them, where they are right.
    embedding_dtype : {"float32", "float16"}
        The precision in which embeddings are kept.
    decoder : {"auto", "torchvision", "dali", "pillow"}
        What decodes and resizes: torchvision on the CPU and DALI on a GPU by default. All agree to a cosine of 0.999.
    compile_model : bool, default False
        Run the model through ``torch.compile``, which needs a C++ compiler, and up to a minute at each process's start.
    reduced_decode : bool, default False
        Decode a JPEG at a half, a quarter or an eighth of its size where that is still twice as large as what it is
        resized to. Faster for pictures of 1000 pixels and more; embeddings agree less well with the reference
        transform's (``docs/performance.md`` has figures). Only with torchvision's decoder.
    """

    adds_sizes = True

    def __init__(
        self,
        model_name: str,
        *,
        pretrained: bool = False,
        weights: str | os.PathLike[str] | None = None,
        batch_size: int | Literal["auto"] = "auto",
        num_threads_per_worker: int = 4,
        image_embedding_column: str = schema.IMAGE_EMBEDDING,
        normalize_embeddings: bool = True,
        classifiers: Iterable[Callable[[ImageTextPairDataset], ImageTextPairDataset]] = (),
        autocast: bool = True,
        use_index_files: bool = False,
        embedding_dtype: str = "float32",
        decoder: Decoder = "auto",
        compile_model: bool = False,
        reduced_decode: bool = False,
    ) -> None:
        super().__init__(
            model_name,
            image_embedding_column,
            classifiers,
            normalize_embeddings=normalize_embeddings,
            embedding_dtype=embedding_dtype,
        )
        self.pretrained = pretrained
        self.weights = None if weights is None else os.fspath(weights)
        self.batch_size = batch_size
        self.num_threads_per_worker = num_threads_per_worker
        self.autocast = autocast
        self.use_index_files = use_index_files
        self.decoder = decoder
        self.compile_model = compile_model
        self.reduced_decode = reduced_decode

    # On the client ---------------------------------------------------------------------------------------------------

    def prepare(self, dataset: ImageTextPairDataset) -> PreparedTimmEmbedder:
        """Check the arguments and the weights, and settle the number type.

        Raises
        ------
        ArgumentError, UnknownModelError, WeightsError
            Before any task starts.
        """
        super().prepare(dataset)
        self._check_arguments()
        if self.autocast and self.image_embedding_column not in dataset.provenance and candidate_dtype("cpu"):
            start_ahead()  # the probe's child process, while the model is built
        prepared = self.load()
        if self.autocast:
            prepared.dtype = prepared.settled_dtype(dataset)
        return prepared

    def load(self, device: str = "cpu") -> PreparedTimmEmbedder:
        """Check the arguments, load the weights, and return what tasks carry, to run on `device` in float32.

        Raises
        ------
        ArgumentError, UnknownModelError, WeightsError
        """
        self._check_arguments()
        timm_models.check_name(self.model_name)
        model, identity = timm_models.identified_model(self.model_name, self.pretrained, self.weights)
        if identity == timm_models.RANDOM_WEIGHTS:
            logger.warning(
                "%s has no trained weights (pretrained=False and no weights=): its embeddings are those of a random "
                "network",
                self.model_name,
            )
        size, transform = timm_models.describe(self.model_name)
        preprocessing = _transform_record(transform)
        if self.reduced_decode:
            preprocessing["reduced_decode"] = True  # other embeddings: not what earlier rows were made with
        prepared = PreparedTimmEmbedder(self, identity, size, preprocessing, "float32", device)
        network = prepared.model(loaded=model)
        if self.compile_model:
            require_compiler(network, (self.batch_of(device), *timm_models.input_size(model)), device)
        return prepared

    def _check_arguments(self) -> None:
        if self.batch_size != "auto" and (not isinstance(self.batch_size, int) or self.batch_size < 1):
            raise ArgumentError(f"batch_size must be 'auto' or at least 1, not {self.batch_size!r}")
        if self.num_threads_per_worker < 1:
            raise ArgumentError(f"num_threads_per_worker must be at least 1, not {self.num_threads_per_worker}")
        if self.pretrained and self.weights is not None:
            raise ArgumentError("give weights=<a file> or pretrained=True, not both")
        if self.decoder not in ("auto", "torchvision", "dali", "pillow"):
            raise ArgumentError(f"decoder must be 'auto', 'torchvision', 'dali' or 'pillow', not {self.decoder!r}")
        if self.reduced_decode:
            timm_models.check_name(self.model_name)
            self.preprocessor("cpu", self.num_threads_per_worker)  # refuses here what tasks could not do
        if self.weights is not None and not os.path.isfile(self.weights):
            raise WeightsError(f"weights={self.weights!r}: no such file")

    # For those who build on it ---------------------------------------------------------------------------------------

    def load_embedding_model(self, device: str) -> Callable[[Any], Any]:
        """Return the timm model on `device`: normalised pixels (n, 3, height, width) to embeddings (n, size)."""
        model = timm_models.create_model(self.model_name, self.pretrained, self.weights)
        network: Callable[[Any], Any] = ready_to_run(model, device, compiled=self.compile_model)
        return network

    def load_dataset_shard(self, tar_path: str) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
        """Yield the pictures of a tar, decoded and prepared for the model, with their keys.

        Yields
        ------
        batch : tensor of float32, shape (n, 3, height, width)
        metadata : list of dict
            ``key`` of each picture. Pictures that cannot be decoded are left out.
        """
        prepare = self.preprocessor("cpu", self.num_threads_per_worker)
        with ShardReader(tar_path, use_index_file=self.use_index_files) as reader:
            found = [(sample.key, sample.image) for sample in reader.index.samples if sample.image is not None]
            images = [image for _, image in found]
            with contextlib.closing(prepared_batches(reader, images, prepare, self.batch_of("cpu"))) as ready:
                for places, batch in ready:
                    yield on_device(prepare, batch, "cpu"), [{"key": found[places[row]][0]} for row in batch.rows]

    def preprocessor(self, device: str, num_threads: int) -> Preprocessor:
        """Return what turns bytes into the model's input."""
        _, transform = timm_models.describe(self.model_name)
        decoder = self.decoder
        if decoder == "auto":
            decoder = "torchvision" if device == "cpu" else "dali"
        return make_preprocessor(
            transform, decoder=decoder, device=device, num_threads=num_threads, reduced_decode=self.reduced_decode
        )

    def batch_of(self, device: str) -> int:
        """Return the number of images at once on a device."""
        if self.batch_size != "auto":
            return self.batch_size
        if device == "cpu" and timm_models.is_convolutional(self.model_name):
            return CONVOLUTIONS_BATCH_SIZE
        return AUTO_BATCH_SIZE[device.split(":", maxsplit=1)[0]]


class PreparedTimmEmbedder(TimmImageEmbedder):
    """A timm embedder with all that the client settles: what the tasks carry."""

    def __init__(
        self,
        settings: TimmImageEmbedder,
        identity: str,
        size: int,
        preprocessing: Mapping[str, Any],
        dtype: str,
        device: str = "cpu",
    ) -> None:
        self.__dict__.update(settings.__dict__)
        self.classifiers = ()
        self.identity = identity
        self.size = size
        self.preprocessing = dict(preprocessing)
        self.dtype = dtype
        self.device = device

    def prepare(self, dataset: ImageTextPairDataset) -> PreparedTimmEmbedder:
        """Return itself."""
        return self

    def fingerprint(self) -> dict[str, Any]:
        """Return what makes the embeddings. The decoder is no part of it: all of them keep the same promise."""
        return {
            "operator": "TimmImageEmbedder",
            "model": self.model_name,
            "weights_sha256": self.identity,
            "preprocessing": self.preprocessing,
            "dtype": self.dtype,
            "normalized": self.normalize_embeddings,
            "embedding_dtype": self.embedding_dtype,
            "embedding_size": self.size,
        }

    def model(self, loaded: Any = None) -> Any:
        """Return this process's copy of the model, loaded on first use.

        Parameters
        ----------
        loaded : torch.nn.Module, optional
            The model, where the caller has just built it.

        Raises
        ------
        WeightsError
            If the weights on this machine are not those that the client saw.
        """
        kind = "timm, compiled" if self.compile_model else "timm"
        spec = ModelSpec(
            kind=kind, name=self.model_name, weights_sha256=self.identity, dtype="float32", device=self.device
        )
        return get_model(spec, lambda: self._ready(self._load() if loaded is None else loaded))

    def _ready(self, model: Any) -> Any:
        return ready_to_run(model, self.device, compiled=self.compile_model)

    def _load(self) -> Any:
        model, found = timm_models.identified_model(self.model_name, self.pretrained, self.weights)
        if found != self.identity:
            source = self.weights or f"the hub's copy of {self.model_name}"
            raise WeightsError(f"{source} on this machine has SHA-256 {found}, the client's has {self.identity}")
        return model

    def settled_as(self, made_by: Mapping[str, Any]) -> PreparedTimmEmbedder | None:
        """Return the embedder of an earlier run, whose probe chose another number type."""
        same = self.autocast and {**made_by, "dtype": self.dtype} == self.fingerprint()
        if not same or made_by["dtype"] == self.dtype:
            return None
        settled = copy.copy(self)
        settled.dtype = str(made_by["dtype"])
        return settled

    def settled_dtype(self, dataset: ImageTextPairDataset) -> str:
        """Return the number type: the one that finished rows were made with, or what a probe finds."""
        before = dataset.provenance.get(self.image_embedding_column)
        if before is not None and {**before, "dtype": self.dtype} == self.fingerprint():
            return str(before["dtype"])
        source = dataset.source
        return self.probed_dtype([source.tar_url(shard) for shard in dataset.shards[:3]], source.storage_options)

    def probed_dtype(self, tar_urls: Iterable[str], storage_options: Mapping[str, Any]) -> str:
        """Return the number type that a probe finds best for the first pictures of some tars."""
        if candidate_dtype(self.device) is None:
            return self.dtype
        return probe_dtype(self._forward_as, self._probe_pixels(tar_urls, storage_options), self.device)

    def _probe_pixels(self, tar_urls: Iterable[str], storage_options: Mapping[str, Any]) -> Any:
        """Prepare the first pictures of the first tar that has any; none where there is no such tar."""
        import torch

        preprocessor = self.preprocessor(self.device, self.num_threads_per_worker)
        # In a child process: a picture that crashes its decoder must not take the user's notebook with it.
        with IsolatedPreprocessor(preprocessor) as prepare:
            for tar_url in tar_urls:
                with ShardReader(tar_url, storage_options) as reader:
                    images = [one.image for one in reader.index.samples if one.image is not None][:PROBED_IMAGES]
                    batch = prepare(list(reader.read_many(images)))
                if batch.rows:
                    return on_device(prepare, batch, self.device)
        return torch.empty(0)

    # In a task -------------------------------------------------------------------------------------------------------

    def embed_rows(self, source: DatasetSource, shard: str, ids: Sequence[Any]) -> ShardEmbeddings:
        """Embed the rows of one shard that have the ids given, in the order in which their images lie in the tar."""
        with open_tar(source, shard, self.use_index_files) as reader:
            images, errors = samples_of_rows(reader, source, shard, ids)
            rows = np.array(sorted(images, key=lambda row: images[row].offset), np.int64)
            found = ShardEmbeddings(np.zeros((0, self.size), np.float32), np.array([], np.int64), errors)
            vectors: list[npt.NDArray[Any]] = []
            places: list[npt.NDArray[np.int64]] = []
            self.model()
            decode_threads = max(1, min(self.num_threads_per_worker, threads.task_share()))
            with contextlib.ExitStack() as stack:
                prepare = GuardedPreprocessor(self.preprocessor(self.device, decode_threads))
                members = [images[row] for row in rows.tolist()]
                pin = self.device != "cpu"
                ready = prepared_batches(reader, members, prepare, self.batch_of(self.device), pin=pin)
                stack.enter_context(contextlib.closing(ready))
                stack.enter_context(prepare)  # closed first: a thread may be waiting for a decoder
                for cut, batch, made in self._embedded(prepare, ready):
                    batch_rows = rows[cut.start : cut.stop]
                    _note(found, batch_rows, batch)
                    if made is not None:
                        vectors.append(made)
                        places.append(batch_rows[batch.rows])
        if vectors:
            found.matrix, found.rows = np.concatenate(vectors), np.concatenate(places)
            vectors.clear()
        done = finished(found.matrix, found.rows, found.errors, normalize=self.normalize_embeddings)
        done.widths, done.heights = found.widths, found.heights
        return done

    def _embedded(self, prepare: Preprocessor, ready: Iterable[_Prepared]) -> Iterator[_Embedded]:
        """Run the model over batches; in several threads, if the task may keep several busy.

        Each thread's torch works alone: convolutions give other last bits with other numbers of threads, and a rerun
        on another machine, or on what is left of a dataset, must give the same bytes.
        """

        def one(item: _Prepared) -> _Embedded:
            cut, batch = item
            return cut, batch, self.embed(on_device(prepare, batch, self.device)) if batch.rows else None

        workers = threads.task_share() if self.device == "cpu" else 1
        alone = partial(threads.set_own_torch_threads, 1)
        with threads.torch_threads(1):
            yield from map_in_order(one, ready, workers, alone)

    def embed(self, pixels: Any) -> npt.NDArray[Any]:
        """Run the model on normalised pixels; a batch that does not fit the GPU's memory is halved and tried again."""
        return embed(partial(self._forward_as, dtype=self.dtype), pixels)

    def _forward_as(self, pixels: Any, dtype: str) -> Any:
        return forward(self.model(), pixels, dtype, self.device)


def _transform_record(transform: Any) -> dict[str, Any]:
    spec = spec_from_transform(transform)
    return {"transform": repr(transform)} if spec is None else dict(spec.to_dict())


def _note(found: ShardEmbeddings, rows: npt.NDArray[np.int64], batch: PreprocessedBatch) -> None:
    """Keep what the decoder said of each picture of a batch."""
    for place, row in enumerate(rows.tolist()):
        reason, width, height = batch.errors[place], batch.widths[place], batch.heights[place]
        if reason is not None:
            found.errors[row] = reason
        if width is not None and height is not None:
            found.widths[row], found.heights[row] = width, height
