"""Products of a block of rows with a tile of others, and the few of them that matter.

A product is looked at through the maxima of groups of its columns, so that a tile of four million numbers costs one
reduction beside the multiplication.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from nemo_image.dedup.pairs.cosine import Doubles, canonical_cosines, edge, inverse_norms, units
from nemo_image.dedup.pairs.vectors import Floats, Indices, Vectors

GROUP = 64
TILE_COLUMNS = 4096

# Groups to look into, and pairs, for each row of the block; a tile with more is cheaper in float64 than pair by pair.
HITS_A_ROW = 16
PAIRS_A_ROW = 32

Products = npt.NDArray[Any]


class Span(NamedTuple):
    """Groups of columns whose rows share a pattern."""

    pattern: int
    start: int
    stop: int


@dataclass(frozen=True)
class Columns:
    """The rows that a tile compares with, pattern after pattern.

    Each pattern's rows ascend, and its last one is repeated until its groups are full: a repeated column changes no
    maximum.

    Attributes
    ----------
    indices : ndarray of int64, shape (m,)
        The rows, ascending, as places in the vectors.
    places : ndarray of int64, shape (width,)
        The row of each column, as a place in `indices`.
    real : ndarray of bool, shape (width,)
        False for repeated columns.
    spans : tuple of Span
        Each pattern's groups.
    """

    indices: Indices
    places: Indices
    real: npt.NDArray[np.bool_]
    spans: tuple[Span, ...]

    @property
    def rows(self) -> Indices:
        """The row of each column, as a place in the vectors."""
        return self.indices[self.places]


class Pairs(NamedTuple):
    """Pairs of a block's row (its place in the block) and another row (its place in the vectors) with its pattern."""

    rows: Indices
    others: Indices
    patterns: Indices
    products: Products


def join(parts: list[Pairs]) -> Pairs:
    """Return all pairs of the parts, at least one."""
    return Pairs(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def lay_out(indices: Indices, patterns: npt.NDArray[np.int32]) -> Columns:
    """Return the columns of a tile for rows that ascend, each with its pattern."""
    places, real, spans, start = [], [], [], 0
    for pattern in np.unique(patterns).tolist():
        of_pattern = np.flatnonzero(patterns == pattern)
        padding = -len(of_pattern) % GROUP
        places.append(np.pad(of_pattern, (0, padding), "edge"))
        real.append(np.arange(len(of_pattern) + padding) < len(of_pattern))
        stop = start + len(places[-1]) // GROUP
        spans.append(Span(pattern, start, stop))
        start = stop
    return Columns(indices, np.concatenate(places), np.concatenate(real), tuple(spans))


def tiles(indices: Indices, patterns: npt.NDArray[np.int32]) -> Iterator[Columns]:
    """Cut rows that ascend into tiles; one with very many patterns has fewer rows, as each pattern is filled up."""
    start = 0
    while start < len(indices):
        length = TILE_COLUMNS
        columns = lay_out(indices[start : start + length], patterns[start : start + length])
        while len(columns.places) > 2 * TILE_COLUMNS:
            length //= 2
            columns = lay_out(indices[start : start + length], patterns[start : start + length])
        yield columns
        start += length


class Multiplier:
    """Computes products of a block's unit rows with a tile's, on a device, in memory that is used again.

    Parameters
    ----------
    vectors : Vectors
        All rows.
    device : str
        A device of torch.
    """

    def __init__(self, vectors: Vectors, device: str) -> None:
        self._vectors, self._device = vectors, torch.device(device)
        self._inverse = inverse_norms(vectors)
        self.size = vectors.size
        self._scratch: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._block: dict[torch.dtype, torch.Tensor] = {}
        self.block, self.block_indices = np.empty((0, vectors.size), np.float32), np.empty(0, np.int64)

    def load(self, indices: Indices) -> None:
        """Make the rows at `indices`, which ascend, the block."""
        self.block, self.block_indices = self._vectors.take(indices), indices
        self._block.clear()

    def canonical(self, rows: Indices, others: Indices) -> Floats:
        """Return the canonical cosines of pairs of a row of the block and any row, shape (len(rows),)."""
        block_inverse = self._inverse[self.block_indices]
        return canonical_cosines(self.block, block_inverse, rows, self._vectors, self._inverse, others)

    def product(self, columns: Columns, kind: torch.dtype) -> torch.Tensor:
        """Return the block's products with a tile, shape (b, width); the next of its kind overwrites it."""
        if kind not in self._block:
            self._block[kind] = self._units(self.block, self.block_indices, "block", kind)
        others = self._units(self._vectors.take(columns.indices), columns.indices, "tile", kind)
        if len(columns.places) != len(columns.indices) or len(columns.spans) > 1:
            others = others.index_select(0, torch.from_numpy(columns.places).to(self._device))
        shape = (len(self.block), len(others))
        return torch.mm(self._block[kind], others.T, out=self._room("product", kind, shape, self._device))

    def _units(self, rows: Floats, indices: Indices, what: str, kind: torch.dtype) -> torch.Tensor:
        room = self._room(what, kind, rows.shape, torch.device("cpu"))
        units(rows, self._inverse[indices], room.numpy())
        return room.to(self._device)

    def _room(self, what: str, kind: torch.dtype, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Return memory for a matrix; what lay in it under that name is lost."""
        needed = shape[0] * shape[1]
        room = self._scratch.get((what, kind))
        if room is None or room.numel() < needed:
            room = self._scratch[what, kind] = torch.empty(needed, dtype=kind, device=device)
        return room[:needed].view(shape)


class Tile:
    """The products of the multiplier's block with the columns of a tile, computed when they are first asked for.

    They last until the next tile's are computed.

    Parameters
    ----------
    strict : bool
        Compare with earlier rows only: products with a row itself and with later ones are -inf.
    """

    def __init__(self, multiplier: Multiplier, columns: Columns, *, strict: bool = False) -> None:
        self.columns = columns
        self._multiplier, self._strict = multiplier, strict
        self._products: dict[torch.dtype, torch.Tensor] = {}

    def product(self, kind: torch.dtype) -> torch.Tensor:
        """Return the products in float32 or float64, shape (b, width), on the device."""
        if kind not in self._products:
            product = self._multiplier.product(self.columns, kind)
            if self._strict:
                later = self.columns.rows[None, :] >= self._multiplier.block_indices[:, None]
                product.masked_fill_(torch.from_numpy(later).to(product.device), -torch.inf)
            self._products[kind] = product
        return self._products[kind]

    def select(self, columns: Columns) -> Tile:
        """Return a tile of some of this one's rows; what was multiplied is not multiplied again."""
        selected = Tile(self._multiplier, columns, strict=self._strict)
        places = np.searchsorted(self.columns.indices, columns.rows)
        for kind, product in self._products.items():
            same = np.array_equal(places, self.columns.places)
            picked = torch.from_numpy(places).to(product.device)
            selected._products[kind] = product if same else product.index_select(1, picked)
        return selected


def group_maxima(product: torch.Tensor) -> Products:
    """Return the largest product of each row with each group of columns, shape (b, width / GROUP)."""
    return product.view(len(product), -1, GROUP).amax(2).cpu().numpy()


def pairs_above(
    product: torch.Tensor, maxima: Products, columns: Columns, floors: Mapping[int, Doubles]
) -> Pairs | None:
    """Return the pairs whose product reaches the row's floor for the column's pattern; None where they are very many.

    Parameters
    ----------
    product : Tensor, shape (b, width)
    maxima : ndarray, shape (b, width / GROUP)
        What :func:`group_maxima` gave for it.
    floors : mapping of int to ndarray of float64, shape (b,)
        Least product by pattern.
    """
    found, most = [], len(product)
    for pattern, start, stop in columns.spans:
        rows, groups = np.nonzero(maxima[:, start:stop] >= floors[pattern][:, None])
        if len(rows) > most * HITS_A_ROW:
            return None
        groups += start
        values = _groups_of(product, rows, groups)
        hits, inner = np.nonzero(values >= floors[pattern][rows, None])
        places = groups[hits] * GROUP + inner
        keep = columns.real[places]
        hits, inner, places = hits[keep], inner[keep], places[keep]
        if len(hits) > most * PAIRS_A_ROW:
            return None
        patterns = np.full(len(hits), pattern)
        found.append(Pairs(rows[hits], columns.rows[places], patterns, values[hits, inner]))
    return join(found)


def leading_pairs(
    product: torch.Tensor, maxima: Products, columns: Columns, least: Mapping[int, Floats], bound: float
) -> Pairs:
    """Return, for each row and pattern, the earliest column of the largest canonical cosine, if that is large enough.

    Where the float64 products leave that open (one lies within `bound` of where the rounding to float32 changes), all
    columns that it could be.

    Parameters
    ----------
    product : Tensor of float64, shape (b, width)
    maxima : ndarray of float64, shape (b, width / GROUP)
        What :func:`group_maxima` gave for it.
    least : mapping of int to ndarray of float32, shape (b,)
        The least canonical cosine that is of interest, by pattern.
    bound : float
        What :func:`~nemo_image.dedup.pairs.cosine.double_bound` gives.
    """
    found = []
    for pattern, start, stop in columns.spans:
        here = maxima[:, start:stop]
        top = here.max(1)
        goal = np.maximum((top - bound).astype(np.float32), least[pattern])
        floor = edge(goal) - bound
        rows = np.flatnonzero(top >= floor)
        groups = start + (here[rows] >= floor[rows, None]).argmax(1)
        values = _groups_of(product, rows, groups)
        inner = (values >= floor[rows, None]).argmax(1)
        first = np.take_along_axis(values, inner[:, None], 1)[:, 0]
        above = edge(np.nextafter(goal[rows], np.float32(np.inf))) - bound
        clear = (first >= floor[rows] + 2 * bound) & (top[rows] < above)
        places = [(groups * GROUP + inner)[clear]]
        of_row, values_of = [rows[clear]], [first[clear]]
        for row in rows[~clear].tolist():
            span = product[row, start * GROUP : stop * GROUP].cpu().numpy()
            open_ = np.flatnonzero((span >= floor[row]) & columns.real[start * GROUP : stop * GROUP])
            places.append(open_ + start * GROUP)
            of_row.append(np.full(len(open_), row))
            values_of.append(span[open_])
        others = columns.rows[np.concatenate(places)]
        found.append(Pairs(np.concatenate(of_row), others, np.full(len(others), pattern), np.concatenate(values_of)))
    return join(found)


def _groups_of(product: torch.Tensor, rows: Indices, groups: Indices) -> Products:
    """Return the products of some rows with one group each, shape (len(rows), GROUP)."""
    places = torch.from_numpy(rows * (product.shape[1] // GROUP) + groups).to(product.device)
    return product.view(-1, GROUP).index_select(0, places).cpu().numpy()
