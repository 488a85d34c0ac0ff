"""Small stages that tests of the executor are made of."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from nemo_image.stages.base import ProcessingStage, RunContext
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.record import GroupRecord
from nemo_image.stages.tasks import EmptyTask, FileGroup, ImageBatch, Task


class Groups(ProcessingStage[EmptyTask, FileGroup]):
    """Gives groups of files that need not exist."""

    def __init__(self, count: int, folder: Path | None = None) -> None:
        self.count = count
        self.folder = folder

    def process(self, task: EmptyTask) -> list[FileGroup]:
        names = [f"g{number:02d}" for number in range(self.count)]
        if self.folder is None:
            return [FileGroup([], name=name) for name in names]
        return [FileGroup([str(self.folder / name)], name=name, root=str(self.folder)) for name in names]


class Images(ProcessingStage[FileGroup, ImageBatch]):
    """Gives batches of images that are numbers."""

    thread_safe = True

    def __init__(self, batches: int = 3, size: int = 4) -> None:
        self.batches = batches
        self.size = size

    def process(self, task: FileGroup) -> list[ImageBatch]:
        return [
            ImageBatch([ImageObject(image_id=f"{task.name}-{batch}-{number}") for number in range(self.size)])
            for batch in range(self.batches)
        ]


class Count(ProcessingStage[ImageBatch, ImageBatch]):
    """Notes what was called in which process."""

    def __init__(self, notes: Path) -> None:
        self.notes = notes

    def setup(self) -> None:
        (self.notes / f"setup-{os.getpid()}-{id(self)}").touch()

    def teardown(self) -> None:
        (self.notes / f"teardown-{os.getpid()}-{id(self)}").touch()

    def process(self, task: ImageBatch) -> ImageBatch:
        return task


class DropOdd(ProcessingStage[ImageBatch, ImageBatch]):
    """Drops every second image, and says so."""

    def process(self, task: ImageBatch) -> ImageBatch:
        kept = [image for image in task.data if int(image.image_id[-1]) % 2 == 0]
        self.log_metric("odd", len(task.data) - len(kept))
        return task.with_images(kept)


class Fail(ProcessingStage[ImageBatch, ImageBatch]):
    """Fails for images of some groups, at first or always."""

    def __init__(
        self, groups: tuple[str, ...], notes: Path | None = None, error: type[Exception] = RuntimeError
    ) -> None:
        self.groups = groups
        self.notes = notes
        self.error = error

    def process(self, task: ImageBatch) -> ImageBatch:
        name = task.data[0].image_id.partition("-")[0]
        if name in self.groups:
            seen = None if self.notes is None else self.notes / name
            if seen is None or not seen.exists():
                if seen is not None:
                    seen.touch()
                raise self.error(f"{name} does not work")
        return task


class Die(ProcessingStage[ImageBatch, ImageBatch]):
    """Kills its own process in the middle of a group: the first time, or every time."""

    def __init__(self, group: str, notes: Path, *, always: bool = False) -> None:
        self.group = group
        self.notes = notes
        self.always = always

    def process(self, task: ImageBatch) -> ImageBatch:
        if task.data[0].image_id.startswith(f"{self.group}-1"):
            seen = self.notes / "died"
            if self.always or not seen.exists():
                seen.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return task


class Names(ProcessingStage[ImageBatch, FileGroup]):
    """Writes the images' ids of a group to a file."""

    thread_safe = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def output_folder(self) -> str:
        return str(self.folder)

    def outputs_intact(self, outputs: Any) -> bool:
        return all(Path(name).exists() for one in outputs for name in one.data)

    def stream(self, tasks: Any, group: FileGroup) -> Any:
        ids = [image.image_id for task in tasks for image in task.data]
        target = self.folder / f"{group.name}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n".join(ids))
        yield FileGroup([str(target)], metadata={"rows": len(ids)})

    def finish(self, context: RunContext, finished: Any) -> dict[str, Any]:
        assert all(isinstance(one, GroupRecord) for one in finished)
        return {"files": len([name for one in finished for task in one.outputs for name in task.data])}


def ids_of(tasks: Any) -> list[str]:
    """Return the ids of the images in tasks."""
    return [image.image_id for task in tasks for image in task.data]


def made(task: Task[Any]) -> list[str]:
    """Return what a `Names` stage wrote."""
    return [line for name in task.data for line in Path(name).read_text().splitlines()]
