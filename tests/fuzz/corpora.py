"""Inputs that fuzzing found worth keeping, a zip for each target; those that once broke something are `crash-…`."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent / "corpus"


def load(name: str) -> dict[str, bytes]:
    """Return a target's inputs by their names."""
    path = FOLDER / f"{name}.zip"
    if not path.exists():
        return {}
    with zipfile.ZipFile(path) as packed:
        return {one: packed.read(one) for one in packed.namelist()}


def save(name: str, inputs: Iterable[bytes], crashes: Iterable[bytes]) -> Path:
    """Write a target's inputs, named by their hashes, so that the same inputs give the same file."""
    found = {f"crash-{_digest(data)}": data for data in crashes}
    known = set(found.values())
    found |= {_digest(data): data for data in inputs if data not in known}
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.zip"
    with zipfile.ZipFile(path, "w") as packed:
        for one, data in sorted(found.items()):
            packed.writestr(zipfile.ZipInfo(one), data, zipfile.ZIP_DEFLATED, 9)
    return path


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
