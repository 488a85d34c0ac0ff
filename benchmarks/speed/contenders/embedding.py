"""From tars to Parquet with embeddings: ours, and the model alone, fed from memory."""

from __future__ import annotations

import glob
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def ours(tars: str, model: str, weights: str | None = None, scratch: str | None = None, **settings: Any) -> Any:
    """``save_metadata`` in threads of this process, as a user without a client runs it; the set-up builds the model."""
    from nemo_image.datasets import ImageTextPairDataset
    from nemo_image.embedders import TimmImageEmbedder

    dataset = ImageTextPairDataset.from_webdataset(tars)
    embedder = TimmImageEmbedder(model, weights=weights, **{"autocast": False, **settings})
    embedded = embedder(dataset)
    chosen = embedded.provenance["image_embedding"]["dtype"]

    def run() -> dict[str, Any]:
        target = tempfile.mkdtemp(dir=scratch)
        try:
            saved = embedded.save_metadata(target)
            return {"count": len(saved), "computed in": chosen}
        finally:
            shutil.rmtree(target)

    return run


def model_from_memory(
    tars: str,
    model: str,
    cores: int,
    weights: str | None = None,
    one_batch_at_once: bool = False,
    as_built: bool = False,
    batch: int = 32,
) -> Any:
    """The model on pictures that are ready in memory: a batch a core, or all cores on one batch.

    Channels last, as our embedder runs it; or `as_built`, as timm returns it. glibc keeps what is freed, as it does
    where our embedder runs.
    """
    import torch

    from nemo_image.embedders.preprocess import make_preprocessor, normalize
    from nemo_image.embedders.timm_models import create_model, describe
    from nemo_image.engine.allocator import keep_freed_memory
    from nemo_image.shards.read import ShardReader

    keep_freed_memory()
    network = create_model(model, False, weights)
    if not as_built:
        network = network.to(memory_format=torch.channels_last)
    prepare = make_preprocessor(describe(model)[1], num_threads=cores)
    batches = []
    for tar in sorted(glob.glob(f"{tars}/*.tar")):
        with ShardReader(tar) as reader:
            images = [sample.image for sample in reader.index.samples]
            for start in range(0, len(images), batch):
                ready = prepare(list(reader.read_many(images[start : start + batch])))
                pixels = normalize(ready.pixels, prepare.spec)
                batches.append(pixels.contiguous() if as_built else pixels)
    workers = 1 if one_batch_at_once else cores
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(cores // workers,))

    def one(pixels: Any) -> int:
        with torch.inference_mode():
            return len(network(pixels).numpy())

    def run() -> dict[str, Any]:
        return {"count": sum(pool.map(one, batches))}

    return run
