"""Workflows: what needs several passes over a whole dataset, and so is no stage."""

from nemo_image.pipeline.workflows.base import DeduplicationResult
from nemo_image.pipeline.workflows.hashes import ExactDeduplicationWorkflow, PerceptualDeduplicationWorkflow
from nemo_image.pipeline.workflows.keep import KeepResult, KeepWorkflow
from nemo_image.pipeline.workflows.ranking import RankingStrategy
from nemo_image.pipeline.workflows.semantic import SemanticDeduplicationWorkflow

__all__ = [
    "DeduplicationResult",
    "ExactDeduplicationWorkflow",
    "KeepResult",
    "KeepWorkflow",
    "PerceptualDeduplicationWorkflow",
    "RankingStrategy",
    "SemanticDeduplicationWorkflow",
]
