"""k-means on GPUs, by cuML."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_image.errors import MissingDependencyError


def fit_cuml_kmeans(
    sample: npt.NDArray[np.float32],
    n_clusters: int,
    *,
    max_iter: int,
    tol: float,
    random_state: int,
    client: Any = None,
) -> npt.NDArray[np.float32]:
    """Return the centroids of cuML's k-means, started by its own k-means|| (Bahmani and others, 2012).

    Parameters
    ----------
    sample : ndarray of float32, shape (n, size)
    n_clusters : int
        From 1 to n.
    max_iter : int
        The most iterations.
    tol : float
        Iterations end when the centroids' squared shifts add up to less.
    random_state : int
        Sets the start.
    client : distributed.Client, optional
        A cluster of GPU workers: with more than one, the rows are spread over them. By default, and with one worker,
        this process's own GPU is used.

    Returns
    -------
    ndarray of float32, shape (n_clusters, size)

    Raises
    ------
    MissingDependencyError
        If cuML is not installed.
    """
    settings = {"n_clusters": n_clusters, "max_iter": max_iter, "tol": tol, "random_state": random_state, "n_init": 1}
    workers = [] if client is None else sorted(client.ncores())
    try:
        import cupy

        if len(workers) > 1:
            from cuml.dask.cluster import KMeans as SpreadKMeans

            rows = spread_rows(client, workers, sample, cupy.asarray, cupy.empty((0, 0), np.float32))
            model = SpreadKMeans(client=client, **settings).fit(rows)
        else:
            from cuml.cluster import KMeans

            model = KMeans(**settings).fit(sample)
    except ImportError as error:
        raise MissingDependencyError(
            f"k-means on GPUs needs cuML ({error}): pip install 'nemo-image[image_cuda13]' (or image_cuda12)"
        ) from error
    return np.ascontiguousarray(cupy.asnumpy(model.cluster_centers_), np.float32)


def spread_rows(client: Any, workers: list[str], rows: npt.NDArray[Any], load: Callable[[Any], Any], meta: Any) -> Any:
    """Return rows as a Dask array of one block a worker, each held by its worker.

    Parameters
    ----------
    load : callable
        Called on each worker with its rows: what makes the device's array of them.
    meta : array
        An empty array of the kind that `load` returns.
    """
    import dask.array as da

    parts = [part for part in np.array_split(rows, len(workers)) if len(part)]
    name = f"rows-{uuid.uuid4().hex}"
    # The futures are the array's own keys, as in a persisted one: through tasks that only name them, the scheduler
    # could bring several to one worker.
    held = {}
    for number, (worker, part) in enumerate(zip(workers, parts, strict=False)):
        sent = client.scatter(part, workers=[worker], hash=False)
        held[name, number, 0] = client.submit(load, sent, workers=[worker], key=(name, number, 0))
    chunks = (tuple(len(part) for part in parts), rows.shape[1:])
    return da.Array(held, name, chunks, rows.dtype, meta=meta)
