"""Whole pipelines over tars: against the dataset interface, under deaths, and what others read of the output."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import TimmImageEmbedder
from nemo_image.engine.ledger import read_ledgers
from nemo_image.errors import RunError
from nemo_image.pipeline import DaskExecutor, Pipeline
from nemo_image.stages import (
    FilePartitioningStage,
    ImageBatch,
    ImageEmbeddingStage,
    ImageFilterStage,
    ImageObject,
    ImageReaderStage,
    ImageWriterStage,
    ProcessingStage,
)
from tests.makers import TINY_MODEL, make_dataset, sample, tar_members, write_tar

SIZES = {"00000": 11, "00001": 7, "00002": 13}
THREADS = DaskExecutor(processes=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("source"), SIZES)


class EvenSeeds(ImageFilterStage):
    """Keeps every second picture, by its metadata."""

    def keep(self, image: ImageObject) -> bool:
        return bool(image.metadata["seed"] % 2 == 0)


class DieOnce(ProcessingStage[ImageBatch, ImageBatch]):
    """Kills its process when it sees a picture, the first time."""

    def __init__(self, seed: int, mark: Path) -> None:
        self.seed = seed
        self.mark = mark

    def process(self, task: ImageBatch) -> ImageBatch:
        if any(image.metadata["seed"] == self.seed for image in task.data) and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return task


def curation(source: Path, target: Path, *more: Any, **options: Any) -> Pipeline:
    return Pipeline(
        "curation",
        stages=[
            FilePartitioningStage(str(source)),
            ImageReaderStage(batch_size=4, verbose=False),
            ImageEmbeddingStage(
                model_name=TINY_MODEL,
                random_weights=True,
                autocast=False,
                num_gpus_per_worker=0,
                model_inference_batch_size=5,
            ),
            *more,
            ImageWriterStage(str(target), images_per_tar=6, **options),
        ],
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Return an output's files by name, without the records of runs."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "_nemo_image" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_the_same_embeddings_as_the_dataset_interface(source: Path, tmp_path: Path, scheduler: Any) -> None:
    executor = DaskExecutor(scheduler) if scheduler is not None else THREADS
    curation(source, tmp_path / "out").run(executor)
    made = (
        ImageTextPairDataset.from_webdataset(str(tmp_path / "out"))
        .metadata.compute()
        .set_index("original_key")
        .sort_index()
    )
    embedder = TimmImageEmbedder(TINY_MODEL, autocast=False, batch_size=5)
    dataset = embedder(ImageTextPairDataset.from_webdataset(str(source)))
    expected = dataset.metadata.compute(scheduler="synchronous").set_index("key").sort_index()
    assert made.index.tolist() == expected.index.tolist()
    assert np.array_equal(np.stack(made["image_embedding"]), np.stack(expected["image_embedding"]))
    for column in ("caption", "seed", "score", "width", "height"):
        assert made[column].tolist() == expected[column].tolist()


def test_others_read_the_output(source: Path, tmp_path: Path) -> None:
    results = curation(source, tmp_path / "out", EvenSeeds()).run(THREADS)
    kept = [seed for seed in range(sum(SIZES.values())) if seed % 2 == 0]
    tars = sorted((tmp_path / "out").glob("*.tar"))
    assert sorted(len({name.split(".")[0] for name in tar_members(tar)}) for tar in tars)[1:] == [6, 6]
    assert results.finished["image_writer"]["rows"] == len(kept) == 16
    # In a process of its own: webdataset leaves its files open, which would be a warning here.
    code = (
        "import json, sys, webdataset\n"
        "for one in webdataset.WebDataset(sys.argv[1:], shardshuffle=False):\n"
        "    print(json.dumps([int(one['__key__']), one['txt'].decode()]))"
    )
    arguments = [sys.executable, "-c", code, *map(str, tars)]
    read = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.splitlines()
    assert sorted(json.loads(line) for line in read) == [[seed, f"picture number {seed}"] for seed in kept]
    before = {name: data for tar in source.glob("*.tar") for name, data in tar_members(tar).items()}
    after = {name: data for tar in tars for name, data in tar_members(tar).items()}
    assert after == {name: data for name, data in before.items() if int(name.split(".")[0]) in kept}
    tables = pd.concat([pd.read_parquet(tar.with_suffix(".parquet")) for tar in tars])
    assert sorted(tables["seed"]) == kept


def test_the_output_does_not_depend_on_the_workers(source: Path, tmp_path: Path, cluster: Any) -> None:
    curation(source, tmp_path / "one", EvenSeeds()).run(THREADS)
    curation(source, tmp_path / "two", EvenSeeds()).run(DaskExecutor(cluster))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_worker_killed_in_the_middle_changes_no_byte(source: Path, tmp_path: Path) -> None:
    from distributed import Client, LocalCluster

    mark = tmp_path / "died"
    mark.touch()
    curation(source, tmp_path / "clean", DieOnce(14, mark)).run(THREADS)
    mark.unlink()
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as local,
        Client(local, set_as_default=False) as client,
    ):
        curation(source, tmp_path / "out", DieOnce(14, mark)).run(DaskExecutor(client))
    assert mark.exists()
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_all_killed_and_run_again_does_the_rest(source: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from tests.pipeline.test_curation import THREADS, DieOnce, curation
        deadly = DieOnce(20, Path({str(tmp_path / "died")!r}))
        pipeline = curation(Path({str(source)!r}), Path({str(tmp_path / "out")!r}), deadly)
        from nemo_image.engine import threads
        threads.cpu_count = lambda: 1  # one group after the other
        print(pipeline.run(THREADS, checkpoint_path={str(tmp_path / "check")!r}).groups)
        """)
    )
    command = [sys.executable, str(script)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    first = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert first.returncode == -signal.SIGKILL, first.stderr
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert second.stdout.strip() == "{'done': 1, 'skipped': 2, 'failed': 0}"
    curation(source, tmp_path / "clean", DieOnce(20, tmp_path / "died")).run(THREADS)
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_more_input_later(source: Path, tmp_path: Path) -> None:
    """With a checkpoint, tars that come later are worked on alone, and the result is that of a run over all."""
    growing = tmp_path / "in"
    growing.mkdir()

    def bring(*names: str) -> None:
        for name in names:
            for suffix in (".tar", ".parquet"):
                os.link(source / (name + suffix), growing / (name + suffix))

    bring("00000", "00002")
    curation(growing, tmp_path / "out").run(THREADS, checkpoint_path=tmp_path / "check")
    bring("00001")
    results = curation(growing, tmp_path / "out").run(THREADS, checkpoint_path=tmp_path / "check")
    assert results.groups == {"done": 1, "skipped": 2, "failed": 0}
    curation(growing, tmp_path / "clean").run(THREADS)
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")
    assert sum(len(pd.read_parquet(path)) for path in (tmp_path / "out").glob("*.parquet")) == 31


def test_a_bad_tar_fails_its_group_and_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=r"1 of 3 groups failed.*00001\.tar"):
        curation(folder, tmp_path / "out").run(THREADS, checkpoint_path=tmp_path / "check")
    assert not any(name.startswith("00001") for name in contents(tmp_path / "out"))
    (folder / "00001.tar").write_bytes(whole)
    results = curation(folder, tmp_path / "out").run(THREADS, checkpoint_path=tmp_path / "check")
    assert results.groups == {"done": 1, "skipped": 2, "failed": 0}
    curation(folder, tmp_path / "clean").run(THREADS)
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


@pytest.mark.parametrize(("on_error", "rows"), [("skip", 3), ("keep", 4)])
def test_every_image_is_accounted_for(tmp_path: Path, on_error: Any, rows: int) -> None:
    samples = [sample(number, f"{number}", "text") for number in range(4)]
    samples[2][1]["jpg"] = samples[2][1]["jpg"][:100]
    write_tar(tmp_path / "in" / "a.tar", samples)
    pipeline = Pipeline(
        "p",
        stages=[
            FilePartitioningStage(str(tmp_path / "in")),
            ImageReaderStage(on_error=on_error),
            ImageEmbeddingStage(model_name=TINY_MODEL, random_weights=True, autocast=False),
            ImageWriterStage(str(tmp_path / "out")),
        ],
    )
    results = pipeline.run(THREADS)
    (ledger,) = read_ledgers(str(tmp_path / "out"))
    *_, totals = ledger.lines()
    assert isinstance(totals, dict)
    assert (totals["rows_in"], totals["rows_out"]) == (4, rows)
    assert sum(totals["losses"].values()) == 4 - rows
    assert sum(totals["failures"].values()) == 1
    table = pd.read_parquet(next((tmp_path / "out").glob("*.parquet"))).sort_values("key")
    assert table["key"][table["image_error"].notna()].tolist() == (["2"] if on_error == "keep" else [])
    assert table["image_embedding"].notna().sum() == 3
    assert results.stage("image_reader").metrics.get("skipped", 0) == 4 - rows


def test_a_stage_that_looks_at_pixels_sees_them_decoded(source: Path, tmp_path: Path) -> None:
    class Mean(ProcessingStage[ImageBatch, ImageBatch]):
        def inputs(self) -> Any:
            return ["data"], ["image_data"]

        def process(self, task: ImageBatch) -> ImageBatch:
            for image in task.data:
                assert image.holds_pixels
                assert image.image_data is not None
                image.metadata["mean"] = float(image.image_data.mean())
            return task

    curation(source, tmp_path / "plain").run(THREADS)
    curation(source, tmp_path / "out", Mean().with_(name="brightness")).run(THREADS)
    made = pd.concat([pd.read_parquet(path) for path in (tmp_path / "out").glob("*.parquet")]).sort_values("key")
    pictures = {
        name: data for tar in source.glob("*.tar") for name, data in tar_members(tar).items() if name.endswith("jpg")
    }
    expected = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).mean() for _, data in sorted(pictures.items())]
    assert np.allclose(made["mean"], expected)
    # The embedder went on from those pixels, to the same embeddings.
    plain = pd.concat([pd.read_parquet(path) for path in (tmp_path / "plain").glob("*.parquet")]).sort_values("key")
    assert np.array_equal(np.stack(made["image_embedding"]), np.stack(plain["image_embedding"]))


def test_scores_alone_serve_as_a_sidecar(source: Path, tmp_path: Path) -> None:
    curation(source, tmp_path / "scores", write_images=False).run(THREADS)
    dataset = ImageTextPairDataset.from_webdataset(str(source), sidecars=[str(tmp_path / "scores")])
    made = dataset.metadata[["seed", "image_embedding"]].compute(scheduler="synchronous")
    assert len(made) == 31
    assert made["image_embedding"].notna().all()


def test_the_ledger_agrees_with_the_files_and_says_when_not(source: Path, tmp_path: Path) -> None:
    from nemo_image.reports.ledger import inspect_ledgers

    def problems(folder: Path) -> list[str]:
        return [one for report in inspect_ledgers(str(folder))["folders"] for one in report["problems"]]

    for name, options in (("out", {}), ("scores", {"write_images": False})):
        curation(source, tmp_path / name, EvenSeeds(), **options).run(THREADS)
        report = inspect_ledgers(str(tmp_path / name))["folders"][0]
        (run,) = report["runs"]
        assert (run["rows_in"], run["rows_filtered"], run["rows_out"]) == (31, 15, 16)
        assert report["on_disk"]["rows_by_pipelines"] == 16
        assert not problems(tmp_path / name)
    next((tmp_path / "out").glob("packed-*.parquet")).unlink()
    assert any("says 16 rows" in problem for problem in problems(tmp_path / "out"))
