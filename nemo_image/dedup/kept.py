"""The curve from the threshold to the share of rows that it keeps."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.dedup.semantic import SemanticDedup
from nemo_image.dedup.semantic_run import SemanticRun
from nemo_image.dedup.sweep import USUAL_EPS, is_eps
from nemo_image.errors import ArgumentError


def kept_fraction(
    dataset: ImageTextPairDataset, eps: Sequence[float] = USUAL_EPS, dedup: SemanticDedup | None = None
) -> pd.DataFrame:
    """Tell which share of the rows semantic deduplication would keep at several thresholds.

    All thresholds are judged in one pass over the pairs, within clusters (`n_probe` adds nothing here). The clustering
    stays in the dataset's ``_nemo_image`` folder, where a :class:`SemanticDedup` of the same settings finds it, and
    removes it when it is done.

    Parameters
    ----------
    dataset : ImageTextPairDataset
        With embeddings.
    eps : sequence of float
        Thresholds, each in [0, 1].
    dedup : SemanticDedup, optional
        Whose settings are used; its own `eps` is not. By default ``SemanticDedup()``.

    Returns
    -------
    DataFrame
        One row a threshold: ``eps``, ``kept``, ``removed``, ``total`` and ``kept_fraction``.

    Raises
    ------
    ArgumentError
        If a threshold is out of range.

    See Also
    --------
    SemanticDedup : raises what it raises.
    """
    wanted = [eps] if isinstance(eps, int | float) else list(eps)
    strange = [one for one in wanted if not is_eps(one)]
    if strange or not wanted:
        raise ArgumentError(f"eps must be thresholds in [0, 1], not {strange[0] if strange else eps!r}")
    how = dedup or SemanticDedup()
    run = SemanticRun.of(dataset, how.cluster_settings(dataset.id_col), how.judge_settings())
    with run.clustered() as clustered:
        points = run.sweep(clustered, [float(one) for one in wanted])
    rows = [(point.eps, point.kept, point.removed, point.total) for point in points]
    frame = pd.DataFrame(rows, columns=["eps", "kept", "removed", "total"])
    return frame.assign(kept_fraction=frame["kept"] / frame["total"].clip(lower=1))
