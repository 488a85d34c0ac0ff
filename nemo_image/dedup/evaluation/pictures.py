"""A folder of pictures as a dataset: packed into tars, so that whatever works on datasets works on it."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from nemo_image import schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.discover import is_literal
from nemo_image.datasets.passes import run_all
from nemo_image.errors import DatasetError
from nemo_image.shards import files, parquet
from nemo_image.shards.keys import IMAGE_EXTENSIONS
from nemo_image.shards.write import TarWriter

PATH = "path"
"""The column with a picture's path below its folder."""

TAR_PICTURES = 1000


@dataclass(frozen=True)
class Picture:
    """A picture file: its path below the folder, and what tells it from other versions of it."""

    path: str
    size: int | None
    version: str


def is_dataset(path: str | Sequence[str], storage_options: Any) -> bool:
    """Tell whether a path means tars, and not a folder of pictures.

    Raises
    ------
    DatasetError
        If there is no such folder.
    """
    if not isinstance(path, str) or not is_literal(path, storage_options) or path.endswith(".tar"):
        return True
    if not files.is_folder(path, storage_options):
        raise DatasetError(f"against: {path}: no such folder: give a folder of pictures, or of tars, or a dataset")
    return bool(files.list_files(path, ".tar", storage_options))


def list_pictures(folder: str, storage_options: Any) -> list[Picture]:
    """Return the pictures in a folder and its subfolders, by path.

    Raises
    ------
    DatasetError
        If there is none.
    """
    fs, root = files.open_fs(folder, storage_options)
    root = root.rstrip("/")
    found = []
    for name, info in fs.find(root, detail=True).items():
        path = name[len(root) :].lstrip("/")
        hidden = any(part.startswith(".") for part in path.split("/"))
        if posixpath.splitext(path)[1][1:].lower() in IMAGE_EXTENSIONS and not hidden:
            version = info.get("mtime") or info.get("ETag") or info.get("LastModified") or ""
            found.append(Picture(path, info.get("size"), str(version)))
    if not found:
        raise DatasetError(
            f"against: {folder} holds no pictures ({', '.join(sorted(IMAGE_EXTENSIONS))}), and no tars: give a folder "
            "that does"
        )
    return sorted(found, key=lambda picture: picture.path)


def pack(folder: str, pictures: Sequence[Picture], into: str, storage_options: Any) -> ImageTextPairDataset:
    """Write pictures as a dataset, with the column `PATH`; tars that an earlier run wrote stay."""
    parts = [pictures[start : start + TAR_PICTURES] for start in range(0, len(pictures), TAR_PICTURES)]
    run_all("pack pictures", PackTar(folder, into, storage_options), enumerate(parts), len(parts))
    return ImageTextPairDataset.from_webdataset(into, schema.KEY, storage_options=storage_options)


class PackTar:
    """Writes one tar of pictures, and its metadata."""

    def __init__(self, folder: str, into: str, storage_options: Any) -> None:
        self.folder = folder
        self.into = into
        self.storage_options = storage_options

    def __call__(self, item: tuple[int, Sequence[Picture]]) -> None:
        """Write the tar of that number."""
        number, pictures = item
        name = files.join(self.into, f"{number:05d}")
        if files.exists(name + ".parquet", self.storage_options):
            return
        # Numbers: two pictures whose paths differ in the extension alone would be one sample.
        keys = [f"{number * TAR_PICTURES + place:09d}" for place in range(len(pictures))]
        with files.atomic_writer(name + ".tar", self.storage_options) as out, TarWriter(out) as tar:
            for key, picture in zip(keys, pictures, strict=True):
                extension = posixpath.splitext(picture.path)[1].lower()
                url = os.path.join(self.folder, picture.path)
                tar.add(key + extension, files.read_bytes(url, self.storage_options))
        paths = [picture.path.encode("utf-8", "replace").decode() for picture in pictures]
        table = pa.table({schema.KEY: pa.array(keys), PATH: pa.array(paths, pa.string())})
        parquet.write_table(name + ".parquet", table, None, self.storage_options)
