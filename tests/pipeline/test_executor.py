"""The executor: what runs where, how often, and what is said of it."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_image.engine.ledger import ShardRecord, read_ledgers
from nemo_image.errors import ArgumentError, DatasetError, PipelineError, RunError, ShardError, TooManyFailuresError
from nemo_image.pipeline import DaskExecutor, Pipeline
from nemo_image.stages.base import CompositeStage, ProcessingStage, Resources
from nemo_image.stages.filters import ImageSizeFilterStage
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.tasks import FileGroup, ImageBatch
from tests.pipeline.stages_of_tests import Count, Die, DropOdd, Fail, Groups, Images, Names, ids_of, made

THREADS = DaskExecutor(processes=False)


def executor(client: Any, **options: Any) -> DaskExecutor:
    return DaskExecutor(client, **options) if client is not None else DaskExecutor(processes=False, **options)


def expected(groups: int, kept: Any = lambda number: True) -> list[str]:
    return [
        f"g{one:02d}-{batch}-{number}"
        for one in range(groups)
        for batch in range(3)
        for number in range(4)
        if kept(number)
    ]


def test_stages_are_chained_in_order(scheduler: Any) -> None:
    pipeline = Pipeline("p", stages=[Groups(5), Images(), DropOdd()])
    results = pipeline.run(executor(scheduler))
    assert ids_of(results) == expected(5, lambda number: number % 2 == 0)
    assert results.groups == {"done": 5, "skipped": 0, "failed": 0}


def test_results_count_what_each_stage_did(scheduler: Any) -> None:
    results = Pipeline("p", stages=[Groups(5), Images(), DropOdd()]).run(executor(scheduler))
    images, drop = results.stages
    assert (images.name, images.tasks_in, images.tasks_out, images.items_out) == ("images", 5, 15, 60)
    assert (drop.name, drop.tasks_in, drop.items_in, drop.items_out) == ("drop_odd", 15, 60, 30)
    assert drop.metrics == {"odd": 30}
    assert results.stage("drop_odd") is drop
    with pytest.raises(KeyError, match="no stage 'x'; there are images, drop_odd"):
        results.stage("x")
    said = json.loads(json.dumps(results.to_dict()))
    assert [one["items_out"] for one in said["stages"]] == [60, 30]
    assert "drop_odd" in results.summary()
    assert "odd: 30" in results.summary()


def test_time_is_that_of_the_stage_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    results = Pipeline("p", stages=[Groups(1), Images(1), DropOdd(), DropOdd().with_(name="again")]).run(THREADS)
    # Each drawing of a task reads the clock twice, around what it draws from, which is not its own.
    assert [one.seconds for one in results.stages] == [2.0, 4.0, 4.0]


def test_setup_once_a_process_and_teardown_at_the_end(tmp_path: Path, cluster: Any) -> None:
    Pipeline("p", stages=[Groups(8), Images(), Count(tmp_path)]).run(DaskExecutor(cluster))
    setups = sorted(path.name.partition("-")[2] for path in tmp_path.glob("setup-*"))
    torn = sorted(path.name.partition("-")[2] for path in tmp_path.glob("teardown-*"))
    assert 1 <= len(setups) <= 2
    assert torn == setups


def test_one_thread_at_a_time_unless_it_says_that_it_is_safe() -> None:
    class Meet(ProcessingStage[ImageBatch, ImageBatch]):
        inside = 0
        most = 0

        def process(self, task: ImageBatch) -> ImageBatch:
            Meet.inside += 1
            Meet.most = max(Meet.most, Meet.inside)
            threading.Event().wait(0.01)
            Meet.inside -= 1
            return task

    Pipeline("p", stages=[Groups(4), Images(), Meet()]).run(THREADS)
    assert Meet.most == 1


def test_a_failed_group_leaves_the_others(tmp_path: Path, scheduler: Any) -> None:
    stages = [Groups(4), Images(), Fail(("g01",)), Names(tmp_path / "out")]
    with pytest.raises(
        RunError, match=r"1 of 4 groups failed.*g01.*stage fail: RuntimeError: g01 does not work"
    ) as caught:
        Pipeline("p", stages=stages).run(executor(scheduler, retries=0))
    assert list(caught.value.failures) == ["g01"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.txt")) == ["g00.txt", "g02.txt", "g03.txt"]


def test_errors_of_others_are_tried_again_and_ours_are_not(tmp_path: Path, scheduler: Any) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    results = Pipeline("p", stages=[Groups(3), Images(), Fail(("g01",), notes)]).run(executor(scheduler, retries=1))
    assert ids_of(results) == expected(3)
    with pytest.raises(RunError, match="g02 does not work"):
        Pipeline("p", stages=[Groups(3), Images(), Fail(("g02",), notes, ShardError)]).run(
            executor(scheduler, retries=3)
        )


def test_too_many_failures_stop_the_run() -> None:
    names = tuple(f"g{number:02d}" for number in range(30))
    with pytest.raises(TooManyFailuresError, match=r"more than max_failure_ratio=0\.05 of 30 allows") as caught:
        Pipeline("p", stages=[Groups(30), Images(), Fail(names)]).run(DaskExecutor(processes=False, retries=0))
    assert len(caught.value.failures) < 30


def test_a_worker_that_dies_changes_nothing(tmp_path: Path) -> None:
    from distributed import Client, LocalCluster

    clean = Pipeline("p", stages=[Groups(4), Images(), Names(tmp_path / "clean")]).run(THREADS)
    stages = [Groups(4), Images(), Die("g02", tmp_path), Names(tmp_path / "out")]
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as local,
        Client(local, set_as_default=False) as client,
    ):
        results = Pipeline("p", stages=stages).run(DaskExecutor(client))
    assert (tmp_path / "died").exists()
    assert [made(task) for task in results] == [made(task) for task in clean]
    assert not (tmp_path / "out" / "_nemo_image" / "attempts").exists()


def test_a_rerun_with_a_checkpoint_does_the_rest(tmp_path: Path, scheduler: Any) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for number in range(4):
        (source / f"g{number:02d}").write_text("x")
    notes = tmp_path / "notes"
    notes.mkdir()

    def run() -> Any:
        stages = [Groups(4, source), Images(), Fail(("g01",), notes), Names(tmp_path / "out")]
        return Pipeline("p", stages=stages).run(executor(scheduler, retries=0), checkpoint_path=tmp_path / "check")

    with pytest.raises(RunError):
        run()
    results = run()
    assert results.groups == {"done": 1, "skipped": 3, "failed": 0}
    assert [line for task in results for line in made(task)] == expected(4)
    assert results.finished["names"] == {"files": 4}
    assert results.stage("images").items_out == 48
    # What is gone, or was made of another file, is made again.
    (tmp_path / "out" / "g02.txt").unlink()
    (source / "g03").write_text("changed")
    assert run().groups == {"done": 2, "skipped": 2, "failed": 0}


def test_a_checkpoint_is_one_pipelines(tmp_path: Path) -> None:
    Pipeline("p", stages=[Groups(1), Images(), Names(tmp_path / "out")]).run(
        THREADS, checkpoint_path=tmp_path / "check"
    )
    other = Pipeline("p", stages=[Groups(1), Images(), DropOdd(), Names(tmp_path / "out")])
    with pytest.raises(DatasetError, match="is that of another pipeline"):
        other.run(THREADS, checkpoint_path=tmp_path / "check")
    with pytest.raises(PipelineError, match="'images', writes no files"):
        Pipeline("p", stages=[Groups(1), Images()]).run(THREADS, checkpoint_path=tmp_path / "check")


def test_the_ledger_accounts_for_every_image(tmp_path: Path) -> None:
    results = Pipeline("p", stages=[Groups(3), Images(), DropOdd(), Names(tmp_path)]).run(THREADS)
    (ledger,) = read_ledgers(str(tmp_path))
    *records, totals = ledger.lines()
    assert results.ledger == ledger.url
    assert ledger.kind == "pipeline"
    assert all(isinstance(one, ShardRecord) for one in records)
    assert len(records) == 3
    assert (totals["rows_in"], totals["rows_filtered"], totals["rows_out"]) == (36, 18, 18)  # type: ignore[index]


def test_a_writer_that_loses_an_image_is_found_out(tmp_path: Path) -> None:
    from nemo_image.engine.ledger import LedgerError

    class Lossy(Names):
        def stream(self, tasks: Any, group: FileGroup) -> Any:
            for one in super().stream(tasks, group):
                one.metadata["rows"] -= 1
                yield one

    with pytest.raises(LedgerError, match="12 rows in"):
        Pipeline("p", stages=[Groups(1), Images(), Lossy(tmp_path)]).run(THREADS)


def test_initial_tasks() -> None:
    batches = [
        ImageBatch([ImageObject(image_id=f"{number}0"), ImageObject(image_id=f"{number}1")]) for number in range(3)
    ]
    results = Pipeline("p", stages=[DropOdd()]).run(THREADS, initial_tasks=batches)
    assert ids_of(results) == ["00", "10", "20"]
    groups = Pipeline("p", stages=[Images(1, 1)]).run(THREADS, initial_tasks=[FileGroup(["x"]), FileGroup(["y"])])
    assert ids_of(groups) == ["group-000000-0-0", "group-000001-0-0"]
    with pytest.raises(ArgumentError, match="two file groups have the name 'a'"):
        Pipeline("p", stages=[Images()]).run(THREADS, initial_tasks=[FileGroup(name="a"), FileGroup(name="a")])


def test_a_composite_stage_is_its_parts() -> None:
    class Both(CompositeStage[FileGroup, ImageBatch]):
        def decompose(self) -> list[ProcessingStage[Any, Any]]:
            return [Images(), DropOdd()]

    results = Pipeline("p", stages=[Groups(2), Both()]).run(THREADS)
    assert [one.name for one in results.stages] == ["images", "drop_odd"]
    assert ids_of(results) == expected(2, lambda number: number % 2 == 0)


def test_stages_of_one_name_are_told_apart() -> None:
    results = Pipeline("p", stages=[Groups(1), Images(), DropOdd(), DropOdd()]).run(THREADS)
    assert [(one.name, one.items_out) for one in results.stages] == [("images", 12), ("drop_odd", 6), ("drop_odd_2", 6)]


def test_without_a_gpu_its_share_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    wants = DropOdd().with_(resources=Resources(gpus=0.25))
    results = Pipeline("p", stages=[Groups(3), Images(), wants]).run(THREADS)
    assert len(results) == 9
    assert [one.message for one in caplog.records if "no GPU" in one.message] == [
        "no GPU on the workers: drop_odd use the CPU"
    ]


def test_no_stage_behind_the_source() -> None:
    with pytest.raises(PipelineError, match="no stage behind 'groups'"):
        Pipeline("p", stages=[Groups(1)]).run(THREADS)


def test_nothing_to_do() -> None:
    results = Pipeline("p", stages=[Groups(0), Images()]).run(THREADS)
    assert (len(results), results.groups) == (0, {"done": 0, "skipped": 0, "failed": 0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retries": -1}, "retries"),
        ({"max_failure_ratio": 2}, "max_failure_ratio"),
        ({"client": object(), "n_workers": 2}, "give a client, or n_workers"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        DaskExecutor(**options)


def test_a_cluster_of_its_own_ends_with_the_run(tmp_path: Path) -> None:
    import psutil

    before = {child.pid for child in psutil.Process().children(recursive=True)}
    results = Pipeline("p", stages=[Groups(4), Images(), Count(tmp_path)]).run(DaskExecutor(n_workers=2))
    assert ids_of(results) == expected(4)
    import os

    pids = {path.name.split("-")[1] for path in tmp_path.glob("setup-*")}
    assert pids
    assert str(os.getpid()) not in pids
    after = {child.pid for child in psutil.Process().children(recursive=True) if "spawn_main" in str(child.cmdline())}
    assert after <= before


class Pixels(ProcessingStage[ImageBatch, ImageBatch]):
    """Says which images hold decoded pixels."""

    name = "pixels"

    def process(self, task: ImageBatch) -> ImageBatch:
        self.log_metric("held", sum(image._pixels is not None for image in task.data))
        return task


@pytest.mark.parametrize("frees", [False, True])
def test_any_stage_frees_pixels(frees: bool) -> None:
    stages = [Groups(2), Images(), Draw(), ImageSizeFilterStage(remove_image_data=frees), Pixels()]
    results = Pipeline("p", stages=stages).run(THREADS)
    assert results.stage("pixels").metrics.get("held", 0) == (0 if frees else 24)
    own = DropOdd()
    own.remove_image_data = frees
    results = Pipeline("p", stages=[Groups(2), Images(), Draw(), own, Pixels()]).run(THREADS)
    assert results.stage("pixels").metrics.get("held", 0) == (0 if frees else 12)


class Draw(ProcessingStage[ImageBatch, ImageBatch]):
    """Gives each image pixels."""

    def process(self, task: ImageBatch) -> ImageBatch:
        for image in task.data:
            image.image_data = np.zeros((4, 4, 3), np.uint8)
            image.width = image.height = 4
        return task
