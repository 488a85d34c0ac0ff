"""Preprocessing with DALI: JPEG decode, resize and crop as one graph, on the GPU or with DALI's CPU operators.

The graph gets each picture's sizes and offsets as integers from the same plan as the other paths: with DALI's own
``resize_shorter`` and centre crop, embeddings fall to cosine 0.97. It decodes plain JPEGs, which are what a GPU makes
faster. Whatever else there is (DALI decodes PNG, WebP, BMP and TIFF on the CPU as well), and whatever DALI refuses,
goes through Pillow's decoder and torchvision's resize. What DALI decodes is a picture, even where Pillow would call its
damaged scan an error (18 of 2,000 damaged files).
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch

from nemo_image.embedders.preprocess.batch import PreprocessedBatch, plan_picture
from nemo_image.embedders.preprocess.resize import INTERPOLATIONS
from nemo_image.embedders.preprocess.spec import PreprocessSpec, ResizePlan
from nemo_image.embedders.preprocess.torchvision_path import TorchvisionPreprocessor
from nemo_image.engine.decoding.pool import call_in_thread
from nemo_image.errors import ArgumentError, ImageError, MissingDependencyError
from nemo_image.shards.decode import MAX_PIXELS, ImageHeader, read_header, upright

_log = logging.getLogger(__name__)

_Job = tuple[bytes, ImageHeader, ResizePlan]


class DaliPreprocessor:
    """Preprocess pictures with DALI.

    Parameters
    ----------
    spec : PreprocessSpec
        Its interpolation must be bilinear or bicubic.
    device : str
        Where DALI works and where `PreprocessedBatch.pixels` lie: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
    num_threads : int
        DALI's CPU threads, and those of the pictures that DALI does not decode.
    max_pixels : int
        Largest picture, before and after it is resized.

    Raises
    ------
    ArgumentError
        If it is no such device, or DALI has no antialiased resize with the spec's interpolation.
    MissingDependencyError
        If DALI is not installed.
    """

    def __init__(
        self,
        spec: PreprocessSpec,
        device: str = "cpu",
        num_threads: int = 4,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if re.fullmatch(r"cpu|cuda(:\d+)?", device) is None:
            raise ArgumentError(f"device={device!r}: DALI works on 'cpu', 'cuda' or 'cuda:N'")
        if spec.interpolation not in INTERPOLATIONS:
            raise ArgumentError(f"decoder='dali' has no {spec.interpolation!r} filter: use decoder='pillow'")
        _require_dali()
        self.spec: PreprocessSpec = spec
        self.max_pixels = max_pixels
        self._others = TorchvisionPreprocessor(spec, num_threads, max_pixels)
        self._device = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        self._graph = _Graph(spec, self._device, num_threads)

    def __reduce__(self) -> tuple[type[DaliPreprocessor], tuple[PreprocessSpec, str, int, int]]:
        # A built graph cannot be pickled; the other process builds its own.
        return type(self), (self.spec, str(self._device), self._others.num_threads, self.max_pixels)

    def __call__(self, blobs: Sequence[bytes | None]) -> PreprocessedBatch:
        """Decode, resize and crop pictures; None stands for a sample without a picture."""
        jobs = {row: job for row, blob in enumerate(blobs) if blob is not None and (job := self._job(blob)) is not None}
        decoded = call_in_thread(lambda: self._graph.run(list(jobs.values()))) if jobs else None
        if decoded is None:
            jobs.clear()
        for index, (_, header, _) in enumerate(jobs.values()):
            if decoded is not None and header.orientation != 1:
                decoded[index].copy_(upright(decoded[index], header.orientation))
        rest = [row for row in range(len(blobs)) if row not in jobs]
        headers = {row: header for row, (_, header, _) in jobs.items()}
        return self._merge(headers, decoded, rest, self._others([blobs[row] for row in rest]))

    def _job(self, blob: bytes) -> _Job | None:
        """Return what DALI needs to know of a picture; None for one that it is not given."""
        try:
            header = read_header(blob, self.max_pixels)
            plan = plan_picture(self.spec, header, self.max_pixels)
        except ImageError:
            return None  # named by the other path
        if not header.plain_jpeg or (header.orientation >= 5 and plan.crop_w != plan.crop_h):
            return None  # an oblong window of a lying picture would have another shape than the batch
        return blob, header, plan.before_orientation(header.orientation)

    def _merge(
        self, headers: dict[int, ImageHeader], decoded: torch.Tensor | None, rest: list[int], others: PreprocessedBatch
    ) -> PreprocessedBatch:
        """Put DALI's pictures and the others, whose rows count within `rest`, in the order of the blobs."""
        count = len(headers) + len(rest)
        errors: list[str | None] = [None] * count
        widths: list[int | None] = [None] * count
        heights: list[int | None] = [None] * count
        for row, header in headers.items():
            widths[row], heights[row] = header.width, header.height
        for index, row in enumerate(rest):
            errors[row], widths[row], heights[row] = others.errors[index], others.widths[index], others.heights[index]

        rows = [*headers, *(rest[row] for row in others.rows)]
        order = sorted(range(len(rows)), key=rows.__getitem__)
        pixels = others.pixels.to(self._device)
        if decoded is not None:
            pixels = torch.cat([decoded, pixels])[order] if others.rows else decoded
        return PreprocessedBatch(pixels, sorted(rows), errors, widths, heights)


class _Graph:
    """A DALI pipeline that is built when it is first needed, and again after a picture has broken it."""

    def __init__(self, spec: PreprocessSpec, device: torch.device, num_threads: int) -> None:
        self._spec = spec
        self._device = device
        self._num_threads = num_threads
        self._pipeline: Any = None
        self._capacity = 0
        self._lock = threading.Lock()

    def run(self, jobs: Sequence[_Job]) -> torch.Tensor | None:
        """Return [n, 3, crop_h, crop_w] uint8, not yet upright; None if DALI refuses one of the pictures."""
        with self._lock:
            self._reserve(len(jobs))
            try:
                self._pipeline.feed_input("jpeg", [np.frombuffer(blob, np.uint8) for blob, _, _ in jobs])
                self._pipeline.feed_input("width", [np.array(p.resize_w, np.float32) for _, _, p in jobs])
                self._pipeline.feed_input("height", [np.array(p.resize_h, np.float32) for _, _, p in jobs])
                self._pipeline.feed_input("start", [np.array((p.crop_top, p.crop_left), np.int32) for _, _, p in jobs])
                (output,) = self._pipeline.run()
                return self._to_torch(output, len(jobs))
            except RuntimeError as error:
                self._pipeline = None  # DALI does not go on after an error
                _log.warning("DALI refused a batch of %d pictures, which are decoded one by one: %s", len(jobs), error)
                return None

    def _reserve(self, count: int) -> None:
        if self._pipeline is None or count > self._capacity:
            self._capacity = max(count, self._capacity)
            self._pipeline = self._build(self._capacity)

    def _build(self, batch_size: int) -> Any:
        dali, fn = _require_dali(), import_module("nvidia.dali.fn")
        gpu = self._device.type == "cuda"
        pipeline = dali.Pipeline(
            batch_size=batch_size,
            num_threads=self._num_threads,
            device_id=self._device.index if gpu else None,
            prefetch_queue_depth=1,  # each batch is asked for when it is needed
            exec_async=False,
            exec_pipelined=False,
        )
        filters = {"bilinear": dali.types.INTERP_LINEAR, "bicubic": dali.types.INTERP_CUBIC}
        with pipeline:
            jpeg, width, height, start = (
                fn.external_source(name=name, batch=True) for name in ("jpeg", "width", "height", "start")
            )
            picture = fn.decoders.image(
                jpeg,
                device="mixed" if gpu else "cpu",
                output_type=dali.types.RGB,
                jpeg_fancy_upsampling=True,  # as libjpeg: plain upsampling of 4:2:0 breaks the 0.999 promise
                use_fast_idct=False,
                adjust_orientation=False,  # the plan knows it, from more places than EXIF
            )
            # One axis at a time, in Pillow's order: its bytes between the passes clip a bicubic filter's overshoot.
            # Both axes at once differ by up to 20 of 255 beside hard edges, and single cosines fall to 0.9988.
            how = {"mode": "stretch", "interp_type": filters[self._spec.interpolation], "antialias": True}
            picture = fn.resize(picture, resize_x=width, **how)
            picture = fn.resize(picture, resize_y=height, **how)
            window = fn.slice(
                picture,
                start,
                list(self._spec.crop),
                axis_names="HW",
                out_of_bounds_policy="pad",
                fill_values=list(self._spec.fill),
            )
            pipeline.set_outputs(window)
        pipeline.build()
        return pipeline

    def _to_torch(self, output: Any, count: int) -> torch.Tensor:
        height, width = self._spec.crop
        pixels = torch.empty((count, height, width, 3), dtype=torch.uint8, device=self._device)
        import_module("nvidia.dali.plugin.pytorch").feed_ndarray(output.as_tensor(), pixels)
        return pixels.permute(0, 3, 1, 2)


def _require_dali() -> Any:
    try:
        return import_module("nvidia.dali")
    except ImportError as error:
        raise MissingDependencyError(
            "decoder='dali' needs NVIDIA DALI: pip install nemo-image[image_cuda12], or pip install nvidia-dali-cuda120"
        ) from error
