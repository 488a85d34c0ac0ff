"""Lists of ids to remove: checked on the client, and read by tasks as far as they need them."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from dask.base import tokenize

from nemo_image import schema
from nemo_image.datasets.footers import each
from nemo_image.datasets.parquet_folder import list_parquets
from nemo_image.engine.model_cache import ModelSpec, get_model
from nemo_image.errors import DatasetError, IdMismatchError, MissingColumnError
from nemo_image.shards import files, parquet
from nemo_image.stages.removing.id_set import Ids

NAMED_AT_MOST = 3


@dataclass(frozen=True)
class RemovalList:
    """A folder of Parquet files with ids. Small: each task carries one.

    Attributes
    ----------
    root : str
    names : list of str
        The files that have rows, below the root.
    id_field : str
    by_shard : bool
        Whether the files say each id's shard.
    rows : int
    token : str
        Tells the files from later versions.
    storage_options : dict
    """

    root: str
    names: Sequence[str]
    id_field: str
    by_shard: bool
    rows: int
    token: str
    storage_options: Mapping[str, Any]

    @classmethod
    def open(
        cls, root: str, id_field: str, shards: Sequence[str] = (), storage_options: files.StorageOptions = None
    ) -> RemovalList:
        """Look at the footers of the files in and below a folder, and check them.

        Parameters
        ----------
        shards : sequence of str
            Those of the run.

        Raises
        ------
        DatasetError
            If there is no such folder or no file, or some files say shards and others not, or none of the run's.
        MissingColumnError
            If a file has no column `id_field`.
        IdMismatchError
            If ids or shards are null, or are none.
        """
        options = dict(storage_options or {})
        if not files.exists(root, options):
            raise DatasetError(f"{root}: no such folder (removal_parquets_dir)")
        if not files.is_folder(root, options):
            raise DatasetError(f"{root} is a file: give the folder of the Parquet files (removal_parquets_dir)")
        names = list_parquets(root, options)
        if not names:
            raise DatasetError(f"{root} holds no Parquet file: give the folder of the ids to remove")
        looking = _Look(root, id_field, options)
        looked_at = each(looking, names, root, options)
        found = [one for one in looked_at if one.rows]
        with_shard = [one.name for one in found if one.has_shard]
        without = [one.name for one in found if not one.has_shard]
        if with_shard and without:
            raise DatasetError(
                f"{root}: {with_shard[0]} has a column {schema.SHARD!r} and {without[0]} has none: give files "
                "of one kind"
            )
        identities = [files.identify(files.join(root, one.name), options).to_dict() for one in found]
        made = cls(
            root,
            [one.name for one in found],
            id_field,
            bool(with_shard),
            sum(one.rows for one in found),
            str(tokenize(root, id_field, [one.name for one in found], identities)),
            options,
        )
        if made.by_shard and shards:
            made._require_known(sorted(shards), looked_at)
        return made

    def ids(self) -> Ids:
        """Return all ids; one copy of them a process."""
        return get_model(self._spec("all"), self._read_all)

    def ids_of(self, shard: str) -> Ids:
        """Return the ids of one shard, of which only the row groups that may hold them are read."""
        groups: Sequence[_Group] = get_model(self._spec("groups"), self._read_groups)
        columns = []
        for group in groups:
            if group.may_hold(shard):
                table = self._read(group)
                columns.append(table.filter(pc.equal(_plain(table[schema.SHARD]), shard))[self.id_field])
        return Ids.of(columns)

    def _spec(self, what: str) -> ModelSpec:
        return ModelSpec("ids to remove", self.root, self.token, "", "cpu", (what,))

    def _read_all(self) -> Ids:
        return Ids.of(
            parquet.read_table(files.join(self.root, name), [self.id_field], self.storage_options)[self.id_field]
            for name in self.names
        )

    def _read_groups(self) -> list[_Group]:
        looking = _Look(self.root, self.id_field, self.storage_options)
        return [group for name in self.names for group in looking(name).groups]

    def _read(self, group: _Group) -> pa.Table:
        url = files.join(self.root, group.name)
        file = parquet.open_parquet(url, self.storage_options)
        try:
            with parquet.reading(url):
                return file.read_row_group(group.number, columns=[schema.SHARD, self.id_field], use_threads=False)
        finally:
            file.close(force=True)

    def _require_known(self, shards: Sequence[str], looked_at: Sequence[_File]) -> None:
        """Raise if the list says nothing of any of the run's shards, which are sorted."""
        if any(one.covers_any(shards) for one in looked_at):
            return
        said: list[str] = []
        for name in self.names:
            column = parquet.read_table(files.join(self.root, name), [schema.SHARD], self.storage_options)
            names = pc.unique(_plain(column[schema.SHARD])).to_pylist()
            if not set(shards).isdisjoint(names):
                return
            said += names[: NAMED_AT_MOST - len(said)]
        raise DatasetError(
            f"{self.root}: none of the shards that it names ({', '.join(map(repr, said))}, …) is one of this run's "
            f"({', '.join(map(repr, shards[:NAMED_AT_MOST]))}, …): a shard is a tar's path below the input "
            "folder, without .tar; give the input folder of which the list was made"
        )


@dataclass(frozen=True)
class _Group:
    """A row group, and the first and last of its shards (None where they are not known)."""

    name: str
    number: int
    first: str | None
    last: str | None

    def may_hold(self, shard: str) -> bool:
        return self.first is None or self.last is None or self.first <= shard <= self.last


@dataclass(frozen=True)
class _File:
    """What a file's footer says."""

    name: str
    rows: int
    has_shard: bool
    groups: Sequence[_Group]
    covered: tuple[str, str] | None

    def covers_any(self, shards: Sequence[str]) -> bool:
        """Tell whether the file was made of rows of any of some sorted shards, whether any of them is in it or not."""
        if self.covered is None:
            return False
        place = bisect.bisect_left(shards, self.covered[0])
        return place < len(shards) and shards[place] <= self.covered[1]


@dataclass(frozen=True)
class _Look:
    """Reads and checks the footer of a file."""

    root: str
    id_field: str
    storage_options: files.StorageOptions

    def __call__(self, name: str) -> _File:
        url = files.join(self.root, name)
        summary = parquet.read_summary(url, self.storage_options)
        names = summary.schema.names
        if self.id_field not in names:
            raise MissingColumnError(
                f"{url} has no column {self.id_field!r} (duplicate_id_field); it has {', '.join(names)}"
            )
        has_shard = schema.SHARD in names
        if summary.rows:
            self._check_type(url, summary.schema.field(self.id_field).type)
        groups: list[_Group] = []
        nulls: dict[str, int | None] = {}
        file = parquet.open_parquet(url, self.storage_options)
        try:
            with parquet.reading(url):
                for number in range(file.metadata.num_row_groups):
                    said = _statistics(file.metadata.row_group(number), [self.id_field, schema.SHARD])
                    for column, one in said.items():
                        known = None if one is None else one.null_count
                        before = nulls.get(column, 0)
                        nulls[column] = None if known is None or before is None else before + known
                    groups.append(_Group(name, number, *_bounds(said.get(schema.SHARD))))
        finally:
            file.close(force=True)
        self._require_values(url, nulls)
        record = {} if summary.footer is None else summary.footer.record
        covered = (record["first"], record["last"]) if {"first", "last"} <= {*record} else None
        return _File(name, summary.rows, has_shard, groups, covered)

    def _check_type(self, url: str, kind: pa.DataType) -> None:
        plain = schema.plain_type(kind)
        if not (pa.types.is_string(plain) or pa.types.is_integer(plain) or pa.types.is_floating(plain)):
            raise IdMismatchError(f"{url}: column {self.id_field!r} holds {kind}; ids are strings or integers")

    def _require_values(self, url: str, nulls: Mapping[str, int | None]) -> None:
        """Raise if a row says no id, or no shard; where the footer does not say, the column is read."""
        for column, known in nulls.items():
            count = known
            if count is None:
                count = parquet.read_table(url, [column], self.storage_options)[column].null_count
            if count:
                raise IdMismatchError(
                    f"{url}: column {column!r} is null in {count} rows, so that nobody can tell which images are meant"
                )


def _statistics(group: Any, columns: Sequence[str]) -> dict[str, Any]:
    chunks: Iterator[Any] = (group.column(number) for number in range(group.num_columns))
    return {one.path_in_schema: one.statistics for one in chunks if one.path_in_schema in columns}


def _bounds(statistics: Any) -> tuple[str | None, str | None]:
    if statistics is None or not statistics.has_min_max or not isinstance(statistics.min, str):
        return None, None
    return statistics.min, statistics.max


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(schema.plain_type(column.type)).cast(pa.string())
