"""Enrich a dataset on the cluster of a Slurm job; shards from the fourth on are computed only once a file is there.

Run as ``python gated.py INPUT OUTPUT``, with NEMO_IMAGE_SCHEDULER_FILE, or without for threads of this process. GATE
names the file: no argument of the computation, which what it writes would name.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import nullcontext
from typing import Any

from nemo_image import get_client
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import TimmImageEmbedder
from tests.makers import TINY_MODEL


def wait_at_the_gate(frame: Any) -> Any:
    """Return the rows as they are, when it is time."""
    while len(frame) and frame["seed"].iloc[0] >= 9 and not os.path.exists(os.environ["GATE"]):
        time.sleep(0.05)
    return frame


def enrich(source: str, output: str) -> None:
    """Embed, and save."""
    dataset = TimmImageEmbedder(TINY_MODEL, autocast=False)(ImageTextPairDataset.from_webdataset(source))
    dataset.metadata = dataset.metadata.map_partitions(wait_at_the_gate, meta=dataset.metadata._meta)
    dataset.save_metadata(output)


if __name__ == "__main__":
    file = os.environ.get("NEMO_IMAGE_SCHEDULER_FILE")
    with get_client(scheduler_file=file) if file else nullcontext():
        enrich(*sys.argv[1:])
