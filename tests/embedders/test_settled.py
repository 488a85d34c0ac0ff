"""A number type that a probe chose stays for the whole of a run, however often it is taken up again."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nemo_image.classifiers import ImageClassifier
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import TimmImageEmbedder
from nemo_image.embedders.timm import PreparedTimmEmbedder
from tests.makers import TINY_MODEL, make_dataset


class Sum(ImageClassifier):
    """Adds up an embedding."""

    def __init__(self) -> None:
        super().__init__("sum", "image_embedding", "total", "float32", -1, 256)

    def load_model(self, device: str):  # type: ignore[no-untyped-def]
        return lambda vectors: vectors.sum(1)

    def postprocess(self, series):  # type: ignore[no-untyped-def]
        return series


def embedded(folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, autocast: bool = True) -> ImageTextPairDataset:
    """Embed lazily, with a probe that chooses `dtype`."""
    monkeypatch.setattr(PreparedTimmEmbedder, "settled_dtype", lambda self, dataset: dtype)
    embedder = TimmImageEmbedder(TINY_MODEL, autocast=autocast, classifiers=[Sum()])
    return embedder(ImageTextPairDataset.from_webdataset(folder))


def test_a_run_goes_on_with_the_type_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path / "in", {"a": 3, "b": 2})
    out = tmp_path / "out"
    embedded(tmp_path / "in", monkeypatch, "bfloat16").save_metadata(out)
    before = {path.name: path.read_bytes() for path in out.glob("*.parquet")}
    (out / "b.parquet").unlink()
    lazy = embedded(tmp_path / "in", monkeypatch, "float32")
    assert lazy.pending_shards(out) == ["b"]
    saved = lazy.save_metadata(out)
    assert saved.run_totals is not None
    assert saved.run_totals["shards"] == {"done": 1, "skipped": 1, "failed": 0}
    assert {path.name: path.read_bytes() for path in out.glob("*.parquet")} == before
    assert saved.provenance["total"]["parents"]["image_embedding"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(("resume", "autocast"), [(False, True), (True, False)])
def test_what_the_user_asks_for_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool, autocast: bool
) -> None:
    make_dataset(tmp_path / "in", {"a": 3})
    out = tmp_path / "out"
    embedded(tmp_path / "in", monkeypatch, "bfloat16").save_metadata(out)
    rough = pq.read_table(out / "a.parquet")["image_embedding"]
    saved = embedded(tmp_path / "in", monkeypatch, "float32", autocast).save_metadata(out, resume=resume)
    assert saved.provenance["image_embedding"]["dtype"] == "float32"
    assert pq.read_table(out / "a.parquet")["image_embedding"] != rough
