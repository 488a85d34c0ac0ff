"""Embedders: add a vector for each image to a dataset."""

from nemo_image import errors as _errors

try:
    from nemo_image.embedders.base import ImageEmbedder
    from nemo_image.embedders.open_clip import OpenClipImageEmbedder
    from nemo_image.embedders.timm import TimmImageEmbedder
except ModuleNotFoundError as error:
    if error.name not in ("torch", "torchvision"):
        raise
    raise _errors.MissingDependencyError(
        f"embedders need {error.name}: pip install 'nemo-image[image_cpu]', or [image_cuda12] on a GPU machine"
    ) from error

__all__ = ["ImageEmbedder", "OpenClipImageEmbedder", "TimmImageEmbedder"]
