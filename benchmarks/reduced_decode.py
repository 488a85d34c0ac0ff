"""What `reduced_decode` saves and what it does to embeddings, by how much larger a picture is than the model's input.

    python -m benchmarks.reduced_decode

EfficientNet-Lite0 on photographs as they are, and enlarged (there are no larger ones here): processor time to decode
and resize, medians of three turns, and the cosine to the embedding of the same picture decoded whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from PIL import Image

from benchmarks.speed.material import PROJECT, Material
from nemo_image.embedders.preprocess import Preprocessor, PreprocessSpec, TorchvisionPreprocessor, normalize
from nemo_image.embedders.preprocess.convert import spec_from_transform
from nemo_image.embedders.timm_models import create_model, describe

MODEL = "tf_efficientnet_lite0"
CASES = [(1, 224), (1, 128), (1, 96), (2, 224), (4, 224)]
"""How many times the photographs are enlarged, and the pixels of the shorter side that they are resized to."""


def enlarged(blob: bytes, times: int) -> bytes:
    """Return a photograph as a JPEG of so many times its width and height."""
    if times == 1:
        return blob
    picture, out = Image.open(io.BytesIO(blob)).convert("RGB"), io.BytesIO()
    size = (picture.width * times, picture.height * times)
    picture.resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=90, subsampling="4:2:0")
    return out.getvalue()


def milliseconds(prepare: Preprocessor, blobs: Sequence[bytes]) -> float:
    """Return the processor time of a picture."""
    taken = []
    for _ in range(3):
        began = time.process_time()
        prepare(blobs)
        taken.append(time.process_time() - began)
    return median(taken) / len(blobs) * 1e3


def embeddings(model: torch.nn.Module, pixels: torch.Tensor, spec: PreprocessSpec) -> torch.Tensor:
    """Return unit vectors."""
    with torch.inference_mode():
        parts = [model(normalize(part, spec)).double() for part in pixels.split(16)]
    return torch.nn.functional.normalize(torch.cat(parts))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--folder", type=Path, default=PROJECT / ".bench")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    material = Material.at(args.folder.absolute(), args.photos)
    model = create_model(MODEL, False, str(material.lite0()))
    usual = spec_from_transform(describe(MODEL)[1])
    assert usual is not None
    files = material.files()
    print("| enlarged | resized to | reduced | ms whole | ms reduced | least cosine | median | below 0.999 |")
    print("|---|---|---|---|---|---|---|---|")
    for times, size in CASES:
        blobs = [enlarged(path.read_bytes(), times) for path in (files if times == 1 else files[:48])]
        spec = dataclasses.replace(usual, resize_size=(size, size), crop=(size, size))
        whole, reduced = (TorchvisionPreprocessor(spec, 1, reduced_decode=one) for one in (False, True))
        pixels, fewer = whole(blobs).pixels, reduced(blobs).pixels
        changed = (pixels != fewer).flatten(1).any(1)
        cosines = (embeddings(model, pixels, spec) * embeddings(model, fewer, spec)).sum(1)[changed]
        told = (
            f"{cosines.min():.5f} | {cosines.median():.5f} | {int((cosines < 0.999).sum())}" if len(cosines) else "| |"
        )
        print(
            f"| {times} × | {size} | {int(changed.sum())} of {len(blobs)} | {milliseconds(whole, blobs):.2f} "
            f"| {milliseconds(reduced, blobs):.2f} | {told} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
