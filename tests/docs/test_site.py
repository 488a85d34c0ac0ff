"""The pages as a site: Sphinx builds them without a warning, every page has its place, every link leads somewhere."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from nemo_image.cli import main
from nemo_image.datasets import ImageTextPairDataset
from tests.docs.blocks import PAGES

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("sphinx", "myst_parser", "furo", "numpydoc", "sphinx_click", "sphinx_copybutton")

PUBLIC = ("classifiers", "datasets", "dedup", "embedders", "filters", "pipeline", "reports", "stages")

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(part) is None for part in PARTS), reason="pip install 'nemo-image[docs]'"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does, but elsewhere and without a network."""
    target = tmp_path_factory.mktemp("site")
    # A proxy that nobody answers: what asks the network fails.
    environment = {**os.environ, "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "--fail-on-warning",
        "--keep-going",
        "--nitpicky",
        "-q",
        "docs",
        str(target),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def test_the_site_has_every_page(site: Path) -> None:
    pages = [page.removeprefix("docs/").removesuffix(".md") for page in PAGES if page != "README.md"]
    assert [page for page in pages if not (site / f"{page}.html").is_file()] == []
    # Sphinx's own pages would take the place of ours.
    assert not {"search", "genindex", "py-modindex"} & set(pages)


def test_the_reference_has_every_public_name(site: Path) -> None:
    text = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    missing = []
    for package in PUBLIC:
        names = importlib.import_module(f"nemo_image.{package}").__all__
        missing += [f"{package}.{name}" for name in names if f'id="nemo_image.{package}.{name}"' not in text]
    assert missing == []
    methods = [name for name, _ in inspect.getmembers(ImageTextPairDataset) if name[0] != "_"]
    assert {"from_webdataset", "save_metadata", "to_webdataset", "show"} <= set(methods)
    assert [name for name in methods if f'id="nemo_image.datasets.ImageTextPairDataset.{name}"' not in text] == []


def test_the_page_of_commands_has_every_option(site: Path) -> None:
    text = (site / "commands.html").read_text()
    for name in main.list_commands(click.Context(main)):
        command = main.get_command(click.Context(main), name)
        assert command is not None
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                (option, *_) = parameter.opts
                assert f'id="cmdoption-nemo-image-{name}-{option.lstrip("-")}"' in text, f"{name} {option}"


def test_pages_ask_no_other_host(site: Path) -> None:
    """What a page needs to be shown lies beside it: scripts, styles, pictures."""
    text = (site / "index.html").read_text()
    loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="([^"]+)"', text)
    assert loaded
    assert [address for address in loaded if "//" in address] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    assert [link for link in links if "://" not in link and not (folder / link).exists()] == []
