"""Make a small WebDataset of real photographs: those that the PyPI package scikit-image ships, and variations of them.

Run it as ``python scripts/demo/make_dataset.py FOLDER``, or call :func:`make_dataset`. Nothing is downloaded, and the
same arguments give the same bytes (with the same versions of Pillow and pyarrow).
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import random
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance, ImageOps

LONGEST_SIDE = 448
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Photograph:
    """A photograph in scikit-image's data folder."""

    file: str
    caption: str
    license: str


PHOTOGRAPHS = (
    Photograph("astronaut.png", "A smiling astronaut in an orange space suit before a flag", "public domain (NASA)"),
    Photograph("brick.png", "A wall of narrow bricks seen at an angle", "CC0-1.0"),
    Photograph("camera.png", "A man in a dark coat looks through a camera on a tripod on a lawn", "CC0-1.0"),
    Photograph("chelsea.png", "The face of a ginger tabby cat with green eyes", "CC0-1.0"),
    Photograph("clock_motion.png", "A wall clock, blurred because the camera moved", "public domain"),
    Photograph("coffee.png", "A cup of espresso on a red saucer with a spoon, on a wooden table", "CC0-1.0"),
    Photograph("coins.png", "Four rows of ancient Greek coins on a dark ground", "no known copyright restrictions"),
    Photograph("grass.png", "Blades of grass and small leaves, seen from above", "CC0-1.0"),
    Photograph("gravel.png", "Gravel that fills the whole picture", "CC0-1.0"),
    Photograph("hubble_deep_field.jpg", "Hundreds of galaxies in the Hubble deep field", "public domain (NASA)"),
    Photograph("ihc.png", "Tissue under a microscope, stained brown and blue", "no known copyright restrictions"),
    Photograph("moon.png", "Craters on the surface of the moon", "not stated, part of scikit-image"),
    Photograph("motorcycle_left.png", "A red motorcycle in a garage", "not stated, Middlebury Stereo 2014"),
    Photograph(
        "motorcycle_right.png",
        "A red motorcycle in a garage, photographed by the right camera of a stereo pair",
        "not stated, Middlebury Stereo 2014",
    ),
    Photograph("page.png", "A printed page about region-based segmentation", "not stated, part of scikit-image"),
    Photograph("retina.jpg", "The retina of a human eye with its blood vessels", "CC0-1.0"),
    Photograph("rocket.jpg", "A rocket stands lit on its launch pad at dusk", "public domain (SpaceX)"),
    Photograph("text.png", "Handwritten formulas on lined paper, photographed at a slant", "public domain"),
)


def _jpeg(image: Image.Image, quality: int = 90, subsampling: str = "4:4:4", **options: Any) -> bytes:
    return _saved(image, format="JPEG", quality=quality, subsampling=subsampling, **options)


def _saved(image: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, **options)
    return out.getvalue()


def _part(image: Image.Image, share: float, x: float, y: float) -> Image.Image:
    """Cut a rectangle of `share` of each side out of the image, at relative places `x` and `y` (0 to 1)."""
    width, height = round(image.width * share), round(image.height * share)
    left, top = round((image.width - width) * x), round((image.height - height) * y)
    return image.crop((left, top, left + width, top + height))


def _tinted(image: Image.Image, red: float, blue: float) -> Image.Image:
    r, g, b = image.split()
    return Image.merge("RGB", (r.point(_scaled(red)), g, b.point(_scaled(blue))))


def _scaled(factor: float) -> list[int]:
    return [min(255, int(value * factor)) for value in range(256)]


def _exif_rotated(image: Image.Image) -> bytes:
    """Store the image on its side, with the EXIF orientation that turns it upright again."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    return _jpeg(image.transpose(Image.Transpose.ROTATE_90), exif=exif)


def _truncated(image: Image.Image, rng: random.Random) -> bytes:
    whole = _jpeg(image)
    return whole[: int(len(whole) * rng.uniform(0.3, 0.6))]


@dataclass(frozen=True)
class Variation:
    """What is done to a photograph: its name, what the caption says of it, the file's extension, and how."""

    name: str
    remark: str
    extension: str
    make: Callable[[Image.Image, random.Random], bytes]


VARIATIONS = (
    Variation("original", "", "jpg", lambda image, _: _jpeg(image, 95)),
    Variation("small", ", in a small picture", "jpg", lambda image, rng: _jpeg(_fit(image, rng.randint(96, 192)))),
    Variation("tiny", ", in a picture of very few pixels", "jpg", lambda image, _: _jpeg(_fit(image, 48))),
    Variation("middle", ", cut to the middle", "jpg", lambda image, _: _jpeg(_part(image, 0.7, 0.5, 0.5))),
    Variation("detail", ", a detail", "jpg", lambda image, rng: _jpeg(_part(image, 0.5, rng.random(), rng.random()))),
    Variation("mirrored", ", mirrored", "jpg", lambda image, _: _jpeg(ImageOps.mirror(image))),
    Variation("grey", ", in black and white", "jpg", lambda image, _: _saved(image.convert("L"), format="JPEG")),
    Variation("dark", ", underexposed", "jpg", lambda image, _: _jpeg(ImageEnhance.Brightness(image).enhance(0.45))),
    Variation("bright", ", overexposed", "jpg", lambda image, _: _jpeg(ImageEnhance.Brightness(image).enhance(1.6))),
    Variation("warm", ", in warm light", "jpg", lambda image, _: _jpeg(_tinted(image, 1.25, 0.75))),
    Variation("cold", ", in cold light", "jpg", lambda image, _: _jpeg(_tinted(image, 0.75, 1.25))),
    Variation("coarse", ", strongly compressed", "jpg", lambda image, rng: _jpeg(image, rng.randint(8, 25), "4:2:0")),
    Variation("web", ", as the web sends it", "jpg", lambda image, rng: _jpeg(image, rng.randint(70, 85), "4:2:0")),
    Variation("rotated", ", from a camera held on its side", "jpeg", lambda image, _: _exif_rotated(image)),
    Variation("png", ", stored without loss", "png", lambda image, _: _saved(_fit(image, 224), format="PNG")),
    Variation("webp", ", as WebP", "webp", lambda image, _: _saved(image, format="WEBP", quality=80)),
)
BAD_VARIATIONS = (
    Variation("truncated", ", cut off in transfer", "jpg", _truncated),
    Variation("noise", ", replaced by random bytes", "jpg", lambda _, rng: rng.randbytes(5000)),
)
ALL_SAMPLES = len(PHOTOGRAPHS) * len(VARIATIONS) + len(BAD_VARIATIONS)


@dataclass(frozen=True)
class MadeDataset:
    """What was made: for each shard its samples; the keys of the bad images and of the rows without a sample."""

    folder: Path
    samples: dict[str, int]
    bad_images: dict[str, str] = field(default_factory=dict)
    rows_without_sample: dict[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Metadata rows of all shards."""
        return sum(self.samples.values()) + len(self.rows_without_sample)


def make_dataset(
    folder: str | Path, *, samples: int = ALL_SAMPLES, samples_per_shard: int = 50, seed: int = 0, bad: bool = True
) -> MadeDataset:
    """Write shards of photographs, ``00000.tar`` with ``00000.parquet`` and so on.

    Each sample has an image, a caption (``.txt``) and a ``.json`` with ``key``, ``caption``, ``source``,
    ``variation``, ``license``, and ``width`` and ``height`` of the stored image (null where it is damaged). The Parquet
    files have the first five of them as columns.

    Parameters
    ----------
    folder : str or path
        Made if need be; files of the same names are replaced.
    samples : int
        At most 18 photographs × 16 variations, and the bad images.
    samples_per_shard : int
        The last shard gets what is left.
    seed : int
        Settles the order, and where and how strongly a photograph is cut and compressed.
    bad : bool
        Whether two samples have images that cannot be decoded (one truncated, one of random bytes), and the first
        shard's metadata has one row more than its tar has samples.

    Returns
    -------
    MadeDataset

    Raises
    ------
    ValueError
        If there are not so many samples, or fewer than one a shard is asked for.
    """
    good = [(photograph, variation) for photograph in PHOTOGRAPHS for variation in VARIATIONS]
    most = len(good) + len(BAD_VARIATIONS) * bad
    if not 2 < samples <= most or samples_per_shard < 1:
        raise ValueError(f"samples must be 3 to {most}, not {samples}; samples_per_shard at least 1")
    rng = random.Random(seed)
    rng.shuffle(good)
    plan = good[: samples - len(BAD_VARIATIONS) * bad]
    for variation in BAD_VARIATIONS if bad else ():
        plan.insert(rng.randrange(len(plan) + 1), (rng.choice(PHOTOGRAPHS), variation))
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    made = MadeDataset(target, {})
    for number, start in enumerate(range(0, len(plan), samples_per_shard)):
        _write_shard(made, f"{number:05d}", plan[start : start + samples_per_shard], seed, bad and number == 0)
    return made


def _write_shard(
    made: MadeDataset, shard: str, plan: Sequence[tuple[Photograph, Variation]], seed: int, extra_row: bool
) -> None:
    rows = []
    with tarfile.open(made.folder / f"{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for place, (photograph, variation) in enumerate(plan):
            row = _row(f"{shard}{place:04d}", photograph, variation)
            data = variation.make(_load(photograph), random.Random(f"{seed} {photograph.file} {variation.name}"))
            bad = variation in BAD_VARIATIONS
            width, height = (None, None) if bad else Image.open(io.BytesIO(data)).size
            _add(tar, f"{row['key']}.{variation.extension}", data)
            _add(tar, f"{row['key']}.txt", row["caption"].encode())
            _add(tar, f"{row['key']}.json", json.dumps({**row, "width": width, "height": height}).encode())
            rows.append(row)
            if bad:
                made.bad_images[row["key"]] = variation.name
    made.samples[shard] = len(plan)
    if extra_row:
        lost = {**_row(f"{shard}{len(plan):04d}", PHOTOGRAPHS[0], VARIATIONS[0]), "variation": "download failed"}
        rows.append(lost)
        made.rows_without_sample[lost["key"]] = shard
    pq.write_table(pa.Table.from_pylist(rows), made.folder / f"{shard}.parquet")


def _row(key: str, photograph: Photograph, variation: Variation) -> dict[str, str]:
    return {
        "key": key,
        "caption": f"{photograph.caption}{variation.remark}.",
        "source": f"pkg:pypi/scikit-image#skimage/data/{photograph.file}",
        "variation": variation.name,
        "license": photograph.license,
    }


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _load(photograph: Photograph) -> Image.Image:
    # Found without importing scikit-image, whose data functions could want to download.
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("scikit-image is not installed: pip install 'nemo-image[demo]'")
    with Image.open(Path(spec.origin).parent / "data" / photograph.file) as image:
        return _fit(image.convert("RGB"), LONGEST_SIDE)


def _fit(image: Image.Image, longest_side: int) -> Image.Image:
    """Scale an image down so that its longer side has at most so many pixels."""
    fitted = image.copy()
    fitted.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    return fitted


def main(arguments: Sequence[str] | None = None) -> None:
    """Make a dataset as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the shards go")
    parser.add_argument("--samples", type=int, default=ALL_SAMPLES, help="default: %(default)s, all there are")
    parser.add_argument("--samples-per-shard", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--no-bad", action="store_true", help="no damaged images, no row without a sample")
    given = parser.parse_args(arguments)
    made = make_dataset(
        given.folder,
        samples=given.samples,
        samples_per_shard=given.samples_per_shard,
        seed=given.seed,
        bad=not given.no_bad,
    )
    print(f"{made.folder}: {len(made.samples)} shards, {made.rows} rows; bad images: {made.bad_images}")


if __name__ == "__main__":
    main()
