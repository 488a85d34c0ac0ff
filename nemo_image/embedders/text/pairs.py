"""The captions of a shard's pictures: embedded and scored batch by batch, beside the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nemo_image.embedders.base import Columns, FloatMatrix, ShardEmbeddings, finished
from nemo_image.embedders.preprocess import PreprocessedBatch
from nemo_image.embedders.text.sources import CaptionSource, text_of_bytes, texts_of
from nemo_image.embedders.text.tokens import CaptionTokenizer
from nemo_image.shards.index import Member, Sample
from nemo_image.shards.read import ShardReader


class EmbedsText(Protocol):
    """What embeds captions."""

    normalize_embeddings: bool

    @property
    def tokenizer(self) -> CaptionTokenizer:
        """What makes their tokens."""
        ...

    def embed_cleaned(self, cleaned: Sequence[str]) -> FloatMatrix:
        """Return the vectors, [n, size] and not normalised, of cleaned captions."""
        ...


@dataclass(frozen=True)
class TextColumns:
    """The names of the columns that captions fill; `caption_number` is None where the dataset has one of its own."""

    embedding: str
    score: str
    caption_number: str | None


@dataclass
class ScoredCaptions:
    """The best caption of each picture of a batch that has one.

    Attributes
    ----------
    places : list of int
        Where the pictures stand among the shard's.
    vectors : ndarray of float32, shape (n, size)
        Of the captions, not normalised.
    scores : ndarray of float32, shape (n,)
        Cosines of picture and caption.
    numbers : list of int
        Which of the picture's captions it is, from 0.
    """

    places: list[int]
    vectors: FloatMatrix
    scores: npt.NDArray[np.float32]
    numbers: list[int]


class ShardCaptions:
    """Finds, embeds and scores the captions of a shard's pictures.

    Parameters
    ----------
    embedder : EmbedsText
    sources : sequence of CaptionSource
        Where captions are looked for; the first that has one for a picture gives all of that picture's.
    reader : ShardReader
    samples : sequence of Sample
        Of the pictures.
    columns : dict of str to list
        The columns that `sources` name: a value a picture.
    names : TextColumns
    """

    def __init__(
        self,
        embedder: EmbedsText,
        sources: Sequence[CaptionSource],
        reader: ShardReader,
        samples: Sequence[Sample],
        columns: Columns,
        names: TextColumns,
    ) -> None:
        self._embedder = embedder
        self._sources = sources
        self._reader = reader
        self._samples = samples
        self._columns = columns
        self._names = names
        # The first member that may hold captions is read along with the picture; others, once all before are blank.
        self._first = next((number for number, source in enumerate(sources) if source.kind != "column"), len(sources))
        self.members = [self._read_along(place) for place in range(len(samples))]

    def _read_along(self, place: int) -> list[Member]:
        if self._first == len(self._sources):
            return []
        if any(text.strip() for source in self._sources[: self._first] for text in self._in_column(source, place)):
            return []
        sample = self._samples[place]
        member = sample.caption if self._sources[self._first].kind == "txt" else sample.json
        return [] if member is None else [member]

    def _in_column(self, source: CaptionSource, place: int) -> list[str]:
        return texts_of(self._columns[source.name][place])

    def run(
        self, places: range, batch: PreprocessedBatch, texts: Sequence[Sequence[bytes]], made: npt.NDArray[Any]
    ) -> ScoredCaptions:
        """Embed and score the captions of the good pictures of a batch."""
        owners: list[int] = []  # the row in `made` of each caption
        numbers: list[int] = []
        cleaned: list[str] = []
        for row, picture in enumerate(batch.rows):
            for number, text in self._captions(places[picture], texts[picture]):
                owners.append(row)
                numbers.append(number)
                cleaned.append(text)
        vectors = self._embedder.embed_cleaned(cleaned)
        scores = cosines(made[owners], vectors)
        best = best_of_each(owners, scores)
        return ScoredCaptions(
            places=[places[batch.rows[owners[caption]]] for caption in best],
            vectors=vectors[best],
            scores=scores[best],
            numbers=[numbers[caption] for caption in best],
        )

    def _captions(self, place: int, texts: Sequence[bytes]) -> list[tuple[int, str]]:
        """Return a picture's captions, cleaned, with their numbers; none are blank."""
        clean = self._embedder.tokenizer.clean
        for number, source in enumerate(self._sources):
            ahead = texts[0] if number == self._first and texts else None
            cleaned = [clean(text) for text in self._raw(source, place, ahead)]
            found = [(which, text) for which, text in enumerate(cleaned) if text]
            if found:
                return found
        return []

    def _raw(self, source: CaptionSource, place: int, ahead: bytes | None) -> list[str]:
        if source.kind == "column":
            return self._in_column(source, place)
        sample = self._samples[place]
        member = sample.caption if source.kind == "txt" else sample.json
        if member is None:
            return []
        data = self._reader.read(member) if ahead is None else ahead
        if source.kind == "txt":
            return text_of_bytes(data)
        return texts_of((self._reader.parse_json(sample, data) or {}).get(source.name))

    def finish(self, pieces: Sequence[ScoredCaptions], rows: npt.NDArray[np.int64], found: ShardEmbeddings) -> None:
        """Write the captions' columns into `found`; pictures that have no embedding after all get none of them."""
        pictured = set(found.rows.tolist())
        numbers: dict[int, float] = {}
        scores: dict[int, float] = {}
        for piece in pieces:
            for place, score, number in zip(piece.places, piece.scores.tolist(), piece.numbers, strict=True):
                numbers[int(rows[place])], scores[int(rows[place])] = number, score
        places = rows[[place for piece in pieces for place in piece.places]]
        vectors = np.concatenate([piece.vectors for piece in pieces]) if pieces else np.zeros((0, 0), np.float32)
        keep = np.array([row in pictured for row in places.tolist()], bool)
        # A caption that the model makes nothing of (a vector of zeros) is none.
        done = finished(vectors[keep], places[keep], {}, normalize=self._embedder.normalize_embeddings)
        scored = done.rows.tolist()
        found.vectors[self._names.embedding] = (done.matrix, done.rows)
        found.values[self._names.score] = _only(scores, scored)
        if self._names.caption_number is not None:
            found.values[self._names.caption_number] = _only(numbers, scored)


def _only(values: Mapping[int, float], rows: Sequence[int]) -> dict[int, float]:
    return {row: values[row] for row in rows}


def cosines(one: npt.NDArray[Any], two: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the cosine of each pair of rows, computed in float64; NaN where one is zero.

    This is CLIP's similarity (Radford et al., 2021, arXiv 2103.00020, figure 3) without its learned scale.

    Parameters
    ----------
    one, two : ndarray, shape (n, size)

    Returns
    -------
    ndarray of float32, shape (n,)
        From -1 to 1.
    """
    one, two = one.astype(np.float64), two.astype(np.float64)
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.einsum("ij,ij->i", one, two) / norms
    scores: npt.NDArray[np.float32] = np.clip(found, -1, 1).astype(np.float32)
    return scores


def best_of_each(owners: Sequence[int], scores: npt.NDArray[np.float32]) -> list[int]:
    """Return the position of each owner's highest score, in the owners' order; of equal ones, the first.

    Parameters
    ----------
    owners : sequence of int
        Whose each score is; those of one owner stand together.
    scores : ndarray of float32
        NaN counts as the lowest.
    """
    best: dict[int, int] = {}
    values = np.where(np.isnan(scores), -np.inf, scores)
    for place, owner in enumerate(owners):
        if owner not in best or values[place] > values[best[owner]]:
            best[owner] = place
    return list(best.values())
