"""Deduplication: exact (the same bytes), perceptual (the same look), semantic (nearly the same embedding)."""

from nemo_image import errors as _errors

try:
    from nemo_image.dedup.cluster_level import SemanticClusterLevelDedup
    from nemo_image.dedup.clustering_model import ClusteringModel
    from nemo_image.dedup.decontaminate import Decontaminate
    from nemo_image.dedup.evaluation.collect import EvaluationSet
    from nemo_image.dedup.exact import ExactDedup
    from nemo_image.dedup.kept import kept_fraction
    from nemo_image.dedup.perceptual import PerceptualDedup
    from nemo_image.dedup.result import DedupResult, Missed, SweepPoint
    from nemo_image.dedup.semantic import SemanticDedup
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise _errors.MissingDependencyError(
        "deduplication needs torch: pip install 'nemo-image[image_cpu]', or [image_cuda12] on a GPU machine"
    ) from error

__all__ = [
    "ClusteringModel",
    "Decontaminate",
    "DedupResult",
    "EvaluationSet",
    "ExactDedup",
    "Missed",
    "PerceptualDedup",
    "SemanticClusterLevelDedup",
    "SemanticDedup",
    "SweepPoint",
    "kept_fraction",
]
