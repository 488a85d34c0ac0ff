"""The only place that knows the CPU backend from the GPU one: pandas from cuDF, torch's devices, cuML.

Embeddings pass between frames and matrices through :func:`to_matrix` and :func:`to_column` alone.
"""

from nemo_image.backend.columns import (
    FloatMatrix,
    Positions,
    arrow_type_of,
    arrow_values,
    frame_to_table,
    is_embedding_dtype,
    series_of,
    to_column,
    to_matrix,
)
from nemo_image.backend.device import BACKEND_KEY, chosen_backend, has_cudf, sees_gpu
from nemo_image.backend.frames import in_kind_of, in_pandas, is_cudf, like, to_cudf, to_pandas
from nemo_image.backend.kmeans import fit_cuml_kmeans, spread_rows

__all__ = [
    "BACKEND_KEY",
    "FloatMatrix",
    "Positions",
    "arrow_type_of",
    "arrow_values",
    "chosen_backend",
    "fit_cuml_kmeans",
    "frame_to_table",
    "has_cudf",
    "in_kind_of",
    "in_pandas",
    "is_cudf",
    "is_embedding_dtype",
    "like",
    "sees_gpu",
    "series_of",
    "spread_rows",
    "to_column",
    "to_cudf",
    "to_matrix",
    "to_pandas",
]
