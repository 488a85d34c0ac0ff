"""What a task carries of an embedder of pictures and captions, and how it embeds texts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
from dask.base import tokenize

from nemo_image import schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.lineage import assigned_columns
from nemo_image.embedders import autocast as autocast_
from nemo_image.embedders import open_clip_models
from nemo_image.embedders.base import Columns, FloatMatrix, may_add
from nemo_image.embedders.forward import embed, forward_tokens, ready_to_run
from nemo_image.embedders.open_clip_models import OpenClipModel
from nemo_image.embedders.open_clip_towers import Towers
from nemo_image.embedders.prepared import PreparedNetworkEmbedder
from nemo_image.embedders.text.pairs import ShardCaptions, TextColumns
from nemo_image.embedders.text.sources import CaptionSource
from nemo_image.embedders.text.tokens import CaptionTokenizer
from nemo_image.shards.index import Sample
from nemo_image.shards.read import ShardReader

PROBE_TEXTS = (
    "a photo of a cat",
    "two dogs on a beach at sunset, one of them jumping for a red frisbee",
    "",
    "Buy 2 get 1 FREE!!! Women's summer dress, size XL (blue) - $19.99",
    "Der Hafen von Hamburg bei Nacht",
    "一只猫坐在窗台上",
    "IMG_2034.JPG",
    "a close-up of a wooden table with many small objects on it, " * 8,
)
"""Reduced precision must keep the embeddings of these, too."""


class PreparedPairEmbedder(PreparedNetworkEmbedder):
    """An embedder of pictures and captions with all that the client settles."""

    network: OpenClipModel
    text_embedding_column: str
    clip_score_column: str
    tokenizer_source: str | None
    tokenizer_identity = ""
    sources: tuple[CaptionSource, ...] = ()
    assigned: Mapping[str, str] = {}
    caption_number_column: str | None = None

    def reading(self, sources: tuple[CaptionSource, ...], dataset: ImageTextPairDataset) -> Self:
        """Return the embedder for a dataset whose captions are found in some places."""
        made = copy.copy(self)
        made.sources = sources
        made.input_columns = tuple(source.name for source in sources if source.kind == "column")
        made.caption_number_column = schema.CLIP_CAPTION if may_add(dataset, schema.CLIP_CAPTION) else None
        # Captions that are not those of the files belong to what made the results.
        own = set(dataset.source.schema.names) - assigned_columns(dataset.metadata)
        made.assigned = {
            name: tokenize(dataset.metadata[name].expr._name) for name in made.input_columns if name not in own
        }
        return made

    def fingerprint(self) -> dict[str, Any]:
        """Return what makes the embeddings of pictures."""
        return {
            **super().fingerprint(),
            "pretrained": self.network.pretrained,
            "quick_gelu": open_clip_models.quick_gelu(self.network),
        }

    def text_fingerprint(self) -> dict[str, Any]:
        """Return what makes the columns of the text. A row that has the picture's embedding has been through all."""
        return {
            **self.fingerprint(),
            "captions": [str(source) for source in self.sources],
            "assigned": dict(self.assigned),
            "tokenizer": self.tokenizer_identity,
            schema.COMPUTED_WITH: self.image_embedding_column,
        }

    def further_columns(self, dataset: ImageTextPairDataset) -> dict[str, tuple[Any, dict[str, Any]]]:
        """Return the dtypes and the fingerprint of the columns of the text."""
        made = self.text_fingerprint()
        columns = {
            self.text_embedding_column: schema.list_dtype(self.embedding_dtype),
            self.clip_score_column: schema.arrow_dtype("float32"),
        }
        if self.caption_number_column is not None:
            columns[self.caption_number_column] = schema.arrow_dtype("int32")
        return {name: (dtype, made) for name, dtype in columns.items()}

    # The model -------------------------------------------------------------------------------------------------------

    def model_settings(self) -> tuple[Any, ...]:
        """Return what tells the model from others of the same name and weights."""
        return (open_clip_models.quick_gelu(self.network), self.tokenizer_source)

    def ready(self, network: Any) -> Towers:
        """Return a network's towers, on their device."""
        return Towers.of(ready_to_run(network, self.device), compiled=self.compile_model)

    def picture_network(self) -> Any:
        """Return the image tower."""
        return self.model().image

    @property
    def tokenizer(self) -> CaptionTokenizer:
        """The model's tokenizer, loaded once in a process."""
        towers: Towers = self.model()
        return towers.tokenizer(lambda: CaptionTokenizer(open_clip_models.load_tokenizer(self.network)))

    def probe(self, tar_urls: Sequence[str], storage_options: Mapping[str, Any]) -> str:
        """Return the number type that is best for the first pictures of some tars, and for texts."""
        found = super().probe(tar_urls, storage_options)
        if found == "float32":
            return found
        tokens = self.tokenizer([self.tokenizer.clean(text) for text in PROBE_TEXTS]).to(self.device)
        worst = autocast_.worst_cosine(self._forward_tokens, tokens, found)
        return found if worst >= autocast_.MIN_COSINE else "float32"

    # In a task -------------------------------------------------------------------------------------------------------

    def beside_pictures(self, reader: ShardReader, samples: Sequence[Sample], columns: Columns) -> ShardCaptions:
        """Return the work on the captions of a shard's pictures."""
        names = TextColumns(self.text_embedding_column, self.clip_score_column, self.caption_number_column)
        return ShardCaptions(self, self.sources, reader, samples, columns, names)

    def embed_cleaned(self, cleaned: Sequence[str]) -> FloatMatrix:
        """Return the vectors, [n, size] and not normalised, of cleaned texts."""
        run = partial(self._forward_tokens, dtype=self.dtype)
        size = self.batch_of(self.device)
        cuts = [cleaned[start : start + size] for start in range(0, len(cleaned), size)]
        parts = [embed(run, self.tokenizer(cut).to(self.device)) for cut in cuts]
        return np.concatenate([np.zeros((0, self.size), np.float32), *parts])

    def _forward_tokens(self, tokens: Any, dtype: str) -> Any:
        return forward_tokens(self.model().text, tokens, dtype, self.device)
