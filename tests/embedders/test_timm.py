"""The timm embedder's own promises: number type, batches, memory, index files."""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_image.backend import to_matrix
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import TimmImageEmbedder
from nemo_image.embedders import autocast as autocast_module
from nemo_image.embedders.autocast import probe_dtype
from nemo_image.embedders.timm import PreparedTimmEmbedder
from nemo_image.errors import ArgumentError
from nemo_image.shards.idx_file import write_idx
from nemo_image.shards.index import index_tar
from tests.makers import TINY_MODEL, make_dataset


def load(path: Path) -> ImageTextPairDataset:
    return ImageTextPairDataset.from_webdataset(str(path))


def prepared(dataset: ImageTextPairDataset, **options: Any) -> PreparedTimmEmbedder:
    return TimmImageEmbedder(TINY_MODEL, **{"autocast": False, **options}).prepare(dataset)


# ------------------------------------------------------------------------------------------------------- number type


def forward_with(error: float, seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a stand-in for a model whose reduced precision is off by `error`, on a clock of its own."""
    clock = [0.0]
    monkeypatch.setattr(autocast_module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(autocast_module, "candidate_dtype", lambda device: "bfloat16")

    def forward(pixels: torch.Tensor, dtype: str) -> torch.Tensor:
        clock[0] += seconds[dtype]
        vectors = torch.eye(4)[: len(pixels)] if len(pixels) <= 4 else torch.ones(len(pixels), 4)
        if dtype != "float32":
            vectors = vectors + error * torch.tensor([0.0, 1.0, 0.0, 0.0])
        return vectors

    return forward


@pytest.mark.parametrize(
    ("error", "reduced_seconds", "chosen"),
    [(0.0, 0.5, "bfloat16"), (0.0, 1.0, "float32"), (0.5, 0.5, "float32"), (0.001, 0.5, "bfloat16")],
)
def test_reduced_precision_only_where_harmless_and_faster(
    monkeypatch: pytest.MonkeyPatch, error: float, reduced_seconds: float, chosen: str
) -> None:
    forward = forward_with(error, {"float32": 1.0, "bfloat16": reduced_seconds}, monkeypatch)
    assert probe_dtype(forward, torch.zeros(8, 3, 4, 4), "cpu") == chosen


def test_no_pictures_to_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = forward_with(0.0, {"float32": 1.0, "bfloat16": 0.1}, monkeypatch)
    assert probe_dtype(forward, torch.empty(0), "cpu") == "float32"


def test_the_probe_sees_real_pictures_of_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def probe(forward: Any, pixels: torch.Tensor, device: str) -> str:
        seen.append(tuple(pixels.shape))
        assert forward(pixels, "float32").shape[0] == len(pixels)
        return "float32"

    monkeypatch.setattr(autocast_module, "candidate_dtype", lambda device: "bfloat16")
    monkeypatch.setattr(autocast_module, "probe_dtype", probe)
    make_dataset(tmp_path, {"a": 5})
    prepared(load(tmp_path), autocast=True)
    assert seen == [(5, 3, 160, 160)]


def test_finished_rows_settle_the_number_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path, {"a": 2})
    monkeypatch.setattr(autocast_module, "candidate_dtype", lambda device: "bfloat16")
    monkeypatch.setattr(autocast_module, "probe_dtype", lambda *_: "bfloat16")
    TimmImageEmbedder(TINY_MODEL)(load(tmp_path)).save_metadata()
    monkeypatch.setattr(autocast_module, "probe_dtype", lambda *_: "float32")
    again = TimmImageEmbedder(TINY_MODEL)(load(tmp_path)).save_metadata()
    assert again.run_totals is not None
    assert again.run_totals["shards"]["skipped"] == 1
    assert again.provenance["image_embedding"]["dtype"] == "bfloat16"


# ------------------------------------------------------------------------------------------------------------ batches


def test_results_repeat_to_the_last_bit(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 11, "b": 7})
    embedder = TimmImageEmbedder(TINY_MODEL, autocast=False, batch_size=4)
    hashes = []
    for run in range(2):
        embedder(load(tmp_path)).save_metadata(tmp_path / f"out{run}")
        files = sorted((tmp_path / f"out{run}").glob("*.parquet"))
        hashes.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
    assert hashes[0] == hashes[1]


def test_batch_size_changes_only_rounding(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 7})
    found = []
    for size in (1, 3, "auto"):
        frame = TimmImageEmbedder(TINY_MODEL, autocast=False, batch_size=size)(load(tmp_path)).metadata.compute()  # type: ignore[arg-type]
        found.append(to_matrix(frame["image_embedding"])[0])
    assert np.allclose(found[0], found[1], atol=1e-6)
    assert np.allclose(found[0], found[2], atol=1e-6)


def test_out_of_gpu_memory_halves_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_dataset(tmp_path, {"a": 1})
    embedder = prepared(load(tmp_path))
    sizes = []

    def forward(pixels: torch.Tensor, dtype: str) -> torch.Tensor:
        sizes.append(len(pixels))
        if len(pixels) > 3:
            raise torch.cuda.OutOfMemoryError("too much")
        return pixels.flatten(1)

    monkeypatch.setattr(embedder, "_forward_as", forward)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    pixels = torch.arange(10.0).reshape(10, 1, 1, 1)
    with caplog.at_level(logging.WARNING):
        assert embedder.embed(pixels).ravel().tolist() == list(range(10))
    assert sizes == [10, 5, 2, 3, 5, 2, 3]
    assert "trying 5" in caplog.text


def test_one_picture_that_does_not_fit_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path, {"a": 1})
    embedder = prepared(load(tmp_path))

    def forward(pixels: torch.Tensor, dtype: str) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("too much")

    monkeypatch.setattr(embedder, "_forward_as", forward)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        embedder.embed(torch.zeros(1, 1))


# --------------------------------------------------------------------------------------------------------------- rest


def test_random_weights_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_dataset(tmp_path, {"a": 1})
    with caplog.at_level(logging.WARNING):
        prepared(load(tmp_path))
    assert "random network" in caplog.text


def test_weights_from_a_file_and_their_identity(tmp_path: Path) -> None:
    import timm

    make_dataset(tmp_path, {"a": 2})
    torch.manual_seed(5)
    model = timm.create_model(TINY_MODEL)
    for name in ("one.pth", "two.pth"):
        torch.save(model.state_dict(), tmp_path / name)
        torch.nn.init.normal_(model.conv_head.weight)
    one = prepared(load(tmp_path), weights=tmp_path / "one.pth")
    two = prepared(load(tmp_path), weights=tmp_path / "two.pth")
    assert one.identity == hashlib.sha256((tmp_path / "one.pth").read_bytes()).hexdigest()
    assert one.fingerprint() != two.fingerprint()
    assert one.model() is not two.model()
    assert one.model() is prepared(load(tmp_path), weights=tmp_path / "one.pth").model()


def test_other_weights_under_the_same_name_on_a_worker(tmp_path: Path) -> None:
    import timm

    from nemo_image.engine.model_cache import clear_models
    from nemo_image.errors import WeightsError

    make_dataset(tmp_path, {"a": 1})
    torch.save(timm.create_model(TINY_MODEL).state_dict(), tmp_path / "weights.pth")
    embedder = prepared(load(tmp_path), weights=tmp_path / "weights.pth")
    clear_models()
    torch.save(timm.create_model(TINY_MODEL).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="on this machine"):
        embedder.model()


def test_reduced_pictures_make_other_embeddings(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 1})
    whole, reduced = prepared(load(tmp_path)), prepared(load(tmp_path), reduced_decode=True)
    assert whole.fingerprint() != reduced.fingerprint()
    assert reduced.preprocessor("cpu", 1).reduced_decode


@pytest.mark.parametrize("decoder", ["pillow", "dali"])
def test_a_decoder_that_cannot_reduce_is_refused_before_any_task(tmp_path: Path, decoder: Any) -> None:
    make_dataset(tmp_path, {"a": 1})
    with pytest.raises(ArgumentError, match="reduced_decode=True works with decoder='torchvision' alone"):
        prepared(load(tmp_path), reduced_decode=True, decoder=decoder)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++)")
def test_a_compiled_model_gives_the_same_embeddings(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 3})
    plain, compiled = prepared(load(tmp_path)), prepared(load(tmp_path), compile_model=True)
    assert type(compiled.model()).__name__ == "OptimizedModule"
    assert compiled.fingerprint() == plain.fingerprint()
    pixels = torch.randn(3, 3, *plain.preprocessor("cpu", 1).spec.crop)
    assert np.allclose(compiled.embed(pixels), plain.embed(pixels), atol=1e-4)


def test_a_machine_without_a_compiler_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path, {"a": 1})

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no g++")

    monkeypatch.setattr("nemo_image.embedders.forward.forward", fail)
    with pytest.raises(ArgumentError, match=r"compile_model=True: .*no g\+\+.*needs a C\+\+ compiler"):
        prepared(load(tmp_path), compile_model=True)


@pytest.mark.parametrize(
    ("model", "cpu"),
    [
        ("vit_base_patch32_clip_224.openai", 32),
        ("vit_large_patch14_clip_quickgelu_224.openai", 32),
        ("tf_efficientnet_lite0", 4),
        ("resnet50", 4),
        ("convnext_tiny", 4),
    ],
)
def test_batches_suit_the_model(model: str, cpu: int) -> None:
    embedder = TimmImageEmbedder(model)
    assert [embedder.batch_of(device) for device in ("cpu", "cuda", "cuda:1")] == [cpu, 256, 256]
    assert TimmImageEmbedder(model, batch_size=5).batch_of("cpu") == 5


def test_models_compute_channels_last(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 2})
    embedder = prepared(load(tmp_path))
    seen = []
    embedder.model().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    embedder.embed(torch.zeros(2, 3, *embedder.preprocessor("cpu", 1).spec.crop))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    weights = [one for one in embedder.model().parameters() if one.ndim == 4]
    assert weights
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in weights)


def test_the_decoder_is_no_part_of_the_fingerprint(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 1})
    one = prepared(load(tmp_path), decoder="pillow").fingerprint()
    assert one == prepared(load(tmp_path), decoder="torchvision").fingerprint()
    assert one != prepared(load(tmp_path), normalize_embeddings=False).fingerprint()
    assert one != prepared(load(tmp_path), embedding_dtype="float16").fingerprint()


def test_index_files_are_used_where_they_are_right(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 4, "b": 2})
    write_idx(index_tar(str(tmp_path / "a.tar")), str(tmp_path / "a.idx"))
    (tmp_path / "b.idx").write_text("v1.2 1\njpg 512 10 nosuch.jpg\n")
    plain = TimmImageEmbedder(TINY_MODEL, autocast=False)(load(tmp_path)).metadata.compute()
    indexed = TimmImageEmbedder(TINY_MODEL, autocast=False, use_index_files=True)(load(tmp_path)).metadata.compute()
    assert (to_matrix(plain["image_embedding"])[0] == to_matrix(indexed["image_embedding"])[0]).all()


def test_a_shard_through_the_public_methods(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 5})
    embedder = TimmImageEmbedder(TINY_MODEL, autocast=False, batch_size=2)
    model = embedder.load_embedding_model("cpu")
    vectors, keys = [], []
    for batch, metadata in embedder.load_dataset_shard(str(tmp_path / "a.tar")):
        with torch.inference_mode():
            vectors.append(model(batch).numpy())
        keys += [one["key"] for one in metadata]
    frame = embedder(load(tmp_path)).metadata.compute()
    made = np.concatenate(vectors)
    assert keys == frame["key"].tolist()
    wanted, _ = to_matrix(frame["image_embedding"])
    assert np.allclose(made / np.linalg.norm(made, axis=1, keepdims=True), wanted, atol=1e-6)


def test_no_normalising(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"a": 2})
    frame = TimmImageEmbedder(TINY_MODEL, autocast=False, normalize_embeddings=False)(load(tmp_path)).metadata.compute()
    norms = np.linalg.norm(to_matrix(frame["image_embedding"])[0], axis=1)
    assert (np.abs(norms - 1) > 1e-3).all()


def test_sizes_that_came_with_the_data_stay(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    make_dataset(tmp_path, {"a": 2})
    table = pq.read_table(tmp_path / "a.parquet").append_column("width", [[7, 8]])
    pq.write_table(table, tmp_path / "a.parquet")
    frame = TimmImageEmbedder(TINY_MODEL, autocast=False)(load(tmp_path)).save_metadata().metadata.compute()
    assert frame["width"].tolist() == [7, 8]
    assert frame["height"].tolist() == [48, 48]
