"""Zero-shot tags: how well saved embeddings agree with what a user describes in words."""

from __future__ import annotations

import hashlib
import keyword
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from nemo_image import backend, schema
from nemo_image.datasets.queries import embed_texts, fingerprint_of, require_same_model, settled
from nemo_image.engine import threads
from nemo_image.errors import ArgumentError, EmbeddingError, MissingColumnError

if TYPE_CHECKING:
    from nemo_image.datasets import ImageTextPairDataset

Scores = Literal["softmax", "cosine"]
Prompts = Mapping[str, str | Sequence[str]] | Sequence[str]

BLOCK_ROWS = 2048
"""Embeddings scored at once, in float64."""

Doubles = npt.NDArray[np.float64]


class ZeroShotTagger:
    """Adds a score for each of several tags that are described in words: watermark, screenshot, text only, …

    A tag's vector is the mean of the unit vectors of its prompts, made a unit vector again (prompt ensembling, Radford
    et al., arXiv 2103.00020, section 3.1.4). With ``cos(t)`` the cosine of a row's embedding and tag t's vector, its
    score is::

        softmax:  exp(cos(t) / temperature) / sum over all tags u of exp(cos(u) / temperature)
        cosine:   cos(t)

    Softmax scores add up to 1 over the tags: the probability of each, given that one of them applies. So one of them
    should say what other pictures are (``"photo": "a photo"``). Cosines stand alone; for CLIP models those of fitting
    texts lie near 0.2 to 0.35.

    Parameters
    ----------
    prompts : dict of str to (str or list of str), or list of str
        What describes each tag. From a list, each text is a tag of its own, named by its words.
    embedder : object
        The model that made the embeddings, with ``embed_text``; used on the client, once.
    embedding_column : str, default "image_embedding"
        The column of embeddings to read; vectors of any norm.
    scores : {"softmax", "cosine"}, default "softmax"
    temperature : float, default 0.01
        What cosines are divided by in the softmax: 0.01 is CLIP's own, whose learned logit scale is 100.
    column_prefix : str, default ``"tag_"``
        Goes before a tag's name to make its column's.

    Raises
    ------
    ArgumentError
        If an argument is unusable: no prompts, an empty one, two tags of one name, a name that an expression such as
        ``tag_watermark < 0.5`` could not say, or a softmax over a single tag.
    """

    def __init__(
        self,
        prompts: Prompts,
        embedder: Any,
        embedding_column: str = schema.IMAGE_EMBEDDING,
        scores: Scores = "softmax",
        temperature: float = 0.01,
        column_prefix: str = "tag_",
    ) -> None:
        if scores not in get_args(Scores):
            raise ArgumentError(f"scores must be 'softmax' or 'cosine', not {scores!r}")
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < np.inf:
            raise ArgumentError(f"temperature must be a number above 0, not {temperature!r}")
        self.prompts = _by_tag(prompts)
        if scores == "softmax" and len(self.prompts) == 1:
            raise ArgumentError(
                "prompts: a softmax over one tag is always 1: add what the other pictures are (such as 'photo': "
                "'a photo'), or give scores='cosine'"
            )
        for tag in self.prompts:
            _check_name(tag, column_prefix)
        self.embedder = embedder
        self.embedding_column = embedding_column
        self.scores = scores
        self.temperature = float(temperature)
        self.column_prefix = column_prefix

    @property
    def columns(self) -> list[str]:
        """The columns to add, in the order of the prompts."""
        return [self.column_prefix + tag for tag in self.prompts]

    def __call__(self, dataset: ImageTextPairDataset) -> ImageTextPairDataset:
        """Return the dataset with one float32 column a tag, lazily; null where a row has no usable embedding.

        Raises
        ------
        MissingColumnError
            If there is no column of embeddings.
        EmbeddingError
            If the embeddings come from another model than the embedder, or have another size.
        ArgumentError
            If the embedder has no text tower, or a column of a tag's name came with the data.
        """
        if self.embedding_column not in dataset.metadata.columns:
            raise MissingColumnError(
                f"the metadata has no column {self.embedding_column!r}: run an embedder first, or name the column of "
                f"embeddings (embedding_column=); there are {', '.join(dataset.metadata.columns)}"
            )
        for name in self.columns:
            if name in dataset.metadata.columns and name not in dataset.provenance:
                raise ArgumentError(f"column {name!r} came with the data: choose another tag name or column_prefix")
        made_by = dataset.provenance.get(self.embedding_column)
        embedder = settled(self.embedder)
        model = fingerprint_of(embedder)
        require_same_model(model, made_by, self.embedding_column)
        vectors = self.tag_vectors(embedder)
        size = (made_by or {}).get("embedding_size", vectors.shape[1])
        if size != vectors.shape[1]:
            raise EmbeddingError(
                f"column {self.embedding_column!r} holds embeddings of {size} numbers, the prompts have "
                f"{vectors.shape[1]}: they come from another model"
            )
        # What says nothing of itself is told by what it makes.
        text_model = model or {"vectors": hashlib.sha256(vectors.astype(np.float32).tobytes()).hexdigest()}
        temperature = self.temperature if self.scores == "softmax" else None
        return dataset.map_columns(
            TagPartition(self.embedding_column, self.columns, vectors, temperature),
            inputs=[self.embedding_column],
            outputs=dict.fromkeys(self.columns, schema.arrow_dtype("float32")),
            fingerprints={self.column_prefix + tag: self.fingerprint(tag, text_model, made_by) for tag in self.prompts},
        )

    def tag_vectors(self, embedder: Any) -> Doubles:
        """Return the unit vector of each tag, shape (n_tags, size)."""
        texts = [text for some in self.prompts.values() for text in some]
        vectors = _unit(embed_texts(texts, embedder), texts)
        ends = np.cumsum([len(some) for some in self.prompts.values()])
        return _unit(np.stack([part.mean(axis=0) for part in np.split(vectors, ends[:-1])]), list(self.prompts))

    def fingerprint(self, tag: str, text_model: Mapping[str, Any], made_by: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what makes a tag's column: values for JSON.

        Parameters
        ----------
        text_model : dict
            What makes the prompts' vectors.
        made_by : dict or None
            What made the embeddings; None where that is not known.
        """
        # A cosine depends on no other tag.
        prompts = self.prompts if self.scores == "softmax" else {tag: self.prompts[tag]}
        return {
            "operator": "ZeroShotTagger",
            "tag": tag,
            "prompts": [[name, list(texts)] for name, texts in prompts.items()],
            "scores": self.scores,
            "temperature": self.temperature if self.scores == "softmax" else None,
            "text_model": dict(text_model),
            "dtype": "float32",
            "parents": {self.embedding_column: None if made_by is None else dict(made_by)},
        }

    def __repr__(self) -> str:
        return f"ZeroShotTagger({self.embedding_column!r} -> {', '.join(self.columns)}; {self.scores})"


class TagPartition:
    """Scores the rows of a partition.

    Parameters
    ----------
    columns : sequence of str
        One a tag.
    vectors : ndarray of float64, shape (n_tags, size)
        The tags' unit vectors.
    temperature : float or None
        None: cosines.
    """

    row_by_row = True

    def __init__(self, column: str, columns: Sequence[str], vectors: Doubles, temperature: float | None) -> None:
        self.column = column
        self.columns = list(columns)
        self.vectors = vectors
        self.temperature = temperature

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the tags' columns for `frame`."""
        values = np.full((len(frame), len(self.columns)), np.nan)
        if not frame[self.column].isna().all():
            matrix, rows = backend.to_matrix(frame[self.column], self.vectors.shape[1])
            # Alone, so that the last bits do not depend on the machine.
            with threads.torch_threads(1):
                for start in range(0, len(rows), BLOCK_ROWS):
                    part = slice(start, start + BLOCK_ROWS)
                    values[rows[part]] = self._scores(matrix[part])
        made = values.astype(np.float32)
        columns = {
            name: backend.series_of(pa.array(made[:, number], pa.float32(), from_pandas=True), frame.index)
            for number, name in enumerate(self.columns)
        }
        return pd.DataFrame(columns, index=frame.index)

    def _scores(self, matrix: npt.NDArray[Any]) -> Doubles:
        """Return the scores of embeddings, shape (n, n_tags); NaN for those that are zero or not finite."""
        import torch

        with np.errstate(over="ignore", invalid="ignore"):
            exact = matrix.astype(np.float64)
            norms = np.sqrt(np.einsum("ij,ij->i", exact, exact))
        good = np.isfinite(norms) & (norms > 0)
        units = exact[good] / norms[good, None]
        scores = torch.from_numpy(units) @ torch.from_numpy(self.vectors).T
        if self.temperature is not None:
            scores = torch.softmax(scores / self.temperature, dim=1)
        made = np.full((len(matrix), len(self.columns)), np.nan)
        made[good] = scores.numpy()
        return made

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return ("TagPartition", self.column, self.columns, self.vectors.tobytes(), self.temperature)


def _by_tag(prompts: Prompts) -> dict[str, list[str]]:
    """Return the prompts of each tag."""
    if isinstance(prompts, str) or not isinstance(prompts, Mapping | Sequence):
        raise ArgumentError(
            f"prompts must be a dict such as {{'watermark': ['a photo with a watermark']}} or a list of texts, not "
            f"{prompts!r}"
        )
    if not prompts:
        raise ArgumentError("prompts is empty: describe at least one tag")
    if isinstance(prompts, Mapping):
        made = {tag: [texts] if isinstance(texts, str) else list(texts) for tag, texts in prompts.items()}
    else:
        made = {}
        for text in prompts:
            tag = _name_of(text)
            if tag in made:
                raise ArgumentError(f"prompts: {text!r} and {made[tag][0]!r} would both be column {tag!r}: give a dict")
            made[tag] = [text]
    for tag, texts in made.items():
        if not texts:
            raise ArgumentError(f"prompts: tag {tag!r} has no text")
        if any(not isinstance(text, str) or not text.strip() for text in texts):
            raise ArgumentError(f"prompts: tag {tag!r} needs texts, not {texts!r}")
    return made


def _name_of(text: Any) -> str:
    if not isinstance(text, str):
        raise ArgumentError(f"prompts must be texts, not {text!r}")
    return re.sub(r"\W+", "_", text.strip().lower()).strip("_")


def _check_name(tag: Any, prefix: str) -> None:
    name = f"{prefix}{tag}"
    if not isinstance(tag, str) or not tag or not name.isidentifier() or keyword.iskeyword(name):
        raise ArgumentError(
            f"tag {tag!r} would make the column {name!r}, which expressions cannot name: use letters, digits and "
            "underscores"
        )


def _unit(vectors: Doubles, names: Sequence[str]) -> Doubles:
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    wrong = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if len(wrong):
        raise ArgumentError(f"prompts: {names[wrong[0]]!r} has a vector of norm {norms[wrong[0]]}")
    made: Doubles = vectors / norms[:, None]
    return made
