"""How Sphinx builds the pages: ``make docs``. Nothing here needs a network."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nemo_image import __version__  # noqa: E402

project = "nemo_image"
author = "the nemo_image developers"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc", "sphinx_click", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"nemo_image {version}"
html_copy_source = False
html_show_copyright = False

myst_heading_anchors = 4
# Prompts and the like are no part of what is copied.
copybutton_prompt_text = "$ "

autodoc_default_options = {"members": True, "imported-members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

# Types in signatures that no page describes: other projects' (links to them would need the network), type variables,
# and our own that are not public, which lie in modules below the packages.
nitpick_ignore_regex = [
    (r"py:.*", r"(collections|dask|distributed|np|npt|numpy|os|pa|pandas|pathlib|pd|PIL|pyarrow|torch|typing)\..*"),
    (r"py:.*", r"nemo_image\.[a-z_]+\.[a-z_0-9]+\.[\w.]+"),
    (r"py:.*", r"dict\[str|Predictions|Model"),
]


def setup(app: Sphinx) -> None:
    """Make the benchmarks' results pages, and let links to their files lead there."""
    app.connect("builder-inited", lambda _app: copy_results())
    app.connect("source-read", lambda _app, _page, text: text.__setitem__(0, with_results(text[0])))


def copy_results() -> None:
    """Copy the results where Sphinx finds them, unless they have not changed."""
    for path in (ROOT / "benchmarks" / "results").iterdir():
        page = ROOT / "docs" / "results" / path.name
        if not page.exists() or page.read_bytes() != path.read_bytes():
            page.write_bytes(path.read_bytes())


def with_results(text: str) -> str:
    """Return a page's text with its links to the results changed."""
    text = text.replace("](../benchmarks/results/", "](results/")
    return text.replace("](../benchmarks/results)", "](results/index.md)")
