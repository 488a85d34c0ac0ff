"""Pipelines of stages, run on Dask: `Pipeline`, `DaskExecutor`; configurations in YAML; workflows for duplicates."""

from nemo_image import errors as _errors

try:
    from nemo_image.pipeline.configuration.build import build_pipeline
    from nemo_image.pipeline.configuration.config import load_config
    from nemo_image.pipeline.executor import DaskExecutor
    from nemo_image.pipeline.pipeline import Pipeline
    from nemo_image.pipeline.results import PipelineResults
    from nemo_image.pipeline.workflows import (
        ExactDeduplicationWorkflow,
        KeepWorkflow,
        PerceptualDeduplicationWorkflow,
        SemanticDeduplicationWorkflow,
    )
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise _errors.MissingDependencyError(
        "pipelines need torch: pip install 'nemo-image[image_cpu]', or [image_cuda12] on a GPU machine"
    ) from error

__all__ = [
    "DaskExecutor",
    "ExactDeduplicationWorkflow",
    "KeepWorkflow",
    "PerceptualDeduplicationWorkflow",
    "Pipeline",
    "PipelineResults",
    "SemanticDeduplicationWorkflow",
    "build_pipeline",
    "load_config",
]
