"""Fuzz a target, guided by coverage: ``python -m tests.fuzz TARGET [options of libFuzzer]``. Needs atheris.

.. code-block:: text

    python -m tests.fuzz tar_index -max_total_time=600        starts from the seeds and the kept corpus
    python -m tests.fuzz tar_index FILE                       replays an input
    python -m tests.fuzz tar_index --keep FOLDER [CRASH …]    distils FOLDER (and what was kept) into the kept corpus

Findings and new inputs go to ``$NEMO_IMAGE_FUZZING/TARGET``; by default that is a folder among temporary files.
"""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-untyped]

from tests.fuzz import corpora

TARGETS = {
    "tar_index": ["nemo_image.shards"],
    "idx_file": ["nemo_image.shards"],
    "decoder": ["nemo_image.shards", "PIL"],
    "json_text": ["nemo_image.shards", "nemo_image.export", "nemo_image.datasets.load", "json"],
}
"""What is instrumented for each target."""

LAUNCHER = "NEMO_IMAGE_FUZZ_LAUNCHER"


def write_corpus(folder: Path, name: str, seeds: list[bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    kept = corpora.load(name)
    for number, data in enumerate(seeds):
        (folder / f"seed-{number}").write_bytes(data)
    for one, data in kept.items():
        (folder / one).write_bytes(data)


def keep(name: str, folders: list[Path], crashes: list[Path]) -> None:
    """Distil inputs into the kept corpus: the fewest that reach the same code."""
    with tempfile.TemporaryDirectory() as temporary:
        merged, before = Path(temporary) / "merged", Path(temporary) / "before"
        merged.mkdir()
        target = importlib.import_module(f"tests.fuzz.{name}")
        write_corpus(before, name, target.seeds())
        # libFuzzer merges in a process of its own, which it starts by the name that it was started by.
        launcher = Path(temporary) / "launcher"
        launcher.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m tests.fuzz {name} "$@"\n')
        launcher.chmod(0o755)
        arguments = ["-merge=1", str(merged), str(before), *map(str, folders)]
        subprocess.run([launcher, *arguments], check=True, env={**os.environ, LAUNCHER: str(launcher)})
        old = [data for one, data in corpora.load(name).items() if one.startswith("crash-")]
        distilled = [path.read_bytes() for path in merged.iterdir()]
        path = corpora.save(name, distilled, [*old, *(one.read_bytes() for one in crashes)])
        print(f"{path}: {len(corpora.load(name))} inputs, {path.stat().st_size} bytes")


def main() -> None:
    name, rest = sys.argv[1], sys.argv[2:]
    if name not in TARGETS:
        raise SystemExit(f"no target {name!r}: use one of {', '.join(TARGETS)}")
    if rest[:1] == ["--keep"]:
        keep(name, [Path(rest[1])], [Path(one) for one in rest[2:]])
        return
    logging.getLogger("nemo_image").setLevel(logging.CRITICAL)
    with atheris.instrument_imports(include=[*TARGETS[name], f"tests.fuzz.{name}"]):
        target = importlib.import_module(f"tests.fuzz.{name}")
    positional = [one for one in rest if not one.startswith("-")]
    if not positional:
        folder = Path(os.environ.get("NEMO_IMAGE_FUZZING", f"{tempfile.gettempdir()}/nemo_image_fuzzing")) / name
        write_corpus(folder / "seeds", name, target.seeds())
        (folder / "corpus").mkdir(exist_ok=True)
        rest = [*rest, f"-artifact_prefix={folder}/", str(folder / "corpus"), str(folder / "seeds")]
    limits = ["-timeout=20", "-rss_limit_mb=3072", f"-max_len={target.MAX_LEN}"]
    mutator = getattr(target, "mutate", None)
    more = {} if mutator is None else {"custom_mutator": mutator}
    atheris.Setup(
        [os.environ.get(LAUNCHER, sys.argv[0]), *limits, *rest], target.check, enable_python_coverage=True, **more
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
