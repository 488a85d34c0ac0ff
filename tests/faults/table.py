"""The table of faults tried and what the user saw, one line each, as Markdown."""

from __future__ import annotations

import re


class FaultTable:
    """Collects lines; the same fault twice is one line."""

    def __init__(self) -> None:
        self._lines: dict[str, tuple[str, str]] = {}

    def add(self, fault: str, saw: str, then: str) -> None:
        """Note a fault.

        Parameters
        ----------
        fault : str
            What was done.
        saw : str
            What the user saw: the error's line, usually. Names of temporary folders are left out.
        then : str
            How the rerun after the repair ended.
        """
        self._lines[fault] = (_plain(saw), then)

    def markdown(self) -> str:
        """Return the table."""
        rows = ["| fault | what the user saw | after the repair, the same command |", "|---|---|---|"]
        rows += [f"| {fault} | {saw} | {then} |" for fault, (saw, then) in sorted(self._lines.items())]
        return "\n".join(rows) + "\n"


def _plain(text: str) -> str:
    text = " ".join(text.split()).removeprefix("Error: ")
    text = re.sub(r"(/[^\s:'\",;)]*)?/(in|out|disk|data)(?=[/\s:'\",;)])", r"\2", text)
    text = re.sub(r"\d{8}T\d+-[0-9a-f]{8}", "…", text)
    text = text if len(text) <= 400 else text[:400] + " …"
    return text.replace("|", "\\|")
