"""Embeddings from any timm model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, Literal

from nemo_image import schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import timm_models
from nemo_image.embedders.network import Decoder, NetworkDescription, NetworkEmbedder
from nemo_image.embedders.prepared import PreparedNetworkEmbedder
from nemo_image.errors import ArgumentError


class TimmImageEmbedder(NetworkEmbedder):
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
        Images at once. By default 256 on a GPU; on the CPU 4 for convolutional networks and 32 for others.
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

    library = "timm"

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
            weights=weights,
            batch_size=batch_size,
            num_threads_per_worker=num_threads_per_worker,
            image_embedding_column=image_embedding_column,
            normalize_embeddings=normalize_embeddings,
            classifiers=classifiers,
            autocast=autocast,
            use_index_files=use_index_files,
            embedding_dtype=embedding_dtype,
            decoder=decoder,
            compile_model=compile_model,
            reduced_decode=reduced_decode,
        )
        self.pretrained = pretrained

    def load(self, device: str = "cpu") -> PreparedTimmEmbedder:
        """Check the arguments, load the weights, and return what tasks carry, to run on `device` in float32.

        Raises
        ------
        ArgumentError, UnknownModelError, WeightsError
        """
        return self.load_as(PreparedTimmEmbedder, device)

    def check_arguments(self) -> None:
        """Raise if an argument is unusable.

        Raises
        ------
        ArgumentError, WeightsError
        """
        if self.pretrained and self.weights is not None:
            raise ArgumentError("give weights=<a file> or pretrained=True, not both")
        super().check_arguments()

    def check_network(self) -> None:
        """Raise if timm has no such model.

        Raises
        ------
        UnknownModelError
        """
        timm_models.check_name(self.model_name)

    def identified_network(self) -> tuple[Any, str]:
        """Build the model, on the CPU, and return it with the identity of its weights.

        Raises
        ------
        WeightsError
            If the weights cannot be had, or are another model's.
        """
        return timm_models.identified_model(self.model_name, self.pretrained, self.weights)

    def describe_network(self) -> NetworkDescription:
        """Return what is known of the model without its weights."""
        return timm_models.description(self.model_name)


class PreparedTimmEmbedder(PreparedNetworkEmbedder, TimmImageEmbedder):
    """A timm embedder with all that the client settles: what the tasks carry."""

    operator = "TimmImageEmbedder"
