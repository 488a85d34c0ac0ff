"""One contender in a process of its own: set up once, then run once for each line that comes in.

    python child.py FILE:FUNCTION KEYWORDS_AS_JSON

Only the standard library is imported here, because a rival's environment has nothing of this project.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTENDERS = Path(__file__).parent / "contenders"


def load(where: str) -> Callable[..., Callable[[], dict[str, Any]]]:
    """Return the function that sets a contender up."""
    file, _, name = where.partition(":")
    sys.path.insert(0, str(CONTENDERS))  # contenders share what they must do alike
    spec = importlib.util.spec_from_file_location(f"contender_{Path(file).stem}", CONTENDERS / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # data classes and worker processes look it up
    spec.loader.exec_module(module)
    function: Callable[..., Callable[[], dict[str, Any]]] = getattr(module, name)
    return function


def status_mib(line: str) -> float:
    """Return a line of ``/proc/self/status``, in MiB; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(one.split()[1]) / 1024 for one in lines if one.startswith(f"{line}:")), 0.0)


def measured(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run once; return what `run` says, its seconds, and its peak memory above what the process held before.

    What it says by way of a function is asked for after the clock has stopped; ``"after"`` is called then, too.
    """
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back (Linux)
    before = status_mib("VmRSS")
    started = time.perf_counter()
    facts = run()
    seconds = time.perf_counter() - started
    peak = status_mib("VmHWM")
    facts.pop("after", lambda: None)()
    facts = {name: value() if callable(value) else value for name, value in facts.items()}
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {**facts, "seconds": seconds, "extra_mib": peak - before, "peak_mib": peak, "largest_child_mib": children}


def main() -> None:
    """Answer each line of the standard input with one of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    where, keywords = sys.argv[1:3]
    run = load(where)(**json.loads(keywords))
    answers.write("ready\n")
    answers.flush()
    for _ in sys.stdin:
        answers.write(json.dumps(measured(run)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
