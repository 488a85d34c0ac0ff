"""Execute the notebooks on their own data and keep the outputs in them: ``make notebooks``.

They run in a copy, ``/tmp/nemo_image/notebooks``, so that no path of this machine gets into them. The tests
execute them too, on less data, and keep nothing (``tests/notebooks``).
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
COPY = Path("/tmp/nemo_image")
LARGEST = 1_000_000
"""Bytes that a committed notebook may have."""


def main(names: list[str]) -> None:
    """Execute the notebooks whose names begin with one of `names`; all if none is given."""
    shutil.rmtree(COPY, ignore_errors=True)
    (COPY / "notebooks").mkdir(parents=True)
    (COPY / "scripts").symlink_to(ROOT / "scripts")
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress"  # tqdm misses widgets, which no output here needs
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if names and not path.name.startswith(tuple(names)):
            continue
        started = time.monotonic()
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(COPY / "notebooks")}})
        client.execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of day
        text = nbformat.writes(notebook)
        if len(text.encode()) > LARGEST:
            sys.exit(f"{path.name} would have {len(text.encode()):,} bytes: show fewer or smaller pictures")
        path.write_text(text + "\n")
        print(f"{path.name}: {time.monotonic() - started:.0f} s, {len(text.encode()):,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
