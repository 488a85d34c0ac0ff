"""Where the time of an embedding run goes: model, decoding, resize, the rest, by py-spy's samples of busy threads.

    python -m benchmarks.profile_embedding --model tf_efficientnet_lite0
    python -m benchmarks.profile_embedding --model vit_base_patch32_clip_224.openai --project ../an-older-checkout

py-spy (PyPI) is found beside this Python or on the PATH. ``save_metadata`` runs in threads of one process, again and
again; what is sampled begins after the first time. Prints a Markdown table of one line.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.speed.material import PROJECT, Material

KINDS = {
    "model": ("_forward_as (",),
    "JPEG": ("_decode_native (", "_decode_reduced ("),
    "resize": ("resize_into (",),
    "header": ("_bare_header (", "_open ("),
    "other of decoding": ("preprocess (", "preprocess_each (", "_prepared (", "prepared_batches ("),
    "normalising": ("normalize (",),
    "Parquet": ("write_table (", "to_column ("),
}
"""A sample is of the first kind of which a function stands in its stack."""

JOB = """
import itertools, sys, time
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import TimmImageEmbedder
tars, target, model, weights = sys.argv[1:5]
embedder = TimmImageEmbedder(model, weights=weights or None, autocast=False)
embedded = embedder(ImageTextPairDataset.from_webdataset(tars))
for number in itertools.count():
    embedded.save_metadata(f"{target}/{number}")
    print(time.perf_counter(), flush=True)
"""


def kind_of(stack: str) -> str:
    """Return the kind of a sample."""
    return next((kind for kind, names in KINDS.items() if any(name in stack for name in names)), "the rest")


def profiled(job: list[str], project: Path, seconds: int, out: Path) -> tuple[list[str], float]:
    """Run a job, and sample it for some seconds from its second turn on; return the stacks, and seconds a turn."""
    py_spy = shutil.which("py-spy") or str(Path(sys.executable).parent / "py-spy")
    environment = {"PYTHONPATH": str(project), "PATH": "/usr/bin:/bin"}
    # `python -c` imports from the folder that it runs in before all others.
    with subprocess.Popen(job, stdout=subprocess.PIPE, text=True, env=environment, cwd=project) as process:
        assert process.stdout is not None
        first = float(process.stdout.readline())
        record = [py_spy, "record", "--pid", str(process.pid), "--format", "raw", "--rate", "200", "--nonblocking"]
        command = [*record, "--duration", str(seconds), "--output", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process.kill()
        turns = [float(line) for line in process.stdout.read().split()]
    return out.read_text().splitlines(), (turns[-1] - first) / len(turns)


def main() -> None:
    """Profile one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--samples", type=int, default=184)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--project", type=Path, default=PROJECT, help="a checkout whose nemo_image is profiled")
    parser.add_argument("--folder", type=Path, default=PROJECT / ".bench")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    material = Material.at(args.folder.absolute())
    weights = str(material.lite0()) if "lite0" in args.model else ""
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        tars = str(material.tars(args.samples, 4))
        job = [sys.executable, "-c", JOB, tars, scratch, args.model, weights]
        lines, turn = profiled(job, args.project.absolute(), args.seconds, Path(scratch) / "stacks")
    counts: Counter[str] = Counter()
    for line in lines:
        stack, _, number = line.rpartition(" ")
        counts[kind_of(stack)] += int(number)
    total, kinds = sum(counts.values()), [*KINDS, "the rest"]
    print(f"| model | images/s | {' | '.join(kinds)} | samples |\n|{'---|' * (len(kinds) + 3)}")
    shares = " | ".join(f"{counts[kind] / total:.1%}" for kind in kinds)
    print(f"| {args.model} | {args.samples / turn:.1f} | {shares} | {total} |")


if __name__ == "__main__":
    main()
