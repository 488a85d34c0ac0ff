"""Embeddings of pictures and of their captions, and the score of each pair, from any open_clip model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from nemo_image import schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import open_clip_models
from nemo_image.embedders.forward import ready_to_run
from nemo_image.embedders.network import Decoder, NetworkDescription, NetworkEmbedder, unit_rows
from nemo_image.embedders.open_clip_models import OpenClipModel
from nemo_image.embedders.open_clip_prepared import PreparedPairEmbedder
from nemo_image.embedders.open_clip_towers import Towers
from nemo_image.embedders.prepared import PreparedNetworkEmbedder
from nemo_image.embedders.text.sources import DEFAULT_SOURCES, CaptionSource, check_column, parse_sources
from nemo_image.embedders.text.tokens import CaptionTokenizer
from nemo_image.errors import ArgumentError, MissingColumnError
from nemo_image.shards.files import Url


class OpenClipImageEmbedder(NetworkEmbedder):
    """Adds embeddings of pictures and captions, and the score of each pair, from an `open_clip
    <https://github.com/mlfoundations/open_clip>`_ model: CLIP, SigLIP, CoCa and others.

    In one pass over the tars it adds the columns

    ``image_embedding``, ``text_embedding``
        list of float32 (or float16).
    ``clip_score``
        float32, the cosine of the two: CLIP's similarity (arXiv 2103.00020) without its learned scale.
    ``clip_caption``
        int32, which of the picture's captions the two are of, counted from 0.

    and ``width``, ``height`` and ``image_error``. Of several captions (a list) the one that scores best counts; of
    equal ones, the first. A picture without a caption has an ``image_embedding``, and nulls in the columns of the text:
    it counts as computed. A picture that cannot be decoded has nulls in all of them.

    Parameters
    ----------
    model_name : str
        An open_clip name, for example ``"ViT-B-32"``, or one with ``hf-hub:`` or ``local-dir:`` before it.
    pretrained : str, optional
        The tag of the weights to take from the hub (or its cache on this machine), for example ``"openai"``. With
        neither this nor `weights` the network is random (seeded, the same on every worker), which suits tests only.
    weights : str or path, optional
        A local file of weights: ``.safetensors``, ``.pt`` or ``.pth``. With `pretrained` beside it, pictures are
        prepared as for that tag, and nothing is fetched.
    captions : str or sequence of str, optional
        Where captions are looked for: ``"txt"``, ``"json:FIELD"``, ``"column:NAME"`` (texts, or lists of texts), or
        several of these; the first that has one for a picture gives all of that picture's. By default the column
        ``caption``, if there is one, the sample's ``.txt``, and ``caption`` in its JSON.
    batch_size : int or "auto", default "auto"
        Pictures (and captions) at once. By default 256 on a GPU; on the CPU 4 for convolutional networks and 32 for
        others.
    num_threads_per_worker : int, default 4
        Decoding threads of a task at most; the cores are shared out among the tasks of a machine.
    image_embedding_column, text_embedding_column, clip_score_column : str
        The columns to add.
    normalize_embeddings : bool, default True
        Whether to divide each embedding by its L2 norm, as this project's classifiers expect.
    classifiers : iterable of ImageClassifier
        Score the embeddings in the same pass.
    autocast : bool, default True
        Let a probe on the client choose reduced precision, where that is faster and keeps a cosine of 0.999, for
        pictures and texts.
    use_index_files : bool, default False
        Read the tars by the ``.idx`` files beside them, where they are right.
    embedding_dtype : {"float32", "float16"}
        The precision in which embeddings are kept.
    decoder : {"auto", "torchvision", "dali", "pillow"}
        What decodes and resizes: torchvision on the CPU and DALI on a GPU by default. All agree to a cosine of 0.999.
    compile_model : bool, default False
        Run the towers through ``torch.compile``, which needs a C++ compiler, and minutes at each process's start.
    reduced_decode : bool, default False
        Decode large JPEGs at part of their size. See `TimmImageEmbedder`.
    force_quick_gelu : bool, default False
        Run the model with QuickGELU. Tags that were trained so (OpenAI's) are run so in any case.
    image_mean, image_std : tuple of float, optional
        What to normalise pictures with, instead of the tag's values.
    image_interpolation : {"bicubic", "bilinear"}, optional
        How to resize pictures.
    image_resize_mode : {"shortest", "longest", "squash"}, optional
        Resize the shorter side and crop, the longer side and pad, or both sides.
    tokenizer : str, optional
        A folder (or the hub's name) of a tokenizer of transformers' to take instead of the model's own.
    """

    library = "open_clip"

    def __init__(
        self,
        model_name: str,
        pretrained: str | None = None,
        *,
        weights: Url | None = None,
        captions: str | Sequence[str] | None = None,
        batch_size: int | Literal["auto"] = "auto",
        num_threads_per_worker: int = 4,
        image_embedding_column: str = schema.IMAGE_EMBEDDING,
        text_embedding_column: str = schema.TEXT_EMBEDDING,
        clip_score_column: str = schema.CLIP_SCORE,
        normalize_embeddings: bool = True,
        classifiers: Iterable[Callable[[ImageTextPairDataset], ImageTextPairDataset]] = (),
        autocast: bool = True,
        use_index_files: bool = False,
        embedding_dtype: str = "float32",
        decoder: Decoder = "auto",
        compile_model: bool = False,
        reduced_decode: bool = False,
        force_quick_gelu: bool = False,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        image_interpolation: Literal["bicubic", "bilinear"] | None = None,
        image_resize_mode: Literal["shortest", "longest", "squash"] | None = None,
        tokenizer: str | None = None,
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
        self.captions = captions if captions is None or isinstance(captions, str) else tuple(captions)
        self.text_embedding_column = text_embedding_column
        self.clip_score_column = clip_score_column
        self.force_quick_gelu = force_quick_gelu
        self.image_mean = image_mean
        self.image_std = image_std
        self.image_interpolation = image_interpolation
        self.image_resize_mode = image_resize_mode
        self.tokenizer_source = tokenizer

    @property
    def network(self) -> OpenClipModel:
        """Which model, and what is changed of it."""
        said = {
            "mean": None if self.image_mean is None else tuple(self.image_mean),
            "std": None if self.image_std is None else tuple(self.image_std),
            "interpolation": self.image_interpolation,
            "resize_mode": self.image_resize_mode,
        }
        return OpenClipModel(
            name=self.model_name,
            pretrained=self.pretrained,
            weights=self.weights,
            force_quick_gelu=self.force_quick_gelu,
            preprocessing=tuple((name, value) for name, value in said.items() if value is not None),
            tokenizer=self.tokenizer_source,
        )

    # On the client ---------------------------------------------------------------------------------------------------

    def prepare(self, dataset: ImageTextPairDataset) -> PreparedNetworkEmbedder:
        """Check the arguments, the weights and the captions' columns, and settle the number type.

        Raises
        ------
        ArgumentError, MissingColumnError, UnknownModelError, WeightsError, ModelError
            Before any task starts.
        """
        sources = self._sources(dataset)
        prepared = super().prepare(dataset)
        assert isinstance(prepared, PreparedOpenClipEmbedder)
        return prepared.reading(sources, dataset)

    def _sources(self, dataset: ImageTextPairDataset) -> tuple[CaptionSource, ...]:
        """Return where captions are looked for in a dataset; of the default places, those that it has."""
        present = dataset.metadata.dtypes
        given = self.captions is not None
        wanted = parse_sources(DEFAULT_SOURCES if self.captions is None else self.captions)
        sources = [one for one in wanted if given or one.kind != "column" or one.name in present.index]
        for source in sources:
            if source.kind == "column":
                if source.name not in present.index:
                    raise MissingColumnError(
                        f"captions='{source}': metadata has no such column; it has {', '.join(map(str, present.index))}"
                    )
                check_column(source.name, present[source.name])
        return tuple(sources)

    def load(self, device: str = "cpu") -> PreparedOpenClipEmbedder:
        """Check the arguments, load weights and tokenizer, and return what tasks carry, to run on `device` in float32.

        Raises
        ------
        ArgumentError, UnknownModelError, WeightsError, ModelError
        """
        self.check_arguments()
        self.check_network()
        # Before gigabytes of weights: it may have to come from the hub.
        tokenizer = CaptionTokenizer(open_clip_models.load_tokenizer(self.network))
        prepared = self.load_as(PreparedOpenClipEmbedder, device)
        prepared.model().tokenizer(lambda: tokenizer)
        prepared.tokenizer_identity = prepared.tokenizer.identity()
        open_clip_models.warn_of_other_preprocessing(self.network)
        return prepared

    def check_arguments(self) -> None:
        """Raise if an argument is unusable.

        Raises
        ------
        ArgumentError, WeightsError
        """
        columns = [self.image_embedding_column, self.text_embedding_column, self.clip_score_column]
        if len(set(columns)) < len(columns):
            raise ArgumentError(f"the columns to add must have different names, not {', '.join(columns)}")
        if self.image_interpolation not in (None, "bicubic", "bilinear"):
            raise ArgumentError(
                f"image_interpolation must be 'bicubic' or 'bilinear', not {self.image_interpolation!r}"
            )
        if self.image_resize_mode not in (None, "shortest", "longest", "squash"):
            raise ArgumentError(
                f"image_resize_mode must be 'shortest', 'longest' or 'squash', not {self.image_resize_mode!r}"
            )
        for name, values in (("image_mean", self.image_mean), ("image_std", self.image_std)):
            if values is not None and len(values) != 3:
                raise ArgumentError(f"{name} must be three numbers, not {values!r}")
        super().check_arguments()

    def check_network(self) -> None:
        """Raise if open_clip has no such model or tag.

        Raises
        ------
        ArgumentError, UnknownModelError, WeightsError, ModelError
        """
        open_clip_models.check(self.network)

    def identified_network(self) -> tuple[Any, str]:
        """Build the model, on the CPU, and return it with the identity of its weights.

        Raises
        ------
        WeightsError
            If the weights cannot be had, or are another model's.
        """
        return open_clip_models.identified_model(self.network)

    def describe_network(self) -> NetworkDescription:
        """Return what is known of the model without its weights."""
        return open_clip_models.describe(self.network)

    def embed_text(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embed some texts in this process, with the tokenizer and the one copy of the model that tasks use.

        Parameters
        ----------
        texts : sequence of str

        Returns
        -------
        ndarray of float32, shape (n, size)
            One row a text, L2-normalised whatever the embedder's settings.

        Raises
        ------
        ArgumentError
            If one is no text.
        """
        if isinstance(texts, str | bytes) or not all(isinstance(text, str) for text in texts):
            raise ArgumentError("texts must be a list of str")
        here = self.here()
        assert isinstance(here, PreparedOpenClipEmbedder)
        return unit_rows([here.embed_cleaned([here.tokenizer.clean(text) for text in texts])], here.size)

    # For those who build on it ---------------------------------------------------------------------------------------

    def load_embedding_model(self, device: str) -> Callable[[Any], Any]:
        """Return the image tower on `device`: normalised pixels (n, 3, height, width) to embeddings (n, size)."""
        network, _ = self.identified_network()
        image: Callable[[Any], Any] = Towers.of(ready_to_run(network, device), compiled=self.compile_model).image
        return image


class PreparedOpenClipEmbedder(PreparedPairEmbedder, OpenClipImageEmbedder):
    """An open_clip embedder with all that the client settles: what the tasks carry."""

    operator = "OpenClipImageEmbedder"
