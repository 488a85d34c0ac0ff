"""What tests of the writer share: batches of a tar's samples, and a run without an executor."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nemo_image.shards.read import ShardReader
from nemo_image.stages.base import ProcessingStage, RunContext, collecting_metrics
from nemo_image.stages.image_object import ImageObject, SampleSource
from nemo_image.stages.record import GroupRecord
from nemo_image.stages.tasks import FileGroup, ImageBatch
from nemo_image.stages.writer import ImageWriterStage
from tests.makers import encoded, picture, write_tar

Batches = list[ImageBatch]


def tar_images(
    tar: Path, rows: Sequence[Mapping[str, Any]] | None = None, held: Iterable[str] = ()
) -> list[ImageObject]:
    """Return a tar's samples as images: with the files `held` at hand, and the rest in the tar."""
    with ShardReader(str(tar)) as reader:
        images = []
        for number, sample in enumerate(reader.index.samples):
            image = ImageObject(
                image_path=f"{tar}/{sample.key}",
                image_id=sample.key,
                caption=reader.read_caption(sample),
                metadata=dict(rows[number]) if rows is not None else reader.read_json(sample) or {},
                shard=tar.stem,
                source=SampleSource(str(tar), sample),
            )
            image.files = {one.extension: reader.read(one) for one in sample.members if one.extension in held}
            images.append(image)
        return images


def in_batches(images: Iterable[ImageObject], size: int, fields: pa.Schema | None = None) -> Batches:
    """Cut images into batches."""
    rest = iter(images)
    made = []
    while some := list(islice(rest, size)):
        made.append(ImageBatch(some, fields=pa.schema([]) if fields is None else fields))
    return made


def plain_tar(path: Path, keys: Iterable[str], first: int = 0) -> list[ImageObject]:
    """Write a tar of small samples under the keys given; return its images."""
    samples = []
    for number, key in enumerate(keys, first):
        fields = {"key": key, "seed": number}
        jpg = encoded(picture(number, 8, 8), quality=50)
        samples.append((key, {"jpg": jpg, "txt": f"caption {number}".encode(), "json": json.dumps(fields).encode()}))
    write_tar(path, samples)
    return tar_images(path)


class Makes(ProcessingStage[ImageBatch, ImageBatch]):
    """A stage that says it makes columns."""

    def __init__(self, **columns: Mapping[str, Any]) -> None:
        self.columns = columns

    def column_fingerprints(self) -> Mapping[str, Mapping[str, Any]]:
        return self.columns


class Run:
    """A run of the writer alone over groups of batches.

    Parameters
    ----------
    groups : dict of str to list of ImageBatch, or Exception
        Batches by the group's name; in place of a batch, an exception to raise.
    order : list of str, optional
        In which groups are worked on.
    """

    def __init__(
        self,
        stage: ImageWriterStage,
        groups: Mapping[str, Sequence[ImageBatch | Exception]],
        *,
        token: str = "token",
        order: Sequence[str] | None = None,
        checkpoint: str | None = None,
        earlier: Sequence[ProcessingStage[Any, Any]] = (),
        inputs: Sequence[str] = (),
        root: str = "",
    ) -> None:
        named = {
            name: FileGroup(name=name, index=index, data=list(inputs), root=root) for index, name in enumerate(groups)
        }
        context = RunContext("test", list(named.values()), checkpoint_path=checkpoint, token=token)
        self.stage = stage.prepare(context)
        self.stage.connect(earlier, [])
        self.records: dict[str, GroupRecord] = {}
        self.metrics: Counter[str] = Counter()
        for name in order or groups:
            with collecting_metrics() as metrics:
                record = self._work(named[name], groups[name])
            self.metrics += metrics[self.stage.name]
            self.records[name] = GroupRecord.from_dict(json.loads(json.dumps(record.to_dict())))
        done = [self.records[name] for name in groups if self.records[name].status == "done"]
        self.said = self.stage.finish(context, done)

    def _work(self, group: FileGroup, batches: Sequence[ImageBatch | Exception]) -> GroupRecord:
        def drawn() -> Any:
            for one in batches:
                if isinstance(one, Exception):
                    raise one
                yield one

        record = GroupRecord(group.name, group.index)
        try:
            record.outputs = list(self.stage.stream(drawn(), group))
        except ZeroDivisionError as error:
            record.status, record.error = "failed", str(error)
        return record


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder by their relative names."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows(path: Path) -> list[dict[str, Any]]:
    """Return a Parquet file's rows."""
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def tars(folder: Path) -> list[str]:
    """Return the names of a folder's shards, sorted by name."""
    return sorted(path.stem for path in folder.glob("*.tar"))
