"""What embedders that take a library's network have in common: their settings, and the checks on the client.

What a task carries is in `nemo_image.embedders.prepared`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from nemo_image import backend
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import autocast as autocast_
from nemo_image.embedders.base import ImageEmbedder
from nemo_image.embedders.forward import on_device, ready_to_run, require_compiler
from nemo_image.embedders.network_weights import RANDOM_WEIGHTS
from nemo_image.embedders.pictures import Picture, prepared_batches, prepared_pictures
from nemo_image.embedders.preprocess import Preprocessor, make_preprocessor, spec_from_transform, start_ahead
from nemo_image.engine.device import worker_device
from nemo_image.engine.model_cache import ModelSpec, get_model
from nemo_image.engine.tokens import behaviour_token
from nemo_image.engine.weights import sha256_file
from nemo_image.errors import ArgumentError, WeightsError
from nemo_image.shards import files
from nemo_image.shards.read import ShardReader

if TYPE_CHECKING:
    from nemo_image.embedders.prepared import PreparedNetworkEmbedder

logger = logging.getLogger("nemo_image")

AUTO_BATCH_SIZE = {"cpu": 32, "cuda": 256}
CONVOLUTIONS_BATCH_SIZE = 4
"""On the CPU: the layers of more pictures leave the caches, and exceed the blocks that `engine.allocator` keeps."""

Decoder = Literal["auto", "torchvision", "dali", "pillow"]
Prepared = TypeVar("Prepared", bound="PreparedNetworkEmbedder")


@dataclass(frozen=True)
class NetworkDescription:
    """What is known of a network without its weights.

    Attributes
    ----------
    size : int
        Numbers of an embedding.
    transform : callable
        The network's own evaluation transform.
    input_size : tuple of int
        Channels, height and width of its input.
    convolutional : bool
        Whether it is a convolutional network.
    """

    size: int
    transform: Any
    input_size: tuple[int, int, int]
    convolutional: bool


class NetworkEmbedder(ImageEmbedder):
    """Adds embeddings from a network that a library builds: the base of those for timm and for open_clip.

    A subclass says which network (:meth:`describe_network`, :meth:`check_network`, :meth:`identified_network`).
    """

    adds_sizes = True
    library: str
    """The library's name, in keys of the model cache."""

    def __init__(
        self,
        model_name: str,
        *,
        weights: str | os.PathLike[str] | None,
        batch_size: int | Literal["auto"],
        num_threads_per_worker: int,
        image_embedding_column: str,
        normalize_embeddings: bool,
        classifiers: Iterable[Callable[[ImageTextPairDataset], ImageTextPairDataset]],
        autocast: bool,
        use_index_files: bool,
        embedding_dtype: str,
        decoder: Decoder,
        compile_model: bool,
        reduced_decode: bool,
    ) -> None:
        super().__init__(
            model_name,
            image_embedding_column,
            classifiers,
            normalize_embeddings=normalize_embeddings,
            embedding_dtype=embedding_dtype,
        )
        self.weights = None if weights is None else files.absolute(weights)
        self.batch_size = batch_size
        self.num_threads_per_worker = num_threads_per_worker
        self.autocast = autocast
        self.use_index_files = use_index_files
        self.decoder = decoder
        self.compile_model = compile_model
        self.reduced_decode = reduced_decode

    # To override -----------------------------------------------------------------------------------------------------

    def check_network(self) -> None:
        """Raise if the library has no such network."""
        raise NotImplementedError

    def identified_network(self) -> tuple[Any, str]:
        """Build the network, on the CPU, and return it with the identity of its weights."""
        raise NotImplementedError

    def describe_network(self) -> NetworkDescription:
        """Return what is known of the network without its weights."""
        raise NotImplementedError

    def load(self, device: str = "cpu") -> PreparedNetworkEmbedder:
        """Check the arguments, load the weights, and return what tasks carry."""
        raise NotImplementedError

    # On the client ---------------------------------------------------------------------------------------------------

    def prepare(self, dataset: ImageTextPairDataset) -> PreparedNetworkEmbedder:
        """Check the arguments and the weights, and settle the number type.

        Raises
        ------
        ArgumentError, UnknownModelError, WeightsError
            Before any task starts.
        """
        super().prepare(dataset)
        self.check_arguments()
        if self.autocast and self.image_embedding_column not in dataset.provenance and autocast_.candidate_dtype("cpu"):
            start_ahead()  # the probe's child process, while the model is built
        prepared = self.load(worker_device())
        if self.autocast:
            prepared.dtype = prepared.settled_dtype(dataset)
        return prepared

    def load_as(self, kind: type[Prepared], device: str) -> Prepared:
        """Do what :meth:`load` says, with the class of what tasks carry.

        Raises
        ------
        ArgumentError, UnknownModelError, WeightsError
        """
        self.check_arguments()
        self.check_network()
        network, identity = self.identified_network()
        if identity == RANDOM_WEIGHTS:
            logger.warning(
                "%s has no trained weights (neither pretrained= nor weights=): its embeddings are those of a random "
                "network",
                self.model_name,
            )
        described = self.describe_network()
        preprocessing = transform_record(described.transform)
        if self.reduced_decode:
            preprocessing["reduced_decode"] = True  # other embeddings: not what earlier rows were made with
        prepared = kind(self, identity, described.size, preprocessing, "float32", device)
        if device != "cpu" and not backend.sees_gpu():
            return prepared  # a login node: the workers have the GPUs
        prepared.model(loaded=network)
        if self.compile_model:
            shape = (self.batch_of(device), *described.input_size)
            require_compiler(prepared.picture_network(), shape, device)
        return prepared

    def check_arguments(self) -> None:
        """Raise if an argument is unusable.

        Raises
        ------
        ArgumentError, WeightsError
        """
        if self.batch_size != "auto" and (not isinstance(self.batch_size, int) or self.batch_size < 1):
            raise ArgumentError(f"batch_size must be 'auto' or at least 1, not {self.batch_size!r}")
        if self.num_threads_per_worker < 1:
            raise ArgumentError(f"num_threads_per_worker must be at least 1, not {self.num_threads_per_worker}")
        if self.decoder not in ("auto", "torchvision", "dali", "pillow"):
            raise ArgumentError(f"decoder must be 'auto', 'torchvision', 'dali' or 'pillow', not {self.decoder!r}")
        if self.reduced_decode:
            self.check_network()
            self.preprocessor("cpu", self.num_threads_per_worker)  # refuses here what tasks could not do
        if self.weights is not None and not os.path.isfile(self.weights):
            raise WeightsError(f"weights={self.weights!r}: no such file")

    def embed_pictures(self, pictures: Sequence[Picture]) -> npt.NDArray[np.float32]:
        """Embed some pictures in this process, with the preprocessing and the one copy of the model that tasks use.

        Parameters
        ----------
        pictures : sequence of str, path, bytes or PIL.Image.Image
            Files (local or any fsspec URL), files' bytes, or opened pictures.

        Returns
        -------
        ndarray of float32, shape (n, size)
            One row a picture, L2-normalised whatever the embedder's settings.

        Raises
        ------
        ArgumentError
            If one is none of these, or there is no such file.
        ImageError
            If one cannot be decoded; says which.
        """
        here = self.here()
        parts = [
            here.embed(on_device(here.preprocessor(here.device, self.num_threads_per_worker), batch, here.device))
            for batch in prepared_pictures(pictures, here, self.batch_of(here.device))
        ]
        return unit_rows(parts, here.size)

    def here(self) -> PreparedNetworkEmbedder:
        """Return the embedder as loaded for this process, in float32; loaded once for equal settings."""
        self.check_arguments()
        weights = "" if self.weights is None else sha256_file(self.weights)
        spec = ModelSpec(f"{self.library}, here", self.model_name, weights, "float32", "cpu", (behaviour_token(self),))
        return get_model(spec, self.load)

    # For those who build on it ---------------------------------------------------------------------------------------

    def load_embedding_model(self, device: str) -> Callable[[Any], Any]:
        """Return the network on `device`: normalised pixels (n, 3, height, width) to embeddings (n, size)."""
        network, _ = self.identified_network()
        ready: Callable[[Any], Any] = ready_to_run(network, device, compiled=self.compile_model)
        return ready

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
                for places, batch, _ in ready:
                    yield on_device(prepare, batch, "cpu"), [{"key": found[places[row]][0]} for row in batch.rows]

    def preprocessor(self, device: str, num_threads: int) -> Preprocessor:
        """Return what turns bytes into the model's input."""
        decoder = self.decoder
        if decoder == "auto":
            decoder = "torchvision" if device == "cpu" else "dali"
        return make_preprocessor(
            self.describe_network().transform,
            decoder=decoder,
            device=device,
            num_threads=num_threads,
            reduced_decode=self.reduced_decode,
        )

    def batch_of(self, device: str) -> int:
        """Return the number of images at once on a device."""
        if self.batch_size != "auto":
            return self.batch_size
        if device == "cpu" and self.describe_network().convolutional:
            return CONVOLUTIONS_BATCH_SIZE
        return AUTO_BATCH_SIZE[device.split(":", maxsplit=1)[0]]


def transform_record(transform: Any) -> dict[str, Any]:
    """Return what a fingerprint says of a transform."""
    spec = spec_from_transform(transform)
    return {"transform": repr(transform)} if spec is None else dict(spec.to_dict())


def unit_rows(parts: Sequence[npt.NDArray[Any]], size: int) -> npt.NDArray[np.float32]:
    """Return the rows of several matrices, each divided by its L2 norm; a row of zeros stays one."""
    made = np.concatenate([np.zeros((0, size), np.float32), *parts])
    norms = np.sqrt(np.einsum("ij,ij->i", made, made, dtype=np.float64))[:, None]
    rows: npt.NDArray[np.float32] = (made / np.where(norms > 0, norms, 1)).astype(np.float32)
    return rows
