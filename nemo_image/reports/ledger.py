"""Verify the accounts of a folder's runs: each line, each run's sums, and the files that lie there now."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_image.datasets.footers import each, in_chunks
from nemo_image.datasets.opening import read_manifest
from nemo_image.engine.ledger import FOLDER, Ledger, LedgerError, Named, ShardRecord, Sums, read_ledgers
from nemo_image.errors import DatasetError, MetadataFileError, one_line
from nemo_image.shards import files, parquet

SAVE, EXPORT, EXPORT_OUTPUT = "save_metadata", "to_webdataset", "to_webdataset-output"
PIPELINE = "pipeline"
PROBLEMS_NAMED = 100

REBUILT = "rebuilt from the footers of files that no ledger lists"
_OWN_FOLDERS = ("enriched", "materialized-")


def inspect_ledgers(path: str, storage_options: files.StorageOptions = None) -> dict[str, Any]:
    """Return the accounts of all runs that wrote below a folder, verified anew, as plain values for JSON.

    Parameters
    ----------
    path : str
        A dataset or an output folder, on any file system. What ``curate`` and multi-pass operators keep in its
        ``_nemo_image/`` is looked at too.
    storage_options : mapping, optional
        For fsspec.

    Returns
    -------
    dict
        ``folders``: for each folder its ``runs``, the oldest first, and what is ``on_disk``; ``problems``: every line
        that does not balance, every ledger that is damaged or whose lines do not sum to its totals, and every Parquet
        file that is missing, unreadable or has other rows than the newest account says. Where no ledger lists a file,
        its account is taken from its footer.

    Raises
    ------
    DatasetError
        If there is no such folder, or nothing in it that a run of nemo_image left.
    """
    root = path.rstrip("/") or "/"
    fs, inside = files.open_fs(root, storage_options)
    if not fs.isdir(inside):
        raise DatasetError(f"{path}: no such folder")
    folders = [_inspect(one, storage_options) for one in _folders(root, storage_options)]
    folders = [one for one in folders if one["runs"]]
    if not folders:
        raise DatasetError(
            f"{path} holds no ledger ({FOLDER}/*.jsonl), and no Parquet file with an account in its footer: give a "
            "folder that save_metadata, to_webdataset or nemo-image curate wrote"
        )
    problems = [problem for one in folders for problem in one["problems"]]
    return {"path": path, "folders": folders, "problems": problems}


def _folders(root: str, storage_options: files.StorageOptions) -> list[str]:
    """Return a folder, and those that runs keep inside it for themselves."""
    fs, inside = files.open_fs(files.join(root, FOLDER), storage_options)
    if not fs.isdir(inside):
        return [root]
    names = sorted(
        info["name"].rstrip("/").rpartition("/")[2]
        for info in fs.ls(inside, detail=True)
        if info["type"] == "directory"
    )
    own = [files.join(root, FOLDER, name) for name in names if name.startswith(_OWN_FOLDERS)]
    return [root, *(below for one in own for below in _folders(one, storage_options))]


# One folder -----------------------------------------------------------------------------------------------------------


@dataclass
class _Problems:
    """The first problems, and how many there are."""

    named: list[str] = field(default_factory=list)
    more: int = 0

    def add(self, text: str) -> None:
        if len(self.named) < PROBLEMS_NAMED:
            self.named.append(text)
        else:
            self.more += 1

    def extend(self, others: _Problems) -> None:
        for text in sorted(others.named):
            self.add(text)
        self.more += others.more

    def to_list(self) -> list[str]:
        return [*self.named, *([f"and {self.more} more problems"] if self.more else [])]


def _inspect(root: str, storage_options: files.StorageOptions) -> dict[str, Any]:
    account: dict[str, int] = {}
    runs = [_verified(ledger, account) for ledger in read_ledgers(root, storage_options)]
    problems = _Problems()
    for run in runs:
        for problem in run["problems"]:
            problems.add(f"{run['ledger']}: {problem}")
    _compare_export(runs, problems)
    by_pipeline = any(run["kind"] == PIPELINE for run in runs)
    on_disk, rebuilt, odd_files = _on_disk(root, account, storage_options, by_pipeline)
    problems.extend(odd_files)
    _compare_pipeline(runs, on_disk, problems)
    if rebuilt is not None:
        runs.append({"ledger": None, "kind": REBUILT, "time": None, **rebuilt, "notes": [], "problems": []})
    return {"path": root, "runs": runs, "on_disk": on_disk, "problems": problems.to_list()}


def _verified(ledger: Ledger, account: dict[str, int]) -> dict[str, Any]:
    """Verify a ledger, and take the rows that its shards' files should have into `account`."""
    sums, problems, seen = Sums(), _Problems(), set()
    stored: dict[str, Any] | None = None
    if ledger.kind == EXPORT_OUTPUT:
        # It lists all that there is; an earlier export may have had other shards.
        account.clear()
    try:
        for line in ledger.lines():
            if isinstance(line, dict):
                stored = line
                continue
            if line.shard in seen:
                problems.add(f"shard {line.shard} stands there more than once")
            seen.add(line.shard)
            _balance(line, problems)
            sums.add(line)
            if ledger.kind in (SAVE, EXPORT_OUTPUT) and line.status != "failed" and line.rows_out is not None:
                account[line.shard] = line.rows_out
    except DatasetError as error:
        problems.add(one_line(error).removeprefix(f"{ledger.url}: "))
    _balance(sums, problems)
    found = sums.to_dict()
    for name, value in found.items():
        if stored is not None and stored.get(name) != value:
            problems.add(f"its last line says {name} {stored.get(name)}, but its lines sum to {value}")
    return {
        "ledger": ledger.url,
        "kind": ledger.kind,
        "time": ledger.time.isoformat(timespec="seconds"),
        **found,
        "notes": list((stored or {}).get("notes", [])),
        "problems": problems.to_list(),
    }


def _balance(account: ShardRecord | Sums, problems: _Problems) -> None:
    try:
        account.balance()
    except LedgerError as error:
        problems.add(str(error))


def _compare_export(runs: Sequence[dict[str, Any]], problems: _Problems) -> None:
    """Compare what the newest export took from its input with what it wrote."""
    of_kind = {kind: [run for run in runs if run["kind"] == kind] for kind in (EXPORT, EXPORT_OUTPUT)}
    if not all(of_kind.values()):
        return
    taken, written = of_kind[EXPORT][-1], of_kind[EXPORT_OUTPUT][-1]
    whole = not taken["failed_shards"] and not written["failed_shards"] and taken["time"] >= written["time"]
    if whole and taken["rows_out"] != written["rows_out"]:
        problems.add(
            f"{taken['ledger']}: {taken['rows_out']} rows were taken, but {written['ledger']} says that "
            f"{written['rows_out']} were written"
        )


def _compare_pipeline(runs: Sequence[dict[str, Any]], on_disk: dict[str, Any], problems: _Problems) -> None:
    """Compare what the newest run of a pipeline says it wrote with the rows that lie there."""
    last = next((run for run in reversed(runs) if run["kind"] == PIPELINE), None)
    if last is None or last["failed_shards"]:
        return
    if last["rows_out"] != on_disk["rows_by_pipelines"]:
        problems.add(f"{last['ledger']} says {last['rows_out']} rows, there are {on_disk['rows_by_pipelines']}")


# What lies there now --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """A Parquet file as it is: its rows and our record in its footer, or why it cannot be read."""

    shard: str
    rows: int = 0
    record: ShardRecord | None = None
    error: str | None = None
    by_pipeline: bool = False  # then ledgers list the group that its rows come from


@dataclass(frozen=True)
class _ReadRecords:
    """Reads the footers of some shards' files."""

    root: str
    storage_options: files.StorageOptions
    task_name = "nemo-image-footers"

    def __call__(self, shards: Sequence[str]) -> list[_File]:
        return each(self._read, shards, self.root, self.storage_options)

    def _read(self, shard: str) -> _File:
        try:
            summary = parquet.read_summary(files.join(self.root, shard + ".parquet"), self.storage_options)
        except MetadataFileError as error:
            return _File(shard, error=one_line(error))
        values = None if summary.footer is None else summary.footer.record
        if values and "writer" in values:
            return _File(shard, summary.rows, by_pipeline=True)
        try:
            return _File(shard, summary.rows, ShardRecord.from_dict(values) if values else None)
        except (TypeError, ValueError, AttributeError) as error:
            url = files.join(self.root, shard + ".parquet")
            return _File(shard, error=f"{url}: the account in its footer is garbled ({one_line(error)})")


def _on_disk(
    root: str, account: dict[str, int], storage_options: files.StorageOptions, in_any_folder: bool
) -> tuple[dict[str, Any], dict[str, Any] | None, _Problems]:
    """Compare the files with the account; return what there is, the sums of what the account lacks, and problems."""
    problems = _Problems()
    present = _below(root, storage_options) if in_any_folder else _present(root, account, storage_options)
    for shard in sorted(account.keys() - present):
        # A shard of which the user's frame has nothing gets no file.
        if account[shard]:
            problems.add(f"{files.join(root, shard + '.parquet')} is missing: its ledger says {account[shard]} rows")
    shards = sorted(present)
    sums, listed, unlisted, rows = Sums(), 0, [], 0
    piped = piped_rows = 0
    for part in in_chunks(_ReadRecords(root, storage_options), shards, root, storage_options):
        for file in part:
            rows += file.rows
            listed += file.shard in account
            piped += file.by_pipeline
            piped_rows += file.rows if file.by_pipeline else 0
            _check_file(root, file, account.get(file.shard), problems)
            if file.shard not in account and file.record is not None:
                sums.add(file.record)
                unlisted.append(file.shard)
    names = Named.of(sorted(unlisted))
    found = {
        "files": len(shards),
        "rows": rows,
        "in_ledgers": listed,
        "in_footers_only": names.count,
        "in_footers_only_first": list(names.first),
        "by_pipelines": piped,
        "rows_by_pipelines": piped_rows,
        "not_ours": len(shards) - listed - names.count - piped,
    }
    return found, sums.to_dict() if unlisted else None, problems


def _present(root: str, account: dict[str, int], storage_options: files.StorageOptions) -> set[str]:
    folders = {"", *map(posixpath.dirname, account), *read_manifest(root, storage_options or {}).get("folders", [])}
    found = set()
    for folder in folders:
        inside = files.join(root, folder) if folder else root
        try:
            names = files.list_files(inside, ".parquet", storage_options)
        except FileNotFoundError:
            continue
        found |= {posixpath.join(folder, name.removesuffix(".parquet")) for name in names}
    return found


def _below(root: str, storage_options: files.StorageOptions) -> set[str]:
    """Return the shards in a folder and all below it, but for our records: a pipeline's ledger does not name them."""
    fs, inside = files.open_fs(root, storage_options)
    start = inside.rstrip("/") + "/"
    names = [name.removeprefix(start) for name in fs.find(inside) if name.endswith(".parquet")]
    hidden = [any(part.startswith(".") or part == FOLDER for part in name.split("/")) for name in names]
    return {name.removesuffix(".parquet") for name, is_hidden in zip(names, hidden, strict=True) if not is_hidden}


def _check_file(root: str, file: _File, expected: int | None, problems: _Problems) -> None:
    url = files.join(root, file.shard + ".parquet")
    if file.error is not None:
        problems.add(file.error)
        return
    if expected is not None and file.rows != expected:
        problems.add(f"{url} has {file.rows} rows: its ledger says {expected}")
    elif file.record is not None and file.record.rows_out != file.rows:
        problems.add(f"{url} has {file.rows} rows: the account in its footer says {file.record.rows_out}")
    if file.record is not None:
        _balance(file.record, problems)
