"""The last step of a pipeline: what file groups have left over is packed into full tars, in the groups' order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa

from nemo_image import schema
from nemo_image.engine.run import run_tasks
from nemo_image.errors import MetadataFileError, RunError, TarError, one_line
from nemo_image.shards import parquet
from nemo_image.shards.read import ShardReader
from nemo_image.shards.write import TarWriter
from nemo_image.stages.writing.group_output import Remainder
from nemo_image.stages.writing.output_folder import PACKED
from nemo_image.stages.writing.output_keys import OutputKeys
from nemo_image.stages.writing.rows import ORIGINAL_KEY, ORIGINAL_SHARD, merged
from nemo_image.stages.writing.sample_members import copied, write_sample
from nemo_image.stages.writing.shard_output import REMAINDERS, OutputSettings, complete_shard, tar_output

_NAMED = 10


class Take(NamedTuple):
    """Rows taken from what a group has left over."""

    remainder: Remainder
    start: int
    stop: int


@dataclass(frozen=True)
class PackItem:
    """A tar to pack, and of what."""

    shard: str
    takes: tuple[Take, ...]


@dataclass(frozen=True)
class Packed:
    """What became of a tar to pack; `error` says why it was not packed."""

    shard: str
    rows: int = 0
    renamed: int = 0
    error: str | None = None


def plan(remainders: Sequence[Remainder], images_per_tar: int) -> Iterator[PackItem]:
    """Yield the tars to pack: all full, but for the last one."""
    takes: list[Take] = []
    number = wanted = 0
    for one in remainders:
        start = 0
        while start < one.rows:
            wanted = wanted or images_per_tar
            stop = min(one.rows, start + wanted)
            takes.append(Take(one, start, stop))
            wanted -= stop - start
            start = stop
            if not wanted:
                yield PackItem(f"{PACKED}-{number:05d}", tuple(takes))
                takes, number = [], number + 1
    if takes:
        yield PackItem(f"{PACKED}-{number:05d}", tuple(takes))


def pack(settings: OutputSettings, remainders: Sequence[Remainder]) -> list[Packed]:
    """Pack what groups have left over, one task a tar; return what was packed, in order.

    Raises
    ------
    RunError
        After the other tars are packed, if some could not be: lists them with their causes.
    """
    total = sum(one.rows for one in remainders)
    tars = -(-total // settings.images_per_tar)
    found: dict[str, Packed] = {}
    for packed in run_tasks(
        PackTar(settings),
        plan(remainders, settings.images_per_tar),
        on_error=lambda item, error: Packed(item.shard, error=one_line(error)),
        count=tars,
    ):
        found[packed.shard] = packed
    failures = {shard: one.error for shard, one in sorted(found.items()) if one.error is not None}
    if failures:
        causes = [f"{shard}: {cause}" for shard, cause in list(failures.items())[:_NAMED]]
        raise RunError(
            f"{len(failures)} of the {tars} tars of what file groups had left over could not be packed; all other "
            "files are finished. " + "; ".join(causes),
            failures,
        )
    return [found[shard] for shard in sorted(found)]


class PackTar:
    """Packs a tar; returns what became of it, whatever happens."""

    task_name = "nemo-image-pack"

    def __init__(self, settings: OutputSettings) -> None:
        self.settings = settings

    def __call__(self, item: PackItem) -> Packed:
        """Pack one tar, unless an earlier run packed the same."""
        try:
            said = {"parts": [[*take[1:], take.remainder.digest] for take in item.takes]}
            done = self._done(item.shard, said)
            return self._pack(item, said) if done is None else done
        except Exception as error:
            return Packed(item.shard, error=one_line(error))

    def _done(self, shard: str, said: dict[str, Any]) -> Packed | None:
        """Return what an earlier run packed, if all of it is still there."""
        settings = self.settings
        summary = parquet.summary_or_none(settings.url(f"{shard}.parquet"), settings.storage_options)
        footer = None if summary is None else summary.footer
        if summary is None or footer is None or footer.plan != settings.token:
            return None
        if footer.record.get("parts") != said["parts"] or settings.size(f"{shard}.tar") != (footer.source or {}).get(
            "size"
        ):
            return None
        if footer.idx_size is not None and settings.size(f"{shard}.idx") != footer.idx_size:
            return None
        return Packed(shard, summary.rows, footer.record["renamed"])

    def _pack(self, item: PackItem, said: dict[str, Any]) -> Packed:
        keys = OutputKeys()
        tables: list[pa.Table] = []
        given: list[str] = []
        with tar_output(self.settings, f"{item.shard}.tar") as tar:
            for take in item.takes:
                table = self._rows(take)
                given += self._copy(take.remainder, table, tar.writer, keys)
                tables.append(table)
        table = merged(tables, item.shard, given, self.settings.columns)
        renamed = sum(new != old for new, old in zip(given, table[ORIGINAL_KEY].to_pylist(), strict=True))
        complete_shard(self.settings, item.shard, tar.index, table, {**said, "renamed": renamed})
        return Packed(item.shard, len(table), renamed)

    def _rows(self, take: Take) -> pa.Table:
        left = take.remainder
        url = self.settings.url(f"{REMAINDERS}/{left.name}.parquet")
        table = parquet.read_table(url, None, self.settings.storage_options)
        if len(table) != left.rows:
            raise MetadataFileError(
                f"{url} has {len(table)} rows, its group left over {left.rows}: another run has written there; run "
                "again"
            )
        return table.slice(take.start, take.stop - take.start)

    def _copy(self, left: Remainder, table: pa.Table, writer: TarWriter, keys: OutputKeys) -> list[str]:
        """Copy the samples that rows name; return the keys that they got."""
        url = self.settings.url(f"{REMAINDERS}/{left.name}.tar")
        given = []
        with ShardReader(url, self.settings.storage_options) as reader:
            by_key = {sample.key: sample for sample in reader.index.samples}
            names: list[str] = table[schema.KEY].to_pylist()
            missing = [name for name in names if name not in by_key]
            if missing:
                raise TarError(f"{url} has no sample {missing[0]!r}, which its rows name: run the pipeline again")
            samples = [by_key[name] for name in names]
            contents = copied(reader, [member for sample in samples for member in sample.members])
            shards = table[ORIGINAL_SHARD].to_pylist()
            for sample, shard in zip(samples, shards, strict=True):
                key = keys.give(sample.key, shard)
                write_sample(writer, key, sample.key, islice(contents, len(sample.members)))
                given.append(key)
        return given
