"""Deduplication: exact (the same bytes), perceptual (the same look), semantic (nearly the same embedding)."""

from nemo_image.dedup.cluster_level import SemanticClusterLevelDedup
from nemo_image.dedup.clustering_model import ClusteringModel
from nemo_image.dedup.exact import ExactDedup
from nemo_image.dedup.kept import kept_fraction
from nemo_image.dedup.perceptual import PerceptualDedup
from nemo_image.dedup.result import DedupResult, Missed, SweepPoint
from nemo_image.dedup.semantic import SemanticDedup

__all__ = [
    "ClusteringModel",
    "DedupResult",
    "ExactDedup",
    "Missed",
    "PerceptualDedup",
    "SemanticClusterLevelDedup",
    "SemanticDedup",
    "SweepPoint",
    "kept_fraction",
]
