"""Progress in each place where it is seen: a terminal, a notebook, a log, a file."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_image.engine import progress as progress_module
from nemo_image.engine.progress import Progress, duration
from nemo_image.pipeline.progress import PipelineProgress
from nemo_image.stages.record import GroupRecord, StageStats

ROOT = Path(__file__).resolve().parents[2]

RUN = """
import nemo_image.engine.progress as module
module.FIRST_LINE_S = 1.0
now = [0.0]
def clock():
    return now[0]
with module.Progress("copy [red]", 4, clock=clock) as progress:
    for _ in range(4):
        now[0] += 40
        progress.advance(1000)
with module.Progress("pipe", 2, "groups", ["reader", "embedder"], clock=clock) as progress:
    for _ in range(2):
        now[0] += 10
        progress.add({"reader": 50, "embedder": 40})
"""

LINES = [
    "copy [red]: 1 of 4 shards; 1,000 rows (25/s); 2:00 min left",
    "copy [red]: 2 of 4 shards; 2,000 rows (25/s); 1:20 min left",
    "copy [red]: 3 of 4 shards; 3,000 rows (25/s); 40 s left",
    "copy [red]: 4 of 4 shards; 4,000 rows (25/s); took 2:40 min",
    "pipe: 1 of 2 groups; 50 reader (5/s), 40 embedder (4/s); 10 s left",
    "pipe: 2 of 2 groups; 100 reader (5/s), 80 embedder (4/s); took 20 s",
]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    logging.getLogger("nemo_image").setLevel(logging.WARNING)
    with Progress("save", 200, clock=clock) as progress:
        for _ in range(200):
            clock.now += 1
            progress.advance(10)
    logging.getLogger("nemo_image").setLevel(logging.NOTSET)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(";")[0] for line in lines] == [
        f"save: {done} of 200 shards" for done in (5, 35, 65, 95, 125, 155, 185, 200)
    ]
    assert lines[0].endswith("3:15 min left")
    assert lines[-1].endswith("2,000 rows (10/s); took 3:20 min")


def test_short_runs_say_nothing_where_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    logging.getLogger("nemo_image").setLevel(logging.WARNING)
    with Progress("save", 2, clock=clock) as progress:
        progress.advance(10)
        clock.now += 1
        progress.advance(10)
    logging.getLogger("nemo_image").setLevel(logging.NOTSET)
    assert capsys.readouterr().err == ""


def test_lines_go_to_the_log_where_it_is_listened_to(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "nemo_image")
    with PipelineProgress("curation", ["reader", "filter"], 1) as progress:
        progress.advance(
            GroupRecord("g", stages=[StageStats("reader", items_out=9), StageStats("filter", items_out=4)])
        )
    assert re.fullmatch(r"curation: 1 of 1 groups; 9 reader \(.*/s\), 4 filter \(.*/s\); took 0 s", caplog.messages[-1])
    assert capsys.readouterr().err == ""


def test_the_time_left_follows_the_present_pace() -> None:
    """9,000 shards that an earlier run had finished pass at once; the others take 10 s each."""
    clock = Clock()
    progress = Progress("save", 10_000, clock=clock)
    for _ in range(9_000):
        clock.now += 0.001
        progress.advance(0)
    for _ in range(100):
        clock.now += 10
        progress.advance(5)
    assert progress.moment().left == pytest.approx(900 * 10, rel=0.1)


def test_a_run_that_stops_early_says_how_far_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    logging.getLogger("nemo_image").setLevel(logging.WARNING)

    def stopped() -> None:
        with Progress("save", 4, clock=clock) as progress:
            clock.now += 60
            progress.advance(1)
            clock.now += 20
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stopped()
    logging.getLogger("nemo_image").setLevel(logging.NOTSET)
    assert capsys.readouterr().err.splitlines()[-1].startswith("save: 1 of 4 shards")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1:00 min"), (3599, "59:59 min"), (3600, "1:00 h"), (190_000, "2 d 4 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_file_gets_plain_lines(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w") as log:
        subprocess.run([sys.executable, "-c", RUN], cwd=ROOT, stdout=log, stderr=log, check=True)
    assert (tmp_path / "log").read_text().splitlines() == LINES


@pytest.mark.parametrize("kind", ["xterm-256color", "dumb"])
def test_a_terminal(kind: str, tmp_path: Path) -> None:
    """A bar in a real pseudo-terminal; plain lines in one that cannot move its cursor."""
    import os
    import pty

    main, other = pty.openpty()
    environment = {**os.environ, "TERM": kind, "COLUMNS": "110"}
    process = subprocess.Popen([sys.executable, "-c", RUN], cwd=ROOT, stderr=other, env=environment)
    os.close(other)
    said = b""
    while True:
        try:
            said += os.read(main, 65536)
        except OSError:  # the other end is closed
            break
    os.close(main)
    assert process.wait() == 0
    text = said.decode()
    if kind == "dumb":
        assert text.splitlines() == LINES
        return
    assert "\x1b[" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "4/4 shards  4,000 rows (25/s)" in plain
    assert "copy [red]" in plain
    assert "100 (5/s)" in plain


def test_a_notebook() -> None:
    nbformat = pytest.importorskip("nbformat", reason="notebooks are run by nbclient: pip install nbclient ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="notebooks are run by nbclient: pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="notebooks are run by nbclient: pip install nbclient ipykernel")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(RUN)])
    kernel = nbclient.NotebookClient(
        book, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    kernel.execute()
    shown = [one for one in book.cells[0].outputs if one.output_type == "display_data"]
    assert [one.data["text/plain"] for one in shown] == [LINES[3], LINES[5]]
    assert 'value="4" max="4"' in shown[0].data["text/html"]
    assert "copy [red]" in shown[0].data["text/html"]
    assert [one for one in book.cells[0].outputs if one.output_type == "stream"] == []


def test_the_display_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is shown for nothing."""
    monkeypatch.setattr(progress_module, "_display_here", lambda clock: pytest.fail("shown"))
    with Progress("save", 0):
        pass
