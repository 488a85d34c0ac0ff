"""Templates with everything from data escaped."""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"


@cache
def environment(*folders: Path) -> Any:
    """Return jinja2's environment of some folders of templates and the one of the pieces."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*map(str, folders), str(TEMPLATES)]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["data_uri"] = data_uri
    made.filters["thousands"] = lambda value: f"{value:,}"
    return made


def data_uri(jpeg: bytes) -> str:
    """Return a JPEG as a URI that holds it."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def render_piece(name: str, **values: Any) -> str:
    """Return a piece for a notebook: its style, and what a macro of ``pieces.html`` makes of `values`."""
    template = environment().get_template("notebook.html")
    text: str = template.render(piece=name, values=values, style=style())
    return text


@cache
def style() -> str:
    """Return the style of the pieces."""
    return (TEMPLATES / "pieces.css").read_text(encoding="utf-8")
