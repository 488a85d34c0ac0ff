"""Each command's help: an example that it understands, and a place on the page of commands."""

from __future__ import annotations

import re
import shlex

import click
import pytest

from nemo_image.cli import main

NAMES = main.list_commands(click.Context(main))


def command_of(name: str) -> click.Command:
    found = main.get_command(click.Context(main), name)
    assert found is not None
    return found


def examples(name: str) -> list[list[str]]:
    """Return the commands in the text below a command's options, without the program's name."""
    text = (command_of(name).epilog or "").replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in text.splitlines() if line.strip().startswith("nemo-image ")]


@pytest.mark.parametrize("name", NAMES)
def test_each_command_has_an_example_that_it_understands(name: str) -> None:
    found = examples(name)
    assert found, f"nemo-image {name} --help shows no example"
    for first, *arguments in found:
        assert first == name
        command_of(name).make_context(name, list(arguments))


@pytest.mark.parametrize("name", NAMES)
def test_each_command_says_what_it_does_and_speaks_to_machines(name: str) -> None:
    command = command_of(name)
    assert re.match(r"[A-Z].*\.", command.help or "", re.DOTALL)
    options = {text for parameter in command.params for text in parameter.opts}
    assert "--json" in options
    undocumented = [
        parameter.name
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.help and not isinstance(parameter.type, click.Choice)
    ]
    # Options that say all with their name: the documents have them.
    assert len(undocumented) <= 3, undocumented
