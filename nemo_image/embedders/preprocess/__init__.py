"""From the bytes of pictures to a model's input, as the model's own evaluation transform makes it.

`make_preprocessor` reads the transform and returns one of three paths, which keep the same promise: on real photographs
each embedding agrees with that of the transform itself by cosine 0.999 or better.

=========================== ============================================ ==================================
path                        decodes and resizes with                     beside the transform, of 255
=========================== ============================================ ==================================
`PillowPreprocessor`        Pillow                                       equal
`TorchvisionPreprocessor`   libjpeg and torch's uint8 resize, CPU        at most 1
DaliPreprocessor            DALI, CPU or GPU (JPEG; else torchvision's)  at most 9
=========================== ============================================ ==================================
"""

from nemo_image.embedders.preprocess.batch import PreprocessedBatch, Preprocessor, normalize
from nemo_image.embedders.preprocess.choose import PreprocessDecoder, make_preprocessor
from nemo_image.embedders.preprocess.convert import spec_from_transform
from nemo_image.embedders.preprocess.from_pixels import preprocess_pixels
from nemo_image.embedders.preprocess.isolated import GuardedPreprocessor, IsolatedPreprocessor
from nemo_image.embedders.preprocess.pillow_path import PillowPreprocessor
from nemo_image.embedders.preprocess.spec import PreprocessSpec, ResizePlan
from nemo_image.embedders.preprocess.torchvision_path import TorchvisionPreprocessor
from nemo_image.engine.decoding.server import start_ahead

__all__ = [
    "GuardedPreprocessor",
    "IsolatedPreprocessor",
    "PillowPreprocessor",
    "PreprocessDecoder",
    "PreprocessSpec",
    "PreprocessedBatch",
    "Preprocessor",
    "ResizePlan",
    "TorchvisionPreprocessor",
    "make_preprocessor",
    "normalize",
    "preprocess_pixels",
    "spec_from_transform",
    "start_ahead",
]
