"""Every exception that nemo_image raises on purpose.

.. code-block:: text

    NemoImageError
    ├── ArgumentError (ValueError)        a call's argument is unusable
    ├── DatasetError                      what lies on disk is not a dataset, or not the one asked for
    │   └── MissingColumnError            a column that the call needs is not in the metadata
    ├── ShardError                        one shard cannot be used; the others can
    │   ├── TarError                      its tar is missing, truncated or not a tar
    │   ├── MetadataFileError             its Parquet file is missing or unreadable
    │   └── IdMismatchError               its ids do not name its samples
    ├── ImageError                        one picture cannot be decoded (becomes a value of ``image_error``)
    ├── ModelError                        a model cannot be built
    │   ├── UnknownModelError             no such model
    │   └── WeightsError                  its weights are missing, damaged or somebody else's
    ├── EmbeddingError                    an embedding column has the wrong size or origin
    ├── RunError                          a run ended with failed shards (``failures`` lists them)
    │   └── TooManyFailuresError          … so many that it was stopped early
    ├── PipelineError (ArgumentError)     the stages of a pipeline do not fit together
    ├── OutputBusyError                   another run is writing to the same output
    ├── ClusterError                      a cluster cannot be started or joined
    └── MissingDependencyError (ImportError)   an optional package is absent (names the pip line)
"""

from __future__ import annotations

from collections.abc import Mapping


class NemoImageError(Exception):
    """Base of every exception that nemo_image raises on purpose."""


class ArgumentError(NemoImageError, ValueError):
    """An argument of a call is unusable."""


class PipelineError(ArgumentError):
    """The stages of a pipeline do not fit together."""


class DatasetError(NemoImageError):
    """What lies on disk is not a dataset, or not the dataset asked for."""


class MissingColumnError(DatasetError):
    """A column that the call needs is not in the metadata."""


class ShardError(NemoImageError):
    """One shard cannot be used; the other shards can."""


class TarError(ShardError):
    """A shard's tar is missing, truncated or not a tar."""


class MetadataFileError(ShardError):
    """A shard's Parquet file is missing or unreadable."""


class IdMismatchError(ShardError):
    """A shard's ids do not name the samples of its tar."""


class ImageError(NemoImageError):
    """One picture cannot be decoded.

    Operators turn it into a value of the ``image_error`` column; it never stops a shard.

    Attributes
    ----------
    reason : str
        ``"<category>: <detail>"``, for example ``"truncated: image file is truncated (12 bytes not processed)"``.
        The category is one lower-case word, so that reasons can be counted.
    """

    def __init__(self, category: str, detail: str) -> None:
        self.category = category
        self.reason = f"{category}: {detail}"
        super().__init__(self.reason)

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return type(self), (self.category, self.reason.removeprefix(f"{self.category}: "))


class ModelError(NemoImageError):
    """A model cannot be built."""


class UnknownModelError(ModelError):
    """No model of that name is known."""


class WeightsError(ModelError):
    """A model's weights are missing, damaged, or another model's."""


class EmbeddingError(NemoImageError):
    """An embedding column has the wrong size or was made by another model."""


class RunError(NemoImageError):
    """A run ended with failed shards; the other shards are finished.

    Attributes
    ----------
    failures : dict of str to str
        Cause by shard.
    """

    def __init__(self, message: str, failures: Mapping[str, str]) -> None:
        super().__init__(message)
        self.failures = dict(failures)

    def __reduce__(self) -> tuple[type[RunError], tuple[str, dict[str, str]]]:
        return type(self), (str(self), self.failures)


class TooManyFailuresError(RunError):
    """So many shards failed that the run was stopped early."""


class OutputBusyError(NemoImageError):
    """Another run, still alive, is writing to the same output."""


class ClusterError(NemoImageError):
    """A cluster cannot be started or joined."""


class MissingDependencyError(NemoImageError, ImportError):
    """An optional package is absent; the message names the pip line that brings it."""


def one_line(error: BaseException) -> str:
    """Return an error's message as one line.

    A file's error begins with the file; the type goes before other messages that are not ours.
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return " ".join(f"{error.filename}: {error.strerror}".split())
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, NemoImageError) else f"{type(error).__name__}: {text}"
