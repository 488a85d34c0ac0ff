"""What a task carries of an embedder with a library's network, and how it embeds a shard's rows."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.samples import samples_with_images
from nemo_image.datasets.shard_pass import open_tar
from nemo_image.datasets.source import DatasetSource
from nemo_image.embedders import autocast as autocast_
from nemo_image.embedders.base import Columns, ShardEmbeddings, finished
from nemo_image.embedders.forward import embed, forward, on_device, ready_to_run
from nemo_image.embedders.network import NetworkEmbedder
from nemo_image.embedders.pictures import prepared_batches
from nemo_image.embedders.preprocess import (
    GuardedPreprocessor,
    IsolatedPreprocessor,
    PreprocessedBatch,
    Preprocessor,
)
from nemo_image.engine import threads
from nemo_image.engine.device import where_device_is
from nemo_image.engine.in_order import map_in_order
from nemo_image.engine.model_cache import ModelSpec, get_model
from nemo_image.errors import WeightsError
from nemo_image.shards.index import Member, Sample
from nemo_image.shards.read import ShardReader

PROBED_IMAGES = 64

Piece = TypeVar("Piece")

_Texts = list[tuple[bytes, ...]]
_Batch = tuple[range, PreprocessedBatch, _Texts]
_Embedded = tuple[range, PreprocessedBatch, npt.NDArray[Any] | None, Any]


class BesidePictures(Protocol, Generic[Piece]):
    """Work on what belongs to the pictures of one shard, done batch by batch in the same pass."""

    @property
    def members(self) -> Sequence[Sequence[Member]]:
        """For each picture, the members to read along with it."""
        ...

    def run(
        self, places: range, batch: PreprocessedBatch, texts: Sequence[Sequence[bytes]], made: npt.NDArray[Any]
    ) -> Piece:
        """Work on one batch; from several threads at once.

        Parameters
        ----------
        places : range
            Where the batch's pictures stand among the shard's.
        batch : PreprocessedBatch
            Its ``rows`` are those that have an embedding.
        texts : sequence of sequence of bytes
            The bytes of `members`.
        made : ndarray of float32, shape (len(batch.rows), size)
            The embeddings of the good pictures, not normalised.
        """
        ...

    def finish(self, pieces: Sequence[Piece], rows: npt.NDArray[np.int64], found: ShardEmbeddings) -> None:
        """Write into `found` what the batches gave; `rows` are those of the pictures."""
        ...


class PreparedNetworkEmbedder(NetworkEmbedder):
    """An embedder with all that the client settles."""

    operator: str
    """The embedder's name in fingerprints."""

    def __init__(
        self,
        settings: NetworkEmbedder,
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

    def prepare(self, dataset: ImageTextPairDataset) -> PreparedNetworkEmbedder:
        """Return itself."""
        return self

    @property
    def transform(self) -> Any:
        """The network's own evaluation transform."""
        return self.describe_network().transform

    def fingerprint(self) -> dict[str, Any]:
        """Return what makes the embeddings. The decoder is no part of it: all of them keep the same promise."""
        return {
            "operator": self.operator,
            "model": self.model_name,
            "weights_sha256": self.identity,
            "preprocessing": self.preprocessing,
            "dtype": self.dtype,
            "normalized": self.normalize_embeddings,
            "embedding_dtype": self.embedding_dtype,
            "embedding_size": self.size,
        }

    # The model -------------------------------------------------------------------------------------------------------

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
        kind = f"{self.library}, compiled" if self.compile_model else self.library
        extra = self.model_settings()
        spec = ModelSpec(kind, self.model_name, self.identity, "float32", self.device, extra)
        return get_model(spec, lambda: self.ready(self._load() if loaded is None else loaded))

    def model_settings(self) -> tuple[Any, ...]:
        """Return what tells the model from others of the same name and weights."""
        return ()

    def ready(self, network: Any) -> Any:
        """Return a network as it is kept in the process, on its device."""
        return ready_to_run(network, self.device, compiled=self.compile_model)

    def picture_network(self) -> Any:
        """Return what turns normalised pixels (n, 3, height, width) into embeddings (n, size)."""
        return self.model()

    def _load(self) -> Any:
        network, found = self.identified_network()
        if found != self.identity:
            source = self.weights or f"the hub's copy of {self.model_name}"
            raise WeightsError(f"{source} on this machine has SHA-256 {found}, the client's has {self.identity}")
        return network

    # The number type -------------------------------------------------------------------------------------------------

    def settled_as(self, made_by: Mapping[str, Any]) -> PreparedNetworkEmbedder | None:
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
        if autocast_.candidate_dtype(self.device) is None:
            return self.dtype
        return where_device_is(self.device, self.probe, list(tar_urls), dict(storage_options))

    def probe(self, tar_urls: Sequence[str], storage_options: Mapping[str, Any]) -> str:
        """Do what :meth:`probed_dtype` says, in a process that has the device."""
        return autocast_.probe_dtype(self._forward_as, self._probe_pixels(tar_urls, storage_options), self.device)

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

    def beside_pictures(
        self, reader: ShardReader, samples: Sequence[Sample], columns: Columns
    ) -> BesidePictures[Any] | None:
        """Return the work on what belongs to a shard's pictures; None where there is none.

        Parameters
        ----------
        reader : ShardReader
        samples : sequence of Sample
            The pictures' samples, in the order in which they are embedded.
        columns : dict of str to list
            The columns of metadata that the embedder asked for, in the same order.
        """
        return None

    def embed_rows(
        self, source: DatasetSource, shard: str, ids: Sequence[Any], columns: Columns | None = None
    ) -> ShardEmbeddings:
        """Embed the rows of one shard that have the ids given, in the order in which their images lie in the tar."""
        with open_tar(source, shard, self.use_index_files) as reader:
            samples, images, errors = samples_with_images(reader, source, shard, ids)
            rows = np.array(sorted(images, key=lambda row: images[row].offset), np.int64)
            found = ShardEmbeddings(np.zeros((0, self.size), np.float32), np.array([], np.int64), errors)
            vectors: list[npt.NDArray[Any]] = []
            places: list[npt.NDArray[np.int64]] = []
            pieces: list[Any] = []
            self.model()
            decode_threads = max(1, min(self.num_threads_per_worker, threads.task_share()))
            order = rows.tolist()
            ordered = {name: [values[row] for row in order] for name, values in (columns or {}).items()}
            beside = self.beside_pictures(reader, [samples[row] for row in order], ordered)
            with contextlib.ExitStack() as stack:
                prepare = GuardedPreprocessor(self.preprocessor(self.device, decode_threads))
                ready = prepared_batches(
                    reader,
                    [images[row] for row in order],
                    prepare,
                    self.batch_of(self.device),
                    pin=self.device != "cpu",
                    beside=None if beside is None else beside.members,
                )
                stack.enter_context(contextlib.closing(ready))
                stack.enter_context(prepare)  # closed first: a thread may be waiting for a decoder
                for cut, batch, made, piece in self._embedded(prepare, ready, beside):
                    batch_rows = rows[cut.start : cut.stop]
                    _note(found, batch_rows, batch)
                    if made is not None:
                        vectors.append(made)
                        places.append(batch_rows[batch.rows])
                        pieces.append(piece)
        if vectors:
            found.matrix, found.rows = np.concatenate(vectors), np.concatenate(places)
            vectors.clear()
        done = finished(found.matrix, found.rows, found.errors, normalize=self.normalize_embeddings)
        done.widths, done.heights = found.widths, found.heights
        if beside is not None:
            beside.finish(pieces, rows, done)
        return done

    def _embedded(
        self, prepare: Preprocessor, ready: Iterable[_Batch], beside: BesidePictures[Any] | None
    ) -> Iterator[_Embedded]:
        """Run the model over batches; in several threads, if the task may keep several busy.

        Each thread's torch works alone: convolutions give other last bits with other numbers of threads, and a rerun
        on another machine, or on what is left of a dataset, must give the same bytes.
        """

        def one(item: _Batch) -> _Embedded:
            cut, batch, texts = item
            if not batch.rows:
                return cut, batch, None, None
            made = self.embed(on_device(prepare, batch, self.device))
            return cut, batch, made, None if beside is None else beside.run(cut, batch, texts, made)

        workers = threads.task_share() if self.device == "cpu" else 1
        alone = partial(threads.set_own_torch_threads, 1)
        with threads.torch_threads(1):
            yield from map_in_order(one, ready, workers, alone)

    def embed(self, pixels: Any) -> npt.NDArray[Any]:
        """Run the model on normalised pixels; a batch that does not fit the GPU's memory is halved and tried again."""
        return embed(partial(self._forward_as, dtype=self.dtype), pixels)

    def _forward_as(self, pixels: Any, dtype: str) -> Any:
        return forward(self.picture_network(), pixels, dtype, self.device)


def _note(found: ShardEmbeddings, rows: npt.NDArray[np.int64], batch: PreprocessedBatch) -> None:
    """Keep what the decoder said of each picture of a batch."""
    for place, row in enumerate(rows.tolist()):
        reason, width, height = batch.errors[place], batch.widths[place], batch.heights[place]
        if reason is not None:
            found.errors[row] = reason
        if width is not None and height is not None:
            found.widths[row], found.heights[row] = width, height
