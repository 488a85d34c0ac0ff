"""The rivals' own Python environments, made on first use."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

RIVALS = {
    "webdataset": ["webdataset"],
    "faiss": ["faiss-cpu"],
}
"""What pip installs into each."""


def python_of(environment: str, folder: Path) -> str:
    """Return the interpreter of an environment, made below `folder` if need be.

    A rival's packages are its own. Behind them it sees the packages of the project's environment, so that both sides
    run the same build of torch, timm and Pillow.
    """
    if environment == "project":
        return sys.executable
    home = folder / environment
    python = home / "bin" / "python"
    if not (home / ".installed").exists():
        print(f"Installing {', '.join(RIVALS[environment])} into {home}", flush=True)
        venv.create(home, with_pip=True, clear=True)
        own = next(home.glob("lib/python*/site-packages"))
        (own / "zz-project.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *RIVALS[environment]], check=True)
        (home / ".installed").touch()
    return str(python)
