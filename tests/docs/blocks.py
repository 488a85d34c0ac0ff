"""The code blocks of the pages: which there are, which are run, and how; `python -m tests.docs` counts them.

A block of Python is run, and so is a block of bash whose lines all call `nemo-image`. Others, or blocks that cannot run
in a test, are opted out by name, with the reason, in a comment before them::

    <!-- not run: NAME: REASON -->

A block that a command reads is written into the folder first::

    <!-- file: workflow.yaml -->

Blocks of `text` show output or pictures, and are no code.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from distributed import Client
from markdown_it import MarkdownIt

from nemo_image.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if not page.startswith(("docs/_build/", "docs/results/"))]

NOT_RUN = re.compile(r"<!-- not run: ([\w -]+): (.+?) -->", re.DOTALL)
FILE = re.compile(r"<!-- file: ([\w.-]+) -->")


@dataclass
class Block:
    """A fenced or indented block of a page."""

    page: str
    line: int
    language: str
    text: str
    comment: str = ""

    @property
    def opted_out(self) -> tuple[str, str] | None:
        """The name and the reason of a block that is not run."""
        found = NOT_RUN.fullmatch(self.comment)
        return (found[1], " ".join(found[2].split())) if found else None

    @property
    def how(self) -> str:
        """What is done with the block: python, commands, file, output, opted out, or unknown."""
        if self.opted_out:
            return "opted out"
        if FILE.fullmatch(self.comment):
            return "file"
        if self.language == "text":
            return "output"
        if self.language == "python":
            return "python"
        return "commands" if self.language == "bash" and all(map(_is_command, _lines(self.text))) else "unknown"

    def __str__(self) -> str:
        return f"{self.page}:{self.line} ({self.language or 'no language'})"


def blocks_of(text: str, page: str) -> list[Block]:
    """Return a page's blocks, but for Sphinx's directives."""
    found, comment, ends = [], "", -1
    for token in MarkdownIt().parse(text):
        if token.type == "html_block" and token.map:
            comment, ends = token.content.strip(), token.map[1]
        if token.type in ("fence", "code_block") and token.map and not token.info.startswith("{"):
            # A comment belongs to the block behind it, with at most one empty line between them.
            own = comment if 0 <= token.map[0] - ends <= 1 else ""
            found.append(Block(page, token.map[0] + 1, token.info.split(" ")[0], token.content, own))
    return found


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page of the repository."""
    return blocks_of((ROOT / page).read_text(), page)


def run_page(found: list[Block], replaced: dict[str, str]) -> int:
    """Run blocks in order, in the current folder and one namespace; return how many were run.

    Parameters
    ----------
    found : list of Block
    replaced : dict of str to str
        What the pages' paths are here.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    try:
        for block in found:
            text = block.text
            for shown, here in replaced.items():
                text = text.replace(shown, here)
            with _at(block):
                count += _run(block, text, names)
    finally:
        for value in names.values():
            if isinstance(value, Client):
                value.close()  # a script's last client ends with its process
    return count


def _run(block: Block, text: str, names: dict[str, Any]) -> bool:
    if block.how == "python":
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(text, str(block), "exec"), names)
    elif block.how == "commands":
        _run_commands(text)
    elif block.how == "file":
        Path(FILE.fullmatch(block.comment)[1]).write_text(text)  # type: ignore[index]
    else:
        return False
    return True


@contextlib.contextmanager
def _at(block: Block) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.add_note(f"in the block at {block}")
        raise


def _run_commands(text: str) -> None:
    for line in _lines(text):
        arguments = shlex.split(line, comments=True)[1:]
        done = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert done.exit_code == 0, f"{line}\n{done.output}"


def _lines(text: str) -> list[str]:
    """Return a script's commands: lines that go on are joined, comments left out."""
    joined = text.replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def _is_command(line: str) -> bool:
    return line.split(maxsplit=1)[0] == "nemo-image" and not any(sign in line for sign in ("$", "…", "&&", " | "))
