"""What flows between the stages of a pipeline: groups of files, batches of images, tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import pandas as pd
import pyarrow as pa

from nemo_image.stages.image_object import ImageObject

T = TypeVar("T")


@dataclass
class Task(Generic[T]):
    """What a stage takes and gives.

    Attributes
    ----------
    data : object
        The work itself.
    task_id : str
        Names it in logs and errors.
    dataset_name : str
    metadata : dict
        Whatever stages want to tell later stages.
    """

    data: T
    task_id: str = ""
    dataset_name: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def num_items(self) -> int:
        """How many things the task holds."""
        return 1


@dataclass
class EmptyTask(Task[None]):
    """What the first stage of a pipeline takes."""

    data: None = None

    @property
    def num_items(self) -> int:
        """None."""
        return 0


@dataclass
class FileGroup(Task[list[str]]):
    """Files that are worked on together, by one task in one process.

    Attributes
    ----------
    data : list of str
        Paths or URLs of the files.
    name : str
        A name of its own among the groups of a run, fit for a file: made of the files' names, so that it stays the same
        when other files are added.
    index : int
        Its place among the groups of the run.
    root : str
        The folder or URL below which the files lie.
    storage_options : dict
        For fsspec.
    """

    data: list[str] = field(default_factory=list)
    name: str = ""
    index: int = 0
    root: str = ""
    storage_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_items(self) -> int:
        """The number of files."""
        return len(self.data)


@dataclass
class ImageBatch(Task[list[ImageObject]]):
    """Images that are worked on together.

    Attributes
    ----------
    data : list of ImageObject
    fields : pyarrow.Schema
        Types of the metadata's fields, as the source's Parquet has them.
    """

    data: list[ImageObject] = field(default_factory=list)
    fields: pa.Schema = field(default_factory=lambda: pa.schema([]))

    @property
    def num_items(self) -> int:
        """The number of images."""
        return len(self.data)

    def with_images(self, images: list[ImageObject]) -> ImageBatch:
        """Return the same batch with other images."""
        return ImageBatch(images, self.task_id, self.dataset_name, self.metadata, self.fields)


@dataclass
class DocumentBatch(Task[pd.DataFrame]):
    """A table: one row an image, say."""

    data: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def num_items(self) -> int:
        """The number of rows."""
        return len(self.data)
