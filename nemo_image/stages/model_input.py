"""What a stage's model takes, so that the reader can make it ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from nemo_image.embedders.preprocess import Preprocessor


class ModelInput(Protocol):
    """How a model's input is made of a stored picture.

    The reader makes it while it decodes, in its threads, and keeps it in ``ImageObject.prepared[key]``: a uint8 tensor
    (3, height, width) before normalising, or, where the preprocessor says that its pixels are normalised, a tensor as
    the model takes it. A stage that finds nothing there makes its input itself.
    """

    @property
    def key(self) -> str:
        """Equal for equal inputs."""

    def preprocessor(self, num_threads: int) -> Preprocessor:
        """Return what makes it of the bytes of pictures, in so many threads."""
        ...
