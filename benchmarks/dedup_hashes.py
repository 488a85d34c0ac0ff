"""Perceptual hashes: time and memory of the search for near ones, and how near those of copies of photographs are.

    python -m benchmarks.dedup_hashes --rows 100000 1000000 --photos some/folder

The hashes of the first table are random; 30% of the rows are copies of others, with up to `max_distance` bits flipped.
Every such pair must be found. Each line is measured in a process of its own (on Linux): the seconds of `near_hashes`,
and how far its peak memory is above what the process, with the hashes, took before. The other tables compare JPEG
photographs with changed copies of themselves, and with each other.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nemo_image.dedup.hashes.hamming import near_hashes

Hashes = npt.NDArray[np.uint64]

COPIES = 0.3
DISTANCES = (0, 2, 4, 6, 8, 10, 12, 16)


def planted(rows: int, max_distance: int) -> tuple[Hashes, npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Return hashes, pairs of an earlier and a later row (2, n), and the bits in which each pair differs."""
    rng = np.random.default_rng(1234)
    count = int(COPIES * rows)
    originals = rng.integers(0, 2**64, rows - count, dtype=np.uint64)
    chosen = rng.integers(0, len(originals), count)
    copies = originals[chosen]
    flips = rng.integers(0, max_distance + 1, count)
    for flip in range(max_distance):
        # A bit may be flipped back: the pair is then nearer.
        bits = np.uint64(1) << rng.integers(0, 64, count, dtype=np.uint64)
        copies = np.where(flip < flips, copies ^ bits, copies)
    order = rng.permutation(rows)
    hashes = np.concatenate([originals, copies])[order]
    place = np.empty(rows, np.int64)
    place[order] = np.arange(rows)
    pairs = np.sort(np.stack([place[chosen], place[len(originals) :]]), axis=0)
    distances = np.unpackbits((hashes[pairs[0]] ^ hashes[pairs[1]]).view(np.uint8).reshape(-1, 8), axis=1).sum(1)
    return hashes, pairs, distances.astype(np.uint8)


def search(rows: int, max_distance: int, representative: bool) -> dict[str, float]:
    """Search once, in this process; check that every planted pair was found."""
    hashes, (earlier, later), planted_distance = planted(rows, max_distance)
    near_hashes(hashes[:1000], max_distance)  # imports
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = memory("VmRSS")
    started = time.perf_counter()
    distance, twin = near_hashes(hashes, max_distance, representative=representative)
    seconds = time.perf_counter() - started
    peak = memory("VmHWM")
    must = twin[earlier] < 0 if representative else np.ones(len(earlier), bool)
    found = (distance[later] >= 0) & (distance[later] <= planted_distance)
    assert found[must].all(), f"{(~found[must]).sum()} of {must.sum()} planted pairs were missed"
    fell = twin >= 0
    bits = bits_between(hashes[fell], hashes[twin[fell]])
    assert (bits == distance[fell]).all()
    return {
        "seconds": seconds,
        "bytes": (peak - before) / rows,
        "peak_mib": peak / 2**20,
        "pairs": int(must.sum()),
    }


def memory(field: str) -> int:
    """Return a field of this process's status, in bytes."""
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0]) * 1024


def table_of_searches(rows: list[int], distances: list[int]) -> None:
    """Print the first table."""
    print("| hashes | max_distance | compared with | seconds | bytes a hash | peak RSS, MiB | planted pairs | found |")
    print("|---|---|---|---|---|---|---|---|")
    for count in rows:
        for max_distance in distances:
            for representative in (True, False):
                job = ["--job", str(count), str(max_distance), str(int(representative))]
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.dedup_hashes", *job], stdout=subprocess.PIPE, check=True
                )
                found = json.loads(done.stdout)
                who = "kept rows" if representative else "all rows"
                print(
                    f"| {count:,} | {max_distance} | {who} | {found['seconds']:.2f} | {found['bytes']:.0f} "
                    f"| {found['peak_mib']:.0f} | {found['pairs']:,} | all |",
                    flush=True,
                )


def changes() -> dict[str, Callable[..., bytes]]:
    """Return what is done to photographs, by name: from a picture to a JPEG."""
    from PIL import Image, ImageOps

    def jpeg(image: Image.Image, quality: int = 90) -> bytes:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        return out.getvalue()

    def resized(image: Image.Image, scale: float) -> bytes:
        return jpeg(image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS))

    def cropped(image: Image.Image, share: float) -> bytes:
        return jpeg(image.crop((round(image.width * share), round(image.height * share), image.width, image.height)))

    return {
        "saved again, quality 50": lambda image: jpeg(image, 50),
        "saved again, quality 20": lambda image: jpeg(image, 20),
        "half the size": lambda image: resized(image, 0.5),
        "a quarter of the size": lambda image: resized(image, 0.25),
        "2% cut off left and top": lambda image: cropped(image, 0.02),
        "5% cut off left and top": lambda image: cropped(image, 0.05),
        "mirrored": lambda image: jpeg(ImageOps.mirror(image)),
    }


def bits_between(one: Hashes, other: Hashes) -> npt.NDArray[np.int64]:
    """Return the bits in which hashes differ."""
    return np.unpackbits((one ^ other)[..., None].view(np.uint8), axis=-1).sum(-1, dtype=np.int64)


def tables_of_photographs(folders: list[Path]) -> None:
    """Print how far copies, and different photographs, are from each other."""
    import imagehash

    from nemo_image.dedup.hashes.hamming import hashes_from_hex
    from nemo_image.shards.decode import decode_pillow

    paths = sorted(path for folder in folders for path in folder.glob("*.jpg"))
    pictures = [decode_pillow(path.read_bytes())[1] for path in paths]
    for name in ("phash", "dhash", "average_hash"):
        function = getattr(imagehash, name)
        originals = hashes_from_hex([str(function(picture)) for picture in pictures])
        print(f"\n{name}, {len(paths)} photographs: share of the pairs within so many bits\n")
        print(f"| pairs | {' | '.join(map(str, DISTANCES))} | median | least | largest |")
        print("|---" * (len(DISTANCES) + 4) + "|")
        for change, apply in changes().items():
            copies = [decode_pillow(apply(picture))[1] for picture in pictures]
            line(change, bits_between(originals, hashes_from_hex([str(function(copy)) for copy in copies])))
        one, other = np.triu_indices(len(paths), 1)
        line(f"different photographs ({len(one):,} pairs)", bits_between(originals[one], originals[other]))


def line(name: str, bits: npt.NDArray[np.int64]) -> None:
    """Print a line of a table."""
    shares = " | ".join(f"{(bits <= distance).mean():.2%}" for distance in DISTANCES)
    print(f"| {name} | {shares} | {np.median(bits):g} | {bits.min()} | {bits.max()} |", flush=True)


def main() -> None:
    """Measure, or do one job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--max-distance", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="folders of different JPEG photographs")
    parser.add_argument("--job", type=int, nargs=3)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(search(args.job[0], args.job[1], bool(args.job[2]))))
        return
    table_of_searches(args.rows, args.max_distance)
    if args.photos:
        tables_of_photographs(args.photos)


if __name__ == "__main__":
    main()
