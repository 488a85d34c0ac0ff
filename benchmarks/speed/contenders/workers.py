"""Embed and save on a cluster of some worker processes, each of one thread, on a core of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any


def ours(tars: str, weights: str, out: str, workers: int) -> Any:
    """EfficientNet-Lite0, tars to Parquet."""
    from nemo_image import get_client
    from nemo_image.datasets import ImageTextPairDataset
    from nemo_image.embedders import TimmImageEmbedder

    # One core a process, for decoding and torch too.
    one = {"NEMO_IMAGE_CPUS_PER_WORKER": "1", "OMP_NUM_THREADS": "1"}
    client = get_client("cpu", n_workers=workers, threads_per_worker=1, dashboard_address=None, env=one)
    embedder = TimmImageEmbedder("tf_efficientnet_lite0", weights=weights, num_threads_per_worker=1, autocast=False)

    # Inside this function, so that it travels whole: the workers cannot import this file.
    def on_one_core(dask_worker: Any) -> None:
        """Keep a worker's threads, and those that they start, on one core: a lone worker decodes on no other."""
        cores = sorted(os.sched_getaffinity(0))
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(int(thread), {cores[int(dask_worker.name) % len(cores)]})

    client.run(on_one_core)

    def run() -> dict[str, Any]:
        shutil.rmtree(out, ignore_errors=True)
        with client.as_current():
            saved = embedder(ImageTextPairDataset.from_webdataset(tars)).save_metadata(Path(out))
        return {"count": saved.run_totals["results"]["image_embedding"]}

    return run
