"""One image of a dataset, with everything that belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_image.errors import ArgumentError, ImageError
from nemo_image.shards.decode import decode_rgb, read_header
from nemo_image.shards.index import Member, Sample
from nemo_image.shards.read import ShardReader

Pixels = npt.NDArray[np.uint8]
Vector = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class SampleSource:
    """Where a sample lies.

    Attributes
    ----------
    tar_url : str
    sample : Sample
        Its members and their offsets.
    storage_options : dict
        For fsspec.
    """

    tar_url: str
    sample: Sample
    storage_options: Mapping[str, Any] = field(default_factory=dict)

    def read(self, member: Member) -> bytes:
        """Return a member's bytes."""
        with ShardReader(self.tar_url, self.storage_options) as reader:
            return reader.read(member)


class ImageObject:
    """One image of a dataset, with everything that belongs to it.

    Parameters
    ----------
    image_path : str, default ""
        Where it came from, for people: the tar's path and the member's name.
    image_id : str, default ""
        The sample's key. It is unique within its shard only.
    image_data : ndarray of uint8, shape (height, width, 3), optional
        Pixels of an image that does not come from a file.
    caption : str, optional
        The sample's text.
    metadata : dict, optional
        Its row of the Parquet metadata, or the fields of its JSON. Stages may add fields, which are written too.
    image_bytes : bytes, optional
        The stored file.
    shard : str, default ""
        The tar's path below the dataset's, without ``.tar``.
    source : SampleSource, optional
        Where the whole sample lies.

    Attributes
    ----------
    embedding, text_embedding : ndarray of float32, shape (size,), or None
        Of the picture, and of its caption.
    clip_score : float or None
        Cosine of picture and caption.
    aesthetic_score, nsfw_score : float or None
        See :mod:`nemo_image.classifiers` for the scales.
    width, height : int or None
        Size of the stored image in pixels.
    image_error : str or None
        Why it cannot be decoded; None for a good image.
    files : dict of str to bytes
        The sample's files that were read, by their extension; the image among them. What is not here, but in `source`,
        is copied from there when it is written.
    prepared : dict of str to tensor
        A model's input made ahead of the model; see :class:`~nemo_image.stages.model_input.ModelInput`.
    """

    __slots__ = (
        "__weakref__",
        "_own_file",
        "_pixels",
        "_replaced",
        "aesthetic_score",
        "caption",
        "clip_score",
        "embedding",
        "files",
        "height",
        "image_error",
        "image_id",
        "image_path",
        "metadata",
        "nsfw_score",
        "original_caption",
        "prepared",
        "shard",
        "source",
        "text_embedding",
        "width",
    )

    def __init__(
        self,
        image_path: str = "",
        image_id: str = "",
        image_data: Pixels | None = None,
        caption: str | None = None,
        metadata: dict[str, Any] | None = None,
        image_bytes: bytes | None = None,
        shard: str = "",
        source: SampleSource | None = None,
        *,
        embedding: Vector | None = None,
        aesthetic_score: float | None = None,
        nsfw_score: float | None = None,
    ) -> None:
        self.image_path = image_path
        self.image_id = image_id
        self.caption = caption
        self.original_caption = caption
        self.metadata: dict[str, Any] = {} if metadata is None else metadata
        self.shard = shard
        self.source = source
        self.embedding = embedding
        self.text_embedding: Vector | None = None
        self.clip_score: float | None = None
        self.aesthetic_score = aesthetic_score
        self.nsfw_score = nsfw_score
        self.image_error: str | None = None
        self.width: int | None = None
        self.height: int | None = None
        self.files: dict[str, bytes] = {}
        self.prepared: dict[str, Any] = {}
        self._pixels: Pixels | None = None
        self._replaced = False
        self._own_file = False
        if image_bytes is not None:
            self.files[self.image_extension] = image_bytes
        if image_data is not None:
            self.image_data = image_data

    # The picture -----------------------------------------------------------------------------------------------------

    @property
    def image_extension(self) -> str:
        """The extension of the image's file, lower-cased, without a dot; ``"jpg"`` where there is no file."""
        member = None if self.source is None else self.source.sample.image
        return "jpg" if member is None else member.extension

    @property
    def image_bytes(self) -> bytes | None:
        """The stored file, read from its tar if it is not at hand; None where there is none.

        Assigning other bytes replaces the picture.
        """
        found = self.files.get(self.image_extension)
        if found is None and self.source is not None and self.source.sample.image is not None:
            found = self.source.read(self.source.sample.image)
        return found

    @image_bytes.setter
    def image_bytes(self, data: bytes) -> None:
        self.files[self.image_extension] = data
        self.width = self.height = self.image_error = None
        self._own_file = True
        self._pixels = None
        self._replaced = False
        self.prepared = {}

    @property
    def image_data(self) -> Pixels | None:
        """Pixels, (height, width, 3) uint8, upright RGB; None where the picture cannot be decoded.

        Decoded when they are first asked for, unless the reader did so ahead; they are read-only. Assigning other
        pixels changes what later stages see, not the file that is written.

        Raises
        ------
        ImageError
            If the picture turns out to be bad; from then on, `image_error` says why.
        """
        if self._pixels is None and self.image_error is None:
            data = self.image_bytes
            if data is not None:
                try:
                    self.hold_pixels(decode_rgb(data)[1].permute(1, 2, 0).numpy())
                except ImageError as error:
                    self.image_error = error.reason
                    raise
        return self._pixels

    @image_data.setter
    def image_data(self, pixels: Pixels | None) -> None:
        if pixels is None:
            self.drop_pixels()
            return
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise ArgumentError(
                f"image_data of {self.image_id!r} must be uint8 of shape (height, width, 3), not {pixels.dtype} of "
                f"{pixels.shape}"
            )
        self._pixels = pixels
        self._replaced = True
        self.prepared = {}

    @property
    def has_own_pixels(self) -> bool:
        """Whether the pixels are other than those of the stored file: assigned by a stage, or there is no file."""
        return self._replaced

    @property
    def holds_pixels(self) -> bool:
        """Whether decoded pixels are in memory."""
        return self._pixels is not None

    def hold_pixels(self, pixels: Pixels) -> None:
        """Keep the pixels that were decoded from the stored file."""
        pixels.flags.writeable = False
        self._pixels = pixels

    def drop_pixels(self) -> None:
        """Free the decoded pixels, and what was made of them; the stored file stays."""
        self._pixels = None
        self._replaced = False
        self.prepared = {}

    def stored_size(self) -> tuple[int, int] | None:
        """Return width and height of the stored image in pixels, from its first bytes; None if they cannot be read."""
        if self.width is None and self.image_error is None:
            data = self.image_bytes
            try:
                if data is not None:
                    header = read_header(data)
                    self.width, self.height = header.width, header.height
                elif self._pixels is not None:
                    self.height, self.width = self._pixels.shape[:2]
            except ImageError as error:
                self.image_error = error.reason
        return None if self.width is None or self.height is None else (self.width, self.height)

    # Between processes -----------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what can be had again: pixels, and files that lie in a tar."""
        state = {name: getattr(self, name) for name in self.__slots__ if name != "__weakref__"}
        has_file = self.source is not None or self.image_extension in self.files
        if has_file and not self._replaced:
            state["_pixels"] = None
        state["prepared"] = {}
        if self.source is not None and not self._own_file:
            state["files"] = {}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def __repr__(self) -> str:
        said = [f"image_path={self.image_path!r}", f"image_id={self.image_id!r}"]
        said += [
            f"{name}={getattr(self, name)!r}"
            for name in ("aesthetic_score", "nsfw_score", "clip_score", "image_error")
            if getattr(self, name) is not None
        ]
        return f"ImageObject({', '.join(said)})"
