"""What lies on the disk: the files that must repeat to the byte, those that must not be there, and if all is whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tests.faults.points import TEMPORARY

FINAL = (".parquet", ".tar", ".idx", "export.json", "dataset.json")
"""Endings of the files that a rerun makes to the byte as a clean run does. Ledgers carry times."""


def finals(folder: Path) -> dict[str, bytes]:
    """Return the bytes of a run's final files, by their path below `folder`."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name.endswith(FINAL) and not TEMPORARY.search(path.name)
    }


def leftovers(folder: Path) -> list[str]:
    """Return the temporary files below `folder`."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if TEMPORARY.search(path.name))


def sources(folder: Path) -> dict[str, tuple[str, int]]:
    """Return hash and time of every file of a source."""
    return {
        path.relative_to(folder).as_posix(): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def ledgers(folder: Path, kind: str = "") -> list[Path]:
    """Return the ledgers below `folder`, oldest first."""
    found = [path for path in folder.rglob(f"{kind}*.jsonl") if not TEMPORARY.search(path.name)]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def last_ledger(folder: Path, kind: str) -> list[dict[str, object]]:
    """Return the lines of the last ledger of a kind (``"to_webdataset-2"`` is none of ``to_webdataset-output``)."""
    return [json.loads(line) for line in ledgers(folder, kind)[-1].read_text(encoding="utf-8").splitlines()]


def not_whole(folder: Path, clean: dict[str, bytes]) -> list[str]:
    """Return the files under a final name that a reader could not use: their bytes are not a clean run's.

    Ledgers must be whole lines of JSON, of which the last is the run's.
    """
    wrong = [name for name, data in finals(folder).items() if clean.get(name) != data]
    for path in ledgers(folder):
        text = path.read_text(encoding="utf-8")
        try:
            whole = text.endswith("\n") and "run" in [json.loads(line) for line in text.splitlines()][-1]
        except ValueError:
            whole = False
        if not whole:
            wrong.append(path.relative_to(folder).as_posix())
    return wrong
