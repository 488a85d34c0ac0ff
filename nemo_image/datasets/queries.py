"""Texts, pictures and vectors that saved embeddings are compared with, and whether one model made both."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_image.errors import ArgumentError, EmbeddingError, MissingColumnError
from nemo_image.shards.keys import IMAGE_EXTENSIONS

Doubles = npt.NDArray[np.float64]


def require_saved(column: str, columns: Sequence[str], pending: Mapping[str, Any]) -> None:
    """Raise if a dataset has no embeddings that lie in files already.

    Parameters
    ----------
    columns : sequence of str
        Those of the metadata.
    pending : mapping
        Its keys are the columns that are still to compute.

    Raises
    ------
    MissingColumnError
        Saying what to do.
    """
    if column not in columns:
        raise MissingColumnError(
            f"the metadata has no column {column!r}: run an embedder and save_metadata() first, or name the column of "
            f"embeddings (embedding_column=); there are {', '.join(columns)}"
        )
    if column in pending:
        raise MissingColumnError(
            f"the embeddings of column {column!r} are not computed yet: call save_metadata() first, and go on with the "
            "dataset that it returns"
        )


def settled(embedder: Any) -> Any:
    """Return the embedder with its weights found, where finding them is a step of its own."""
    load = getattr(embedder, "load", None)
    return load() if callable(load) else embedder


def fingerprint_of(embedder: Any) -> dict[str, Any] | None:
    """Return what an embedder (see :func:`settled`) says of what it makes; None if it says nothing."""
    tell = getattr(embedder, "fingerprint", None)
    return dict(tell()) if callable(tell) else None


def require_same_model(
    mine: Mapping[str, Any] | None, made_by: Mapping[str, Any] | None, column: str, what: str = "the embedder given"
) -> None:
    """Raise if embeddings are known to come from another model.

    Two fingerprints are of one model if their ``model`` and ``weights_sha256`` agree; where weights are not one known
    file (an embedder of the user's own), their ``operator`` and ``state``. What decodes the pictures, and the
    precision, count for nothing here. Of a column that came with the data nothing is known.

    Parameters
    ----------
    mine : mapping or None
        The fingerprint of the embedder given (or what else `what` names).
    made_by : mapping or None
        That of the column.

    Raises
    ------
    EmbeddingError
        Naming both.
    """
    if mine is None or made_by is None:
        return
    by_weights = bool(mine.get("weights_sha256") and made_by.get("weights_sha256"))
    names = ("model", "weights_sha256") if by_weights else ("model", "operator", "state")
    differing = [name for name in names if mine.get(name) != made_by.get(name)]
    if differing:
        said = "; ".join(f"{name} {made_by.get(name)!r} there, {mine.get(name)!r} here" for name in differing)
        raise EmbeddingError(
            f"column {column!r} was made by another model than {what} ({said}): give the one that made it, or embed "
            "anew"
        )


def query_vectors(query: Any, embedder: Any | None) -> Doubles:
    """Return what is looked for as vectors of any norm but zero.

    Parameters
    ----------
    query : str, path, bytes, picture, vector, matrix, or sequence of them
        A text; a picture as ``pathlib.Path``, bytes or ``PIL.Image.Image``; numbers. A string that names an existing
        picture file is that picture.
    embedder : object or None
        With ``embed_text(texts)`` for texts and ``embed_pictures(pictures)`` for pictures, each returning (n, size).

    Returns
    -------
    ndarray of float64, shape (n, size)
        In the order of the query.

    Raises
    ------
    ArgumentError
        If the query is empty, of another kind, or zero or not finite, or the embedder is missing or cannot do it.
    """
    items = _items(query)
    matrix = _numbers(query) if items is None else _embedded(items, embedder)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ArgumentError(f"query: a vector (size,) or a matrix (n, size) is needed, not one of shape {matrix.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.sqrt(np.einsum("ij,ij->i", matrix, matrix))
    wrong = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if len(wrong):
        raise ArgumentError(f"query: vector {wrong[0]} has norm {norms[wrong[0]]}: it has no direction to look in")
    return matrix


def embed_texts(texts: Sequence[str], embedder: Any) -> Doubles:
    """Return the embedder's vectors of texts, shape (n, size).

    Raises
    ------
    ArgumentError
        If it has no text tower, a text is empty, or it gives something else.
    """
    empty = [number for number, text in enumerate(texts) if not text.strip()]
    if empty:
        raise ArgumentError(f"text {empty[0]} is empty: it says nothing to look for")
    return _made_by(embedder, "embed_text", "texts", texts)


def _items(query: Any) -> list[str | bytes | Any] | None:
    """Return texts and pictures as a list; None where the query is numbers."""
    if _is_item(query):
        return [query]
    if isinstance(query, list | tuple) and query and all(map(_is_item, query)):
        return list(query)
    return None


def _is_item(value: Any) -> bool:
    return isinstance(value, str) or _is_picture(value)


def _is_picture(value: Any) -> bool:
    if isinstance(value, str):
        # A string that ends so and names a file is that picture, not a text.
        return value.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and os.path.isfile(value)
    from PIL import Image

    return isinstance(value, os.PathLike | bytes | bytearray | memoryview | Image.Image)


def _numbers(query: Any) -> Doubles:
    if hasattr(query, "detach"):
        query = query.detach().cpu().numpy()
    try:
        matrix = np.asarray(query, np.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"query: {type(query).__name__} is neither text (str), a picture (pathlib.Path, bytes, PIL image), a "
            "vector, nor a list of one of these"
        ) from error
    return matrix[None] if matrix.ndim == 1 else matrix


def _embedded(items: Sequence[Any], embedder: Any | None) -> Doubles:
    if embedder is None:
        raise ArgumentError(
            "query: texts and pictures need embedder=, the one that made the embeddings; without it, give a vector"
        )
    pictures = [number for number, item in enumerate(items) if _is_picture(item)]
    texts = sorted(set(range(len(items))) - set(pictures))
    parts = []
    if texts:
        parts.append(embed_texts([items[number] for number in texts], embedder))
    if pictures:
        for number in pictures:
            if isinstance(items[number], str | os.PathLike) and not os.path.isfile(items[number]):
                raise ArgumentError(f"query: {os.fspath(items[number])}: no such file")
        plain = [_plain(items[number]) for number in pictures]
        parts.append(_made_by(embedder, "embed_pictures", "pictures", plain))
    if len({part.shape[1] for part in parts}) > 1:
        raise ArgumentError(f"{type(embedder).__name__}: its texts and pictures have vectors of different lengths")
    matrix = np.empty((len(items), parts[0].shape[1]))
    matrix[[*texts, *pictures]] = np.concatenate(parts)
    return matrix


def _plain(picture: Any) -> Any:
    if isinstance(picture, bytearray | memoryview):
        return bytes(picture)
    return Path(picture) if isinstance(picture, str) else picture


def _made_by(embedder: Any, method: str, what: str, values: Sequence[Any]) -> Doubles:
    embed = getattr(embedder, method, None)
    if not callable(embed):
        raise ArgumentError(f"{type(embedder).__name__} cannot embed {what}: it has no {method}()")
    matrix = np.asarray(embed(values), np.float64)
    if matrix.ndim != 2 or len(matrix) != len(values):
        raise ArgumentError(
            f"{type(embedder).__name__}.{method} gave an array of shape {matrix.shape} for {len(values)} {what}"
        )
    return matrix
