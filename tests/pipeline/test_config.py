"""Reading configurations: plain YAML, overrides, and what a file refers to."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest

from nemo_image.errors import ArgumentError
from nemo_image.pipeline.configuration import config as config_module
from nemo_image.pipeline.configuration import plain_yaml
from nemo_image.pipeline.configuration.config import load_config

FLOW = """
input_path: ???
output_path: ${input_path}-out
threshold: 5.5
seed: 7
stages:
  - _target_: nemo_image.stages.FilePartitioningStage
    file_paths: ${input_path}
    limit: ${seed}
  - _target_: nemo_image.stages.ImageAestheticFilterStage
    score_threshold: ${threshold}
    model_dir: ${output_path}/models
"""
GIVEN = "input_path=/data/in"


def values(text: str) -> Any:
    return plain_yaml.parse(text, "the file")


# Plain YAML ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("1.5", 1.5),
        ("1e-3", 0.001),
        ("-2.5E4", -25000.0),
        (".5e1", 5.0),
        ("'1e-3'", "1e-3"),
        ("1e", "1e"),
        (".inf", math.inf),
        ("true", True),
        ("off", False),
        ("null", None),
        ("~", None),
        ("2020-01-01", "2020-01-01"),
        ("'1'", "1"),
        ("00012", 10),  # YAML 1.1: octal
        ("s3://bucket/a b", "s3://bucket/a b"),
        ("[1, [a, {b: c}]]", [1, ["a", {"b": "c"}]]),
        ("{}", {}),
        ("", None),
        ("a: &x {b: 1}\nc: *x", {"a": {"b": 1}, "c": {"b": 1}}),
        ("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}", {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}),
        ("- &x {b: 1}\n- &y {b: 2, e: 3}\n- {<<: [*x, *y]}", [{"b": 1}, {"b": 2, "e": 3}, {"b": 1, "e": 3}]),
    ],
)  # fmt: skip
def test_values_are_yamls(text: str, value: Any) -> None:
    found = values(text)
    assert found == value
    assert type(found) is type(value)


def test_an_alias_is_a_copy() -> None:
    found = values("a: &x {b: 1}\nc: *x")
    found["a"]["b"] = 2
    assert found["c"] == {"b": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is there twice"),
        ("a: {b: 1, b: 1}", "the key 'b' is there twice"),
        ("1: a", "line 1: the key '1' is no text: put it in quotes"),
        ("on: a", "the key 'on' is no text"),
        ("? [a]\n: b", "a key is no text"),
        ("a: !!python/object/apply:os.system [x]", "'python/object/apply:os.system' is not a plain value"),
        ("a: !!python/name:os.system", "'python/name:os.system' is not a plain value"),
        ("a: !!python/object/apply:pathlib.Path [/etc/passwd]", "is not a plain value"),
        ("a: !!set {b}", "'set' is not a plain value"),
        ("a: !!binary aGk=", "'binary' is not a plain value"),
        ("a: !mine b", "'!mine' is not a plain value"),
        ("a: !!int x", "no plain YAML"),
        ("a: [", "no plain YAML"),
        ("--- 1\n--- 2", "no plain YAML"),
        ("a: *b", "no plain YAML"),
        ("a: \x00", "no plain YAML"),
        ("a: {<<: 1}", "'<<' takes mappings"),
        ("a: &a [*a]", "more than 50 levels"),
        ("[" * 60 + "]" * 60, "more than 50 levels"),
        ("[" * 100_000, "nested too deeply"),
        ("{" * 100_000, "nested too deeply"),
    ],
)
def test_anything_but_plain_yaml_is_refused(text: str, said: str) -> None:
    with pytest.raises(ArgumentError, match=r"^the file") as raised:
        values(text)
    assert said in str(raised.value)


def bomb(item: str, first: str, levels: int = 12) -> str:
    """Return levels that each stand for ten times the one before."""
    lines = [f"a0: {first}"]
    lines += [f"a{n}: {item.replace('#', str(n - 1))}" for n in range(1, levels)]
    return "\n".join(lines)


def aliases(levels: int = 12) -> str:
    lines = ["a0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (aliases(), "more than 100,000 values"),
        (bomb("[" + ", ".join(["'${a#}'"] * 10) + "]", "[1, 2, 3]"), "more than 100,000 values"),
        (bomb("'" + "${a#}" * 10 + "'", "xxxxxxxxxxxxxxxx"), "more than 4,194,304 characters"),
        ("\n".join(f"a{n}: ${{a{n + 1}}}" for n in range(100)) + "\na100: 1", "more than 50 levels"),
    ],
    ids=["aliases", "lists", "text", "chain"],
)
def test_a_bomb_goes_out(text: str, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        load_config(text)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_text("a: 1\n" + "#" * config_module.MAX_BYTES)
    with pytest.raises(ArgumentError, match=r"large\.yaml has more than 1,048,576 bytes"):
        load_config(path)
    with pytest.raises(ArgumentError, match="more than 1,048,576 bytes"):
        load_config(path.read_text())


# The file ------------------------------------------------------------------------------------------------------------


def test_a_file_is_read_by_path_and_by_url(tmp_path: Path) -> None:
    path = tmp_path / "flow.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + FLOW.encode())
    wanted = load_config(FLOW, [GIVEN])
    assert (
        load_config(path, [GIVEN])
        == load_config(str(path), [GIVEN])
        == load_config(f"file://{path}", [GIVEN])
        == wanted
    )
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_config(tmp_path / "nothing.yaml")
    path.write_bytes(b"a: \xff")
    with pytest.raises(ArgumentError, match=r"flow\.yaml is not UTF-8"):
        load_config(path)


@pytest.mark.parametrize("text", ["\n", "- a\n", "a\n"])
def test_a_configuration_is_a_mapping(text: str) -> None:
    with pytest.raises(ArgumentError, match="is no mapping: it needs a list 'stages:'"):
        load_config(text)


def test_values_are_put_in_with_their_types() -> None:
    found = load_config(FLOW, [GIVEN])
    assert found["stages"] == [
        {"_target_": "nemo_image.stages.FilePartitioningStage", "file_paths": "/data/in", "limit": 7},
        {
            "_target_": "nemo_image.stages.ImageAestheticFilterStage",
            "score_threshold": 5.5,
            "model_dir": "/data/in-out/models",
        },
    ]


def test_references_reach_deep() -> None:
    text = "a: {b: [10, {c: x}], go: true}\nstages: ['${a.b[1].c}${a.b.0}${ a.go }', '${a.b}', '${stages[1][0]}']\n"
    assert load_config(text)["stages"] == ["x10true", [10, {"c": "x"}], 10]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("${other}", "there is no 'other' in the configuration"),
        ("${bas}", "did you mean 'base'?"),
        ("${base.y}", "there is no 'y'"),
        ("${base.x.z}", "there is no 'z'"),
        ("${many[3]}", "there is no '3'"),
        ("${me}", "leads back to itself: me -> me"),
        ("${you}", r"leads back to itself"),
        ("a${base}", "'base' is a mapping, which does not fit into text"),
        ("a${many}", "'many' is a list"),
        ("a${nothing}", "'nothing' is null"),
        ("${ray_client.n}", "'ray_client' is ignored"),
        ("${oc.env:HOME}", "there are no resolvers such as oc.env"),
        ("${oc.env:HOME,x}", "there are no resolvers"),
        ("${oc.decode:'1'}", "there are no resolvers"),
        ("${oc.select:base}", "there are no resolvers"),
        ("${oc.create:{}}", "there are no resolvers"),
        ("${hydra:run.dir}", "there are no resolvers"),
        ("${base:}", "there are no resolvers"),
        ("${${name}:HOME}", "there are no resolvers"),
        ("${${name}}", "there are no resolvers"),
        ("${.x}", "there are no resolvers"),
        ("${}", "there are no resolvers"),
        ("${base", "there are no resolvers"),
        (r"\${base.x}${", "there are no resolvers"),
    ],
)
def test_only_keys_of_the_file_may_be_referred_to(text: str, said: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        load_config(
            "base: {x: 1}\nmany: [1, 2]\nnothing: null\nname: oc.env\nyou: ${me}\nray_client: {n: 1}\n"
            f"me: {text!r}\nstages: []\n"
        )
    assert said in str(raised.value)
    assert str(raised.value).startswith(("me: ", "you: "))


def test_what_was_put_together_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "sung")
    found = load_config("a: $\nb: '{oc.env:CANARY}'\nstages: ['${a}${b}']\n")
    assert found["stages"] == ["${oc.env:CANARY}"]


def test_a_target_is_written_out() -> None:
    with pytest.raises(ArgumentError, match=r"stages.0._target_: '\$\{which\}': a target is written out"):
        load_config("which: nemo_image.stages.ImageReaderStage\nstages:\n  - _target_: ${which}\n")


def test_all_missing_values_are_listed_at_once() -> None:
    with pytest.raises(ArgumentError) as raised:
        load_config("in: ???\nout: ???\nstages:\n- a: ${in}\n  b: ${in}\n  c: ???\nray_client:\n  n: ???\n")
    assert str(raised.value) == "the configuration leaves values to you: give in=… out=… stages.0.c=…"


# Overrides -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("threshold=6", ["stages", 1, "score_threshold"], 6),
        ("threshold=1e1", ["stages", 1, "score_threshold"], 10.0),
        ("threshold=${seed}", ["stages", 1, "score_threshold"], 7),
        ("threshold=null", ["stages", 1, "score_threshold"], None),
        ("stages.1.score_threshold=4.5", ["stages", 1, "score_threshold"], 4.5),
        ("stages[1].score_threshold=4.5", ["stages", 1, "score_threshold"], 4.5),
        ("stages.1.filter=false", ["stages", 1, "filter"], False),
        ("+stages.1.filter=false", ["stages", 1, "filter"], False),
        ("++stages.1.filter=false", ["stages", 1, "filter"], False),
        ("++seed=9", ["stages", 0, "limit"], 9),
        ("stages.0.file_extensions=[.tar, '.TAR']", ["stages", 0, "file_extensions"], [".tar", ".TAR"]),
        ("+stages.0.storage_options.anon=true", ["stages", 0, "storage_options"], {"anon": True}),
        ("stages.0.storage_options={anon: true}", ["stages", 0, "storage_options"], {"anon": True}),
        ("input_path=/a/{00..09}.tar", ["stages", 0, "file_paths"], "/a/{00..09}.tar"),
        ("input_path={00..09}.tar", ["stages", 0, "file_paths"], "{00..09}.tar"),
        ("input_path=a: b #c=d", ["stages", 0, "file_paths"], "a: b #c=d"),
        ("input_path=[5", ["stages", 0, "file_paths"], "[5"),
        ("input_path='5'", ["stages", 0, "file_paths"], "5"),
        ("input_path=", ["stages", 0, "file_paths"], ""),
        ("input_path=2020-01-01", ["stages", 0, "file_paths"], "2020-01-01"),
        ("name=mine", ["name"], "mine"),
        ("stages.0={_target_: a.B}", ["stages", 0], {"_target_": "a.B"}),
        ("ray_client.num_gpus=4", ["ray_client"], None),
    ],
)
def test_overrides(override: str, path: list[Any], value: Any) -> None:
    found: Any = load_config(FLOW, [GIVEN, override])
    for step in path:
        found = found[step]
    assert found == value
    assert type(found) is type(value)


def test_later_overrides_win() -> None:
    assert load_config(FLOW, [GIVEN, "threshold=1", "threshold=2"])["threshold"] == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("threshold", "it is not key=value"),
        ("=5", "it is not key=value"),
        ("~threshold=5", "it is not key=value"),
        ("+++a=5", "it is not key=value"),
        ("a b=5", "it is not key=value"),
        ("${threshold}=5", "it is not key=value"),
        ("treshold=5", "there is no key 'treshold' in the configuration; did you mean 'threshold'?"),
        ("stages.2.limit=5", "stages is a list of 2, counted from 0; it has no '2'"),
        ("stages.one.limit=5", "it has no 'one'"),
        ("stages.-1.limit=5", "it has no '-1'"),
        ("stages.2=5", "it has no '2'"),
        ("+stages.2=5", "it has no '2'"),
        ("+stages.1=5", "'1' is there already"),
        ("threshold.low=5", "threshold is 5.5, there is nothing in it"),
        ("+threshold=5", "'threshold' is there already; leave out the '+'"),
        ("seed=[1, [}]", "no plain YAML"),
        ("seed=[!!python/name:os.system ]", "is not a plain value"),
        ("+other=5", "the override of 'other' changes nothing"),
    ],
)
def test_bad_overrides_are_named(override: str, said: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        load_config(FLOW, [GIVEN, override])
    assert said in str(raised.value)
    assert override.lstrip("+").partition("=")[0].split(".")[0] in str(raised.value)


def test_a_variable_that_nothing_refers_to_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "nemo_image"):
        load_config("used: 1\nidle: 2\nn: 4\nname: x\nray_client: {n: '${n}'}\nstages: ['${used}']\n")
    assert [record.getMessage() for record in caplog.records] == ["the configuration: no value refers to 'idle'"]
