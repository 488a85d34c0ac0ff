"""From tars to a model's input: ours, webdataset with the model's own transforms, decoding alone."""

from __future__ import annotations

import glob
from concurrent.futures import ThreadPoolExecutor
from typing import Any

MODEL = "vit_base_patch32_clip_224.openai"


def ours(tars: str, cores: int, decoder: str = "torchvision", batch: int = 32) -> Any:
    """Every tar in turn, as an embedder's task reads it, with a thread a core."""
    import torch

    from nemo_image.embedders.pictures import prepared_batches
    from nemo_image.embedders.preprocess import make_preprocessor
    from nemo_image.embedders.preprocess.resize import resizer
    from nemo_image.embedders.timm_models import describe
    from nemo_image.shards.read import ShardReader

    torch.set_num_threads(1)
    _, transform = describe(MODEL)
    resized_by = {"resized by": resizer()} if decoder == "torchvision" else {}
    prepare = make_preprocessor(transform, decoder, num_threads=cores)

    def run() -> dict[str, Any]:
        count = 0
        for tar in sorted(glob.glob(f"{tars}/*.tar")):
            with ShardReader(tar) as reader:
                images = [sample.image for sample in reader.index.samples]
                count += sum(len(made.rows) for _, made, *_ in prepared_batches(reader, images, prepare, batch))
        return {"count": count, **resized_by}

    return run


def webdataset(tars: str, cores: int, batch: int = 32) -> Any:
    """webdataset's reader and timm's evaluation transform, in a DataLoader with a worker a core."""
    import timm
    import torch
    import webdataset as wds

    config = timm.data.resolve_data_config({}, model=timm.create_model(MODEL))
    transform = timm.data.create_transform(**config, is_training=False)

    def run() -> dict[str, Any]:
        urls = sorted(glob.glob(f"{tars}/*.tar"))
        dataset = wds.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg").map_tuple(transform)
        loader = torch.utils.data.DataLoader(dataset, batch_size=batch, num_workers=cores)
        return {"count": sum(len(pixels) for (pixels,) in loader)}

    return run


def decoding_alone(tars: str, cores: int) -> Any:
    """libjpeg by way of torchvision, on bytes in memory, in as many threads: no resizing, no reading."""
    import tarfile

    import torch
    import torchvision.io  # noqa: F401  (registers the operator)

    torch.set_num_threads(1)
    blobs = []
    for path in sorted(glob.glob(f"{tars}/*.tar")):
        with tarfile.open(path) as tar:
            members = [member for member in tar if member.name.endswith(".jpg")]
            blobs += [torch.frombuffer(bytearray(tar.extractfile(one).read()), dtype=torch.uint8) for one in members]
    pool = ThreadPoolExecutor(cores)

    def run() -> dict[str, Any]:
        made = pool.map(lambda blob: torch.ops.image.decode_jpeg(blob, 3).shape[0], blobs)
        return {"count": sum(channels == 3 for channels in made)}

    return run


def steps(tars: str, cores: int, resized: bool) -> Any:
    """Our own decoding, with the header's checks, on bytes in memory; and the resize after it."""
    from nemo_image.embedders.preprocess import spec_from_transform
    from nemo_image.embedders.preprocess.batch import empty_pixels
    from nemo_image.embedders.preprocess.resize import resize_into
    from nemo_image.embedders.timm_models import describe
    from nemo_image.engine.threads import set_own_torch_threads
    from nemo_image.shards.decode import decode_rgb
    from nemo_image.shards.read import ShardReader

    spec = spec_from_transform(describe(MODEL)[1])
    assert spec is not None
    blobs = []
    for path in sorted(glob.glob(f"{tars}/*.tar")):
        with ShardReader(path) as reader:
            blobs += list(reader.read_many([sample.image for sample in reader.index.samples]))
    pool = ThreadPoolExecutor(cores, initializer=set_own_torch_threads, initargs=(1,))
    out = empty_pixels(len(blobs), spec)

    def one(row: int) -> bool:
        header, picture = decode_rgb(blobs[row])
        if resized:
            resize_into(picture, spec.plan(*header.upright_size), spec, out[row])
        return True

    def run() -> dict[str, Any]:
        return {"count": sum(pool.map(one, range(len(blobs))))}

    return run
