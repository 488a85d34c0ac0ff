"""Deduplication of real near-duplicates, 500 UKBench photographs: pair precision, recall, F1, and what is removed.

From the project's root, with nemo_image installed or ``PYTHONPATH=.``::

    python benchmarks/dedup_ukbench.py ../shared/data/near_duplicates \\
        --weights ../shared/weights/tf_efficientnet_lite0.pth

Ground truth: `ukbenchNNNNN.jpg` shows object NNNNN // 4, four views an object; a true pair is two views of one object.

Protocol: the objects are split in halves by a seed. The threshold with the best F1 over the pairs inside the first half
is scored on the pairs inside the second; pairs across the halves count nowhere. Repeated for several seeds. Operators
see all the photographs and never the truth, and are run once at each threshold.

What counts as a predicted pair:

- *all pairs*: two photographs whose cosine is at least 1 - eps, or whose hashes differ in at most `max_distance` bits,
  by numpy and imagehash alone: what the operators are measured against.
- *blocks*: two photographs in one of SemanticDedup's clusters with such a cosine: the pairs that its blocks look at.
- *groups*: two photographs that an operator's `duplicate_of` connects, directly or through others. With representatives
  a group is a kept photograph and those that fell to it, and two that fell may be less alike than the threshold.

A removed view is superfluous if another view of its object is kept; an object is lost if no view of it is kept.
Operators' results are checked against the plain similarities on the way: each twin is kept and within the threshold,
and no two kept rows of a cluster are.
"""

from __future__ import annotations

import argparse
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.dedup import ExactDedup, PerceptualDedup, SemanticDedup
from nemo_image.embedders import TimmImageEmbedder

MODEL = "tf_efficientnet_lite0"
VIEWS = 4
SHARDS = 5
CLUSTERS = ((1, 1), (2, 1), (4, 1), (8, 1), (22, 1), (4, 2), (8, 2), (22, 2))
"""Numbers of clusters, and of clusters that a row is compared in."""
SEMANTIC = "SemanticDedup, groups"
COUNTED = ("removed", "superfluous", "with a wrong twin", "objects lost")
EPS = tuple(round(0.02 * step, 2) for step in range(2, 31))
MAX_DISTANCES = tuple(range(0, 33, 2))  # a pHash has 32 bits set, or nearly: distances are even, or nearly all

Mask = npt.NDArray[np.bool_]
Pairs = Mask
"""Symmetric, shape (n, n): which photographs form a pair."""
Objects = npt.NDArray[np.int64]
"""Shape (n,): what each photograph shows."""
Similarity = npt.NDArray[np.float64]
Twins = npt.NDArray[np.int64]
"""Shape (n,): the photograph that each one fell to, -1 for those that are kept."""


# The photographs -----------------------------------------------------------------------------------------------------


def write_dataset(pictures: Sequence[Path], folder: Path) -> None:
    """Write the photographs as a WebDataset, with their keys as metadata."""
    for shard, members in enumerate(np.array_split(np.array(pictures, object), SHARDS)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for picture in members:
                tar.add(picture, picture.name)
        pq.write_table(pa.table({"key": [picture.stem for picture in members]}), folder / f"{shard:05d}.parquet")


def embedded(pictures: Sequence[Path], folder: Path, weights: Path) -> ImageTextPairDataset:
    """Return the dataset of the photographs, embedded and saved below `folder`."""
    source = folder / "photographs"
    source.mkdir()
    write_dataset(pictures, source)
    # float32, so that the figures are the same wherever this runs.
    embed = TimmImageEmbedder(MODEL, weights=weights, autocast=False)
    return embed(ImageTextPairDataset.from_webdataset(source)).save_metadata(folder / "embedded")


def cosines(frame: pd.DataFrame) -> Similarity:
    """Return the cosine of every pair of rows, computed in float64 and rounded to float32, shape (n, n)."""
    vectors = np.array(frame["image_embedding"].tolist(), np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors @ vectors.T).astype(np.float32).astype(np.float64)


def phash_distances(pictures: Sequence[Path]) -> npt.NDArray[np.int64]:
    """Return the Hamming distance of every pair of perceptual hashes, in bits, shape (n, n)."""
    bits = []
    for picture in pictures:
        with Image.open(picture) as image:
            bits.append(imagehash.phash(ImageOps.exif_transpose(image).convert("RGB")).hash.reshape(-1))
    set_bits = np.array(bits, np.int64)
    return set_bits @ (1 - set_bits).T + (1 - set_bits) @ set_bits.T


# Scores --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """How well predicted pairs agree with the true ones; each is between 0 and 1."""

    precision: float
    recall: float
    f1: float


def score(predicted: Pairs, true: Pairs, rows: Mask | None = None) -> Scores:
    """Score the pairs among `rows` (all by default); the precision of no pair at all is 1."""
    if rows is not None:
        predicted, true = predicted[np.ix_(rows, rows)], true[np.ix_(rows, rows)]
    above = np.triu_indices(len(true), 1)
    both = int((predicted & true)[above].sum())
    positives, real = int(predicted[above].sum()), int(true[above].sum())
    return Scores(both / positives if positives else 1.0, both / real, 2 * both / (positives + real))


def split_scores(method: Method, objects: Objects, seed: int) -> tuple[float, Scores]:
    """Choose the threshold with the best F1 on a random half of the objects; return it and its scores on the other."""
    names = np.random.default_rng(seed).permutation(np.unique(objects))
    first = np.isin(objects, names[: len(names) // 2])
    true = objects[:, None] == objects
    # Of equals the strictest, which stands first.
    best = max(method, key=lambda threshold: score(method[threshold].pairs, true, first).f1)
    return best, score(method[best].pairs, true, ~first)


@dataclass(frozen=True)
class Removal:
    """What removing the rows with a twin does to the objects (all are counts)."""

    removed: int
    superfluous: int
    wrong_twin: int
    lost: int


def removal(twins: Twins, objects: Objects) -> Removal:
    """Count the removed rows: in all, those of objects with a kept view, those whose twin shows another object."""
    removed = twins >= 0
    lost = ~np.isin(objects, objects[~removed])
    wrong_twin = objects[removed] != objects[twins[removed]]
    # Of an object that is lost, one view was not superfluous.
    objects_lost = len(np.unique(objects[lost]))
    return Removal(int(removed.sum()), int(removed.sum()) - objects_lost, int(wrong_twin.sum()), objects_lost)


def greedy(pairs: Pairs) -> Twins:
    """Return the first earlier kept row that each row forms a pair with: a removal in the order of the names."""
    twins = np.full(len(pairs), -1)
    for row in range(len(pairs)):
        similar = np.flatnonzero(pairs[row, :row] & (twins[:row] < 0))
        if len(similar):
            twins[row] = similar[0]
    return twins


def groups(twins: Twins) -> Pairs:
    """Return the pairs that are connected by twins, directly or through others."""
    root = np.where(twins < 0, np.arange(len(twins)), twins)
    while (root[root] != root).any():
        root = root[root]
    return root[:, None] == root


@dataclass(frozen=True)
class Result:
    """What a method says at one threshold, in the order of the photographs' names.

    `clusters` are -1 for rows that an earlier tier removed, and all 0 where there are none.
    """

    pairs: Pairs
    twins: Twins
    clusters: npt.NDArray[np.int64]
    tiers: str = ""


Method = dict[float, Result]
"""Results by threshold, the strictest first."""


def plain(pairs: Pairs) -> Result:
    """Return all pairs within a threshold, and the removal that they lead to in the order of the names."""
    return Result(pairs, greedy(pairs), np.zeros(len(pairs), np.int64))


def found(dataset: ImageTextPairDataset) -> Result:
    """Compute an operator's result, its groups as pairs."""
    frame = dataset.metadata.compute().sort_values("key", ignore_index=True)
    number = {name: row for row, name in enumerate(zip(frame["shard"].astype(str), frame["key"], strict=True))}
    duplicates = frame["is_duplicate"].to_numpy(bool)
    twins = np.full(len(frame), -1)
    twins[duplicates] = [
        number[str(shard), key]
        for shard, key in frame.loc[duplicates, ["duplicate_of_shard", "duplicate_of"]].itertuples(index=False)
    ]
    clusters = frame["cluster"].fillna(-1).to_numpy(np.int64) if "cluster" in frame else np.zeros(len(frame), np.int64)
    tiers = frame.loc[duplicates, "duplicate_tier"].astype(str).value_counts()
    return Result(groups(twins), twins, clusters, ", ".join(f"{tier} {count}" for tier, count in tiers.items()))


def check(result: Result, near: Pairs) -> None:
    """Check an operator's result with representatives against all pairs within the threshold.

    Raises
    ------
    RuntimeError
        If a twin is not kept or not within the threshold, or two kept rows of a cluster are within it.
    """
    fell, kept = np.flatnonzero(result.twins >= 0), np.flatnonzero(result.twins < 0)
    if (result.twins[result.twins[fell]] >= 0).any() or not near[fell, result.twins[fell]].all():
        raise RuntimeError("a removed photograph's twin is not kept, or not within the threshold")
    together = result.clusters[kept][:, None] == result.clusters[kept]
    if np.triu(near[np.ix_(kept, kept)] & together, 1).any():
        raise RuntimeError("two kept photographs of one cluster are within the threshold")


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a Markdown table."""
    print(f"\n## {title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(f'{value:.3f}' if isinstance(value, float) else str(value) for value in row)} |")
    print(end="", flush=True)


def print_splits(methods: Mapping[str, Method], objects: Objects, seed: int, seeds: int) -> dict[str, float]:
    """Print the scores on the halves not chosen on; return the threshold of each method's first split."""
    rows, thresholds = [], {}
    for name, method in methods.items():
        splits = [split_scores(method, objects, seed + number) for number in range(seeds)]
        thresholds[name], first = splits[0]
        f1, chosen = [scores.f1 for _, scores in splits], [threshold for threshold, _ in splits]
        spread = float(np.mean(f1)), f"{min(f1):.3f} to {max(f1):.3f}", f"{min(chosen):g} to {max(chosen):g}"
        rows.append((name, f"{thresholds[name]:g}", *astuple(first), *spread))
    header = ("pairs", "threshold", "precision", "recall", "F1", f"mean F1 of {seeds} splits", "F1", "thresholds")
    print_table(f"Threshold chosen on half of the objects, scored on the other half (seed {seed})", header, rows)
    return thresholds


def print_removal(methods: Mapping[str, Method], thresholds: Mapping[str, float], objects: Objects) -> None:
    """Print what each method removes at its threshold."""
    rows = []
    for name, method in methods.items():
        result = method[thresholds[name]]
        rows.append((name, f"{thresholds[name]:g}", *astuple(removal(result.twins, objects)), result.tiers))
    print_table("Removal at that threshold, all objects", ("pairs", "threshold", *COUNTED, "by tier"), rows)


def print_sweep(name: str, method: Method, objects: Objects) -> None:
    """Print scores and removal over all objects at each threshold."""
    true = objects[:, None] == objects
    rows = []
    for threshold, result in method.items():
        scores, counts = score(result.pairs, true), removal(result.twins, objects)
        rows.append((f"{threshold:g}", *astuple(scores), *astuple(counts)))
    header = ("threshold", "precision", "recall", "F1", *COUNTED)
    print_table(f"{name} by threshold, all objects", header, rows)


def print_clusters(dataset: ImageTextPairDataset, similarity: Similarity, objects: Objects, eps: float) -> None:
    """Print what clusters cost: true pairs that no block looks at."""
    true, near = objects[:, None] == objects, similarity >= 1 - eps
    rows = []
    for n_clusters, n_probe in CLUSTERS:
        result = found(SemanticDedup(n_clusters=n_clusters, n_probe=n_probe, eps=eps)(dataset))
        check(result, near)
        together = result.clusters[:, None] == result.clusters
        shares = score(together, true).recall, score(together, true & near).recall
        scores, counts = score(result.pairs, true), removal(result.twins, objects)
        rows.append((n_clusters, n_probe, *shares, *astuple(scores), *astuple(counts)))
    header = ("clusters", "n_probe", "true pairs in one cluster", f"of those within eps {eps:g}")
    print_table("What clusters cost", (*header, "groups: precision", "recall", "F1", *COUNTED), rows)


def main() -> None:
    """Embed, run every method, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="folder of ukbenchNNNNN.jpg")
    parser.add_argument("--weights", type=Path, required=True, help=f"trained weights of {MODEL}")
    parser.add_argument("--max-distance", type=int, default=4, help="of the cascade's perceptual tier, in bits")
    parser.add_argument("--seed", type=int, default=0, help="of the first split of the objects")
    parser.add_argument("--seeds", type=int, default=20, help="number of splits")
    args = parser.parse_args()
    pictures = sorted(args.pictures.glob("ukbench*.jpg"))
    objects = np.array([int(picture.stem.removeprefix("ukbench")) // VIEWS for picture in pictures])
    count = len(np.unique(objects))
    print(f"{len(pictures)} photographs of {count} objects: {len(pictures) - count} are superfluous. {MODEL}")
    with tempfile.TemporaryDirectory() as folder:
        dataset = embedded(pictures, Path(folder), args.weights)
        similarity = cosines(dataset.metadata.compute().sort_values("key"))
        near = {eps: similarity >= 1 - eps for eps in EPS}
        distances = phash_distances(pictures)
        alike = {float(most): distances <= most for most in MAX_DISTANCES}
        methods = {
            "cosine, all pairs": {eps: plain(pairs) for eps, pairs in near.items()},
            **semantic_methods(dataset, near),
            "pHash, all pairs": {most: plain(pairs) for most, pairs in alike.items()},
            "PerceptualDedup, groups": perceptual(dataset, alike),
            f"cascade, max_distance={args.max_distance}, groups": cascade(dataset, args.max_distance, Path(folder)),
        }
        thresholds = print_splits(methods, objects, args.seed, args.seeds)
        print_removal(methods, thresholds, objects)
        for name, method in methods.items():
            print_sweep(name, method, objects)
        print_clusters(dataset, similarity, objects, thresholds[SEMANTIC])


def semantic_methods(dataset: ImageTextPairDataset, near: Mapping[float, Pairs]) -> dict[str, Method]:
    """Run SemanticDedup at every eps, with and without representatives."""
    results = {eps: found(SemanticDedup(eps=eps)(dataset)) for eps in near}
    chains = {eps: found(SemanticDedup(eps=eps, representative=False)(dataset)) for eps in near}
    blocks = {}
    for eps, result in results.items():
        check(result, near[eps])
        blocks[eps] = replace(result, pairs=near[eps] & (result.clusters[:, None] == result.clusters))
    return {"SemanticDedup, blocks": blocks, SEMANTIC: results, "SemanticDedup, representative=False, groups": chains}


def perceptual(dataset: ImageTextPairDataset, alike: Mapping[float, Pairs]) -> Method:
    """Run PerceptualDedup at every distance."""
    results = {most: found(PerceptualDedup(max_distance=int(most))(dataset)) for most in alike}
    for most, result in results.items():
        check(result, alike[most])
    return results


def cascade(dataset: ImageTextPairDataset, max_distance: int, folder: Path) -> Method:
    """Run exact, then perceptual deduplication once, and semantic deduplication of what is left at every eps."""
    cheap = PerceptualDedup(max_distance=max_distance)(ExactDedup()(dataset)).save_metadata(folder / "cheap")
    return {eps: found(SemanticDedup(eps=eps)(cheap)) for eps in EPS}


if __name__ == "__main__":
    main()
