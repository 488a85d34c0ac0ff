"""Pipelines of stages, run on Dask: `Pipeline`, `DaskExecutor`, and configurations in YAML."""

from nemo_image.pipeline.executor import DaskExecutor
from nemo_image.pipeline.pipeline import Pipeline
from nemo_image.pipeline.results import PipelineResults

__all__ = ["DaskExecutor", "Pipeline", "PipelineResults"]
