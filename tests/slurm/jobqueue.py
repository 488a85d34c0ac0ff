"""Enrich a dataset on workers that dask-jobqueue submits as Slurm jobs: ``python jobqueue.py INPUT OUTPUT``."""

from __future__ import annotations

import json
import os
import sys

from dask_jobqueue import SLURMCluster

from nemo_image import get_client
from tests.slurm import gated


def node() -> str:
    """Return the name of the node that asks."""
    return os.environ["SLURMD_NODENAME"]


def main(source: str, output: str) -> None:
    """Start workers on both nodes, and save."""
    with SLURMCluster(cores=1, processes=1, memory="2GB", job_cpu=4, job_directives_skip=["--mem="]) as cluster:
        cluster.scale(jobs=2)
        with get_client(scheduler_address=cluster.scheduler_address, n_workers=2, timeout=120) as client:
            gated.enrich(source, output)
            print(json.dumps({"nodes": sorted(client.run(node).values())}))


if __name__ == "__main__":
    main(*sys.argv[1:])
