"""Estimate what clustering missed: the true neighbours of a sample of rows, over all clusters.

A pair in different clusters is never compared. A sampled row is compared with every row of the dataset, whatever its
cluster, which tells how many pairs at the threshold there are, and how many of them were compared (recall).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nemo_image.dedup.clusters.sample import FIRST_ROWS, unit_rows
from nemo_image.dedup.exchange.rows import Hashes
from nemo_image.dedup.exchange.usable import Matrix
from nemo_image.dedup.pairs.vectors import Vectors
from nemo_image.dedup.result import Missed

SAMPLED_ROWS = FIRST_ROWS
BLOCK_ROWS = 4096

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Probe:
    """The sampled rows.

    Attributes
    ----------
    hashes : ndarray of uint64, shape (n,)
        By which a row is told from itself.
    vectors : ndarray of float32, shape (n, size)
        Of length 1.
    clusters : ndarray of int32, shape (n, n_probe)
        Those that each row is compared within.
    threshold : float
        Cosine from which a pair counts.
    """

    hashes: Hashes
    vectors: Matrix
    clusters: npt.NDArray[np.int32]
    threshold: float

    def count(self, cluster: int, vectors: Vectors, home: npt.NDArray[np.int64], hashes: Hashes) -> Counts:
        """Count each sampled row's neighbours among the rows of a cluster.

        Parameters
        ----------
        vectors : Vectors
            Of the cluster.
        home : ndarray of int64
            Which of them belong to it, ascending; others only visit.
        hashes : ndarray of uint64
            Of all of them.

        Returns
        -------
        ndarray of int64, shape (2, n)
            All neighbours, and those that were compared.
        """
        import torch

        found = np.zeros(len(self.hashes), np.int64)
        sampled = torch.from_numpy(self.vectors).T
        for start in range(0, len(home), BLOCK_ROWS):
            rows = home[start : start + BLOCK_ROWS]
            near = (torch.from_numpy(unit_rows(vectors.take(rows))) @ sampled >= self.threshold).numpy()
            for row in np.flatnonzero(np.isin(hashes[rows], self.hashes)):
                near[row] &= self.hashes != hashes[rows[row]]
            found += near.sum(axis=0)
        return np.stack([found, np.where((self.clusters == cluster).any(axis=1), found, 0)])


def estimate(counts: Sequence[Counts], sampled: int) -> Missed:
    """Return the estimate that the buckets' counts give."""
    every, compared = sum(counts, np.zeros((2, sampled), np.int64))
    return Missed(sampled, int(every.sum()), int(compared.sum()), int((every > 0).sum()), int((compared > 0).sum()))
