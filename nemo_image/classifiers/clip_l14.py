"""What the published heads for CLIP ViT-L/14 have in common: their weights' way here, and the embeddings they take."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nemo_image.classifiers.base import ImageClassifier, Model
from nemo_image.engine.model_cache import get_model
from nemo_image.engine.weights import WeightsSource, load_state_dict, sha256_file
from nemo_image.errors import WeightsError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("nemo_image")

EMBEDDING_SIZE = 768
NORM_TOLERANCE = 0.01
"""How far from 1 the norm of a normalised embedding may be; keeping it in float16 moves it by less than 0.001."""

TIMM_NAMES = frozenset({"vit_large_patch14_clip_quickgelu_224.openai", "vit_large_patch14_clip_224.openai"})
OPEN_CLIP_NAMES = frozenset({"ViT-L-14", "ViT-L-14-quickgelu"})


class ClipL14Classifier(ImageClassifier):
    """A published head over L2-normalised CLIP ViT-L/14 embeddings.

    Subclasses say where the weights are (`source`) and build the network (`build`).
    """

    source: ClassVar[WeightsSource]
    _settings = (*ImageClassifier._settings, "model_path", "_path")

    def __init__(
        self,
        model_name: str,
        embedding_column: str,
        pred_column: str,
        batch_size: int,
        model_path: str | os.PathLike[str] | None,
    ) -> None:
        super().__init__(model_name, embedding_column, pred_column, "float32", batch_size, EMBEDDING_SIZE)
        self.model_path = None if model_path is None else os.fspath(model_path)
        self._path: str | None = None
        self._sha256: str | None = None

    @staticmethod
    def build(state: Mapping[str, torch.Tensor], where: str) -> torch.nn.Module:
        """Return the network with the weights `state`, read from the file `where`."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Find the weights, downloading them if need be, and check that they fit.

        Raises
        ------
        ArgumentError
            If an argument is unusable.
        WeightsError
            If the weights cannot be had or are not those of this network.
        """
        super().prepare()
        self._path = str(self._find())
        self._sha256 = sha256_file(self._path)
        get_model(self._spec("cpu"), lambda: self.load_model("cpu"))

    @property
    def weights_sha256(self) -> str | None:
        """SHA-256 of the weights' file; None before :meth:`prepare`."""
        return self._sha256

    @property
    def wanted_embedding(self) -> str:
        """Which embeddings the heads take."""
        return (
            f"L2-normalised CLIP ViT-L/14 embeddings of {EMBEDDING_SIZE} numbers, as made by "
            "TimmImageEmbedder('vit_large_patch14_clip_quickgelu_224.openai', pretrained=True)"
        )

    def load_model(self, device: str) -> Model:
        """Return the network on `device`.

        Raises
        ------
        WeightsError
            If the weights cannot be had on this machine, or are not those that the client saw.
        """
        if self._sha256 is None:
            self.prepare()
        # The client's file, where this machine has it under the same path; else the machine's own.
        path = self._path if self._path and os.path.isfile(self._path) else str(self._find())
        found = sha256_file(path)
        if found != self._sha256:
            raise WeightsError(
                f"{path} on this machine has SHA-256 {found}, the client's weights have {self._sha256}: "
                "all workers need the same file"
            )
        network = self.build(load_state_dict(path), path).to(device)
        forward: Model = network
        return forward

    def accepts_embedding(self, fingerprint: Mapping[str, Any]) -> bool:
        """Tell whether the embeddings are normalised ones of OpenAI's CLIP ViT-L/14; unnamed models may be."""
        # A custom embedder says False also where its model normalises; the norms are looked at in any case.
        if fingerprint.get("normalized") is False and "." not in fingerprint.get("operator", ""):
            return False
        model = fingerprint.get("model")
        if model in OPEN_CLIP_NAMES:
            return fingerprint.get("pretrained") == "openai"
        return not model or model in TIMM_NAMES

    def unusable(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Tell which embeddings cannot be scored: those that are zero, or not finite.

        Raises
        ------
        EmbeddingError
            If others are not L2-normalised.
        """
        norms: torch.Tensor = embeddings.norm(dim=1)
        without: torch.Tensor = ~norms.isfinite() | (norms == 0)
        wrong = norms[~without & ((norms - 1).abs() > NORM_TOLERANCE)]
        if len(wrong):
            raise self._unfit(
                f"holds {len(wrong)} of {len(norms)} embeddings with an L2 norm from {wrong.min():.4g} to "
                f"{wrong.max():.4g}, not 1"
            )
        return without

    def check_origin(self, made_by: Mapping[str, Any]) -> None:
        """Check that the head takes embeddings with the fingerprint `made_by`; warn where they mean nothing.

        Raises
        ------
        EmbeddingError
            If they are of another size or origin.
        """
        super().check_origin(made_by)
        if str(made_by.get("weights_sha256", "")).startswith("random"):
            logger.warning(
                "%s scores embeddings of a random network (column %r): the scores mean nothing",
                type(self).__name__,
                self.embedding_column,
            )

    def _find(self) -> Path:
        if self.model_path is None:
            return self.source.fetch()
        path = Path(self.model_path).expanduser().absolute()
        if not path.is_file():
            raise WeightsError(f"model_path={self.model_path!r}: there is no such file on this machine ({path})")
        return path
