"""Shell completion, as docs/completion.md describes it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from nemo_image.cli import main

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "_NEMO_IMAGE_COMPLETE"
SHELLS = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_page_names_the_variable_and_the_shell(shell: str) -> None:
    assert f"{VARIABLE}={shell}_source nemo-image" in (ROOT / "docs" / "completion.md").read_text()


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shells_script_asks_the_program(shell: str) -> None:
    script = SHELLS[shell](main, {}, "nemo-image", VARIABLE).source()
    assert f"{VARIABLE}={shell}_complete" in script
    assert "nemo-image" in script


@pytest.mark.parametrize(
    ("words", "start", "wanted"),
    [
        ([], "", {"curate", "dedup", "index", "inspect", "run"}),
        ([], "cu", {"curate"}),
        (["curate"], "--max", {"--max-shards", "--max-failure-ratio"}),
        (["dedup", "/data", "--tier"], "e", {"exact"}),
        (["curate", "--embedding-dtype"], "", {"float32", "float16"}),
    ],
)
def test_what_is_completed(words: list[str], start: str, wanted: set[str]) -> None:
    found = {item.value for item in ShellComplete(main, {}, "nemo-image", VARIABLE).get_completions(words, start)}
    assert wanted <= found
    assert all(value.startswith(start) for value in found)


BASH = """
eval "$(_NEMO_IMAGE_COMPLETE=bash_source nemo-image)"
COMP_WORDS=(nemo-image dedup --ti) COMP_CWORD=2
_nemo_image_completion nemo-image
printf '%s\\n' "${COMPREPLY[@]}"
"""


def test_a_real_bash_completes(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    program = tmp_path / "nemo-image"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from nemo_image.cli import main\nmain(prog_name='nemo-image')\n"
    )
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([bash, "-c", BASH], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["--tier"], done.stderr
