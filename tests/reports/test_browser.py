"""A report in a real browser: opened from disk, it loads nothing, runs nothing, and fits a phone."""

from __future__ import annotations

import http.server
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.reports import write_report
from tests.reports.makers import HOSTILE, write_hostile

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed (apt-get install chromium)")

MEASURE = """<body>
<iframe id="page" src="{page}" style="width:{width}px;height:800px;border:0"></iframe><p id="out"></p>
<script>
onload = () => {{
  const page = document.getElementById("page").contentDocument, root = page.documentElement;
  const images = [...page.images];
  const colour = (element, name) => page.defaultView.getComputedStyle(element)[name];
  const dark = page.getElementById("theme-dark"), veiled = page.querySelector(".ni-veiled img");
  const found = {{
    wide: root.scrollWidth, broken: images.filter(one => !(one.complete && one.naturalWidth)).length,
    images: images.length, unnamed: images.filter(one => !one.alt).length, light: colour(page.body, "backgroundColor"),
    blur: veiled ? colour(veiled, "filter") : "", title: page.title, scripts: page.scripts.length,
    headings: [...page.querySelectorAll("h1,h2,h3,h4")].map(one => one.tagName[1]).join(""),
    groups: page.querySelectorAll("#duplicates .ni-group").length,
    cards: page.querySelectorAll("#duplicates .ni-group .ni-card").length,
  }};
  dark.click();
  found.dark = colour(page.body, "backgroundColor");
  if (veiled) {{ page.getElementById("unveil").click(); found.bare = colour(veiled, "filter"); }}
  document.getElementById("out").textContent = JSON.stringify(found);
}};
</script></body>"""


class Server:
    """Counts what a browser asks of this machine."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                self.send_response(404)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    captions = (
        *HOSTILE,
        f'<img src="{server.url}/image">',
        f"<script>fetch('{server.url}/script')</script>",
        f"<link rel=stylesheet href={server.url}/style><style>@import '{server.url}/import';</style>",
    )
    dataset = ImageTextPairDataset.from_webdataset(write_hostile(folder / "data", captions))
    write_report(dataset, folder / "report.html")
    return folder / "report.html"


def browse(url: str, profile: Path, *options: str) -> tuple[str, str]:
    """Open a page; return its elements as text, and what the browser's console said."""
    common = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}")
    command = [CHROMIUM, *common, "--enable-logging=stderr", "--virtual-time-budget=20000", *options, "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def measured(page: Path, width: int, tmp_path: Path) -> dict[str, object]:
    import json

    (tmp_path / "frame.html").write_text(MEASURE.format(page=page.as_uri(), width=width))
    text, _ = browse((tmp_path / "frame.html").as_uri(), tmp_path / "profile", "--allow-file-access-from-files")
    found = re.search(r'<p id="out">(.*?)</p>', text, re.DOTALL)
    assert found is not None
    values: dict[str, object] = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return values


def test_it_asks_for_nothing_and_complains_of_nothing(page: Path, server: Server, tmp_path: Path) -> None:
    server.asked.clear()
    text, console = browse(page.as_uri(), tmp_path / "profile")
    assert server.asked == []
    assert console == ""
    assert "<title>taken</title>" not in text
    assert text.count('<section id="') >= 7
    assert "</html>" in text


def test_the_check_itself_sees_requests_and_errors(server: Server, tmp_path: Path) -> None:
    """The same captions in a page that does not escape them."""
    bad = tmp_path / "bad.html"
    bad.write_text(f"<p><img src='{server.url}/image'><script>document.title = 'taken'; nowhere()</script>")
    server.asked.clear()
    text, console = browse(bad.as_uri(), tmp_path / "profile")
    assert "/image" in server.asked
    assert "nowhere is not defined" in console
    assert "<title>taken</title>" in text


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_it_fits(page: Path, width: int, tmp_path: Path) -> None:
    found = measured(page, width, tmp_path)
    assert found["wide"] == width
    assert found["scripts"] == 0
    assert found["title"] != "taken"
    assert (found["broken"], found["unnamed"]) == (0, 0)
    assert int(str(found["images"])) > 50
    assert found["headings"] == "1" + str(found["headings"])[1:].replace("1", "")
    assert not re.search("24|13|14", str(found["headings"])), "a level of headings is skipped"
    # 20 copies of 20 rows: as many groups as a report shows, each a row and its copy.
    assert (found["groups"], found["cards"]) == (12, 24)


def test_light_and_dark_and_the_veil(page: Path, tmp_path: Path) -> None:
    found = measured(page, 800, tmp_path)
    assert found["light"] == "rgb(255, 255, 255)"
    assert found["dark"] == "rgb(20, 22, 26)"
    assert "blur" in str(found["blur"])
    assert found["bare"] == "none"


def test_colours_can_be_told_apart() -> None:
    """WCAG 2.2, 1.4.3: text has a contrast of at least 4.5 to what is behind it, in light and in dark."""
    import nemo_image.reports

    css = (Path(nemo_image.reports.__file__).parent / "templates" / "report.css").read_text()
    colours = dict(re.findall(r"--([a-z]+): light-dark\((#\w{6}, #\w{6})\)", css))
    for theme in (0, 1):
        named = {name: pair.split(", ")[theme] for name, pair in colours.items()}
        for behind in ("paper", "panel"):
            for text in ("ink", "faint", "accent"):
                assert _contrast(named[text], named[behind]) >= 4.5, (theme, text, behind)
        assert _contrast(named["bar"], named["paper"]) >= 3


def _contrast(one: str, two: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
