"""A cluster as it stands on other machines: scheduler and workers are processes of their own, found by a file."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
START_S = 60


@contextmanager
def joined_cluster(folder: Path) -> Iterator[Any]:
    """Start a scheduler and two workers with certificates; give a client that joined them, which is not the default."""
    from distributed import Security

    from nemo_image import get_client

    made = Security.temporary()
    files = {}
    for name, text in (("ca-file", made.tls_ca_file), ("cert", made.tls_client_cert), ("key", made.tls_client_key)):
        files[name] = folder / f"{name}.pem"
        files[name].write_text(text)
    security = Security(
        tls_ca_file=str(files["ca-file"]),
        tls_client_cert=str(files["cert"]),
        tls_client_key=str(files["key"]),
        require_encryption=True,
    )
    scheduler_file = folder / "scheduler.json"
    where = [f"--scheduler-file={scheduler_file}", "--protocol=tls", "--dashboard-address=:0"]
    where += [f"--tls-{name}={path}" for name, path in files.items()]
    with ExitStack() as stack:
        stack.enter_context(_running("scheduler", [*where, "--port=0", "--host=127.0.0.1"], folder))
        _wait_for(scheduler_file, folder / "scheduler.log")
        own = ["--nworkers=2", "--nthreads=1", f"--local-directory={folder}"]
        stack.enter_context(_running("worker", [*where, *own], folder))
        yield stack.enter_context(
            get_client(scheduler_file=scheduler_file, security=security, n_workers=2, set_as_default=False)
        )


@contextmanager
def _running(what: str, options: list[str], folder: Path) -> Iterator[None]:
    # From the root: workers must find the tests' own modules to read what tests send.
    with (folder / f"{what}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dask", what, *options], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)


def _wait_for(path: Path, log: Path) -> None:
    never = threading.Event()
    for _ in range(START_S * 10):
        if path.exists():
            return
        never.wait(0.1)
    raise TimeoutError(f"no {path} after {START_S} s: {log.read_text()[-2000:]}")
