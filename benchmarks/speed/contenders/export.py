"""Export of a dataset: ours, webdataset's reader into its writer, and copying the same bytes."""

from __future__ import annotations

import glob
import os
import shutil
from pathlib import Path
from typing import Any

WHENCE = ("__url__", "__local_path__")
"""What webdataset's reader says of a sample's file, and its writer would write as members."""


def ours(tars: str, target: str, samples_per_shard: int, shuffle_seed: int | None = None, cores: int = 0) -> Any:
    """``to_webdataset`` as users call it: threads of this process, one a core; all that is written is synced."""
    if cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    import pyarrow.parquet as pq

    from nemo_image.datasets import ImageTextPairDataset

    shutil.rmtree(target, ignore_errors=True)  # of a run that was killed
    dataset = ImageTextPairDataset.from_webdataset(tars)
    dataset.metadata = dataset.metadata.assign(keep=True)
    count = sum(pq.read_metadata(path).num_rows for path in glob.glob(f"{tars}/*.parquet"))

    def run() -> dict[str, Any]:
        done = dataset.to_webdataset(target, "keep", samples_per_shard=samples_per_shard, shuffle_seed=shuffle_seed)
        assert done.run_totals is not None
        assert done.run_totals["rows_out"] == count
        return {"count": count, "after": lambda: shutil.rmtree(target)}

    return run


def webdataset_copy(tars: str, target: str, samples_per_shard: int, synced: bool, buffer: int = 0) -> Any:
    """webdataset's reader into its ShardWriter, which uses one core and leaves the writing to the system's cache.

    Parameters
    ----------
    synced : bool
        Sync each shard when it is finished, so that it would survive a power cut as ours does.
    buffer : int
        Samples of the reader's shuffle buffer; shuffles if not 0, the input shards too.
    """
    import webdataset

    shutil.rmtree(target, ignore_errors=True)

    def sync(name: str) -> None:
        if synced:
            with open(name, "rb") as file:
                os.fsync(file.fileno())

    def run() -> dict[str, Any]:
        os.makedirs(target)
        count = 0
        urls = sorted(glob.glob(f"{tars}/*.tar"))
        read = webdataset.WebDataset(urls, shardshuffle=len(urls) if buffer else False, seed=1)
        pattern = f"{target}/%05d.tar"
        with webdataset.ShardWriter(pattern, maxcount=samples_per_shard, post=sync, verbose=0) as writer:
            for sample in read.shuffle(buffer) if buffer else read:
                writer.write({name: value for name, value in sample.items() if name not in WHENCE})
                count += 1
        return {"count": count, "after": lambda: shutil.rmtree(target)}

    return run


def copy_bytes(tars: str, target: str, samples_per_shard: int, cores: int) -> Any:
    """The tars' bytes, copied by the kernel where it can, with the same sync: nothing renamed, nothing looked at."""
    from concurrent.futures import ThreadPoolExecutor

    import pyarrow.parquet as pq

    shutil.rmtree(target, ignore_errors=True)
    paths = sorted(Path(tars).glob("*.tar"))
    count = sum(pq.read_metadata(path.with_suffix(".parquet")).num_rows for path in paths)

    def copy(path: Path) -> None:
        with open(path, "rb") as source, open(Path(target) / path.name, "wb") as out:
            shutil.copyfileobj(source, out, 2**18)
            out.flush()
            os.fsync(out.fileno())

    def run() -> dict[str, Any]:
        os.makedirs(target)
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(copy, paths))
        written = sum(path.stat().st_size for path in paths)
        return {"count": count, "bytes": written, "after": lambda: shutil.rmtree(target)}

    return run
