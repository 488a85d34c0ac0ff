"""From tars to Parquet through the pipeline of stages, on a GPU."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any


def ours(tars: str, model: str, scratch: str, gpus: float, workers: int = 1) -> Any:
    """Partition, read, embed and write metadata; weights are seeded random ones, which take as long as others."""
    from safetensors.torch import save_file

    from nemo_image import get_client
    from nemo_image.embedders.timm_models import create_model
    from nemo_image.pipeline import Pipeline
    from nemo_image.stages import FilePartitioningStage, ImageEmbeddingStage, ImageReaderStage, ImageWriterStage
    from nemo_image.stages.models import timm_name

    models = Path(scratch) / "random-weights"
    models.mkdir(exist_ok=True)
    file = models / f"{timm_name(model)}.safetensors"
    if not file.exists():
        save_file(create_model(timm_name(model), False, None).state_dict(), file)
    get_client("gpu" if gpus else "cpu", n_workers=workers)

    def run() -> dict[str, Any]:
        target = tempfile.mkdtemp(dir=scratch)
        watch = (
            subprocess.Popen(
                ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"],
                stdout=subprocess.PIPE,
                text=True,
            )
            if gpus
            else None
        )
        try:
            pipeline = Pipeline("benchmark", stages=[FilePartitioningStage(tars)])
            pipeline.add_stage(ImageReaderStage(batch_size=256, num_gpus_per_worker=gpus, verbose=False))
            pipeline.add_stage(
                ImageEmbeddingStage(
                    model_dir=str(models), model_name=model, num_gpus_per_worker=gpus, model_inference_batch_size=256
                )
            )
            pipeline.add_stage(ImageWriterStage(output_dir=target, write_images=False))
            pipeline.run()
        finally:
            busy = _ended(watch)
        return {"count": _rows(target), "GPU busy, percent": busy, "after": lambda: shutil.rmtree(target)}

    return run


def _ended(watch: subprocess.Popen[str] | None) -> float | None:
    """Stop watching the GPU; return the mean share of time in which it was busy, in percent."""
    if watch is None:
        return None
    watch.terminate()
    lines = (watch.communicate()[0] or "").split()
    return mean(float(line) for line in lines) if lines else None


def _rows(folder: str) -> int:
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(path).num_rows for path in Path(folder).rglob("*.parquet"))
