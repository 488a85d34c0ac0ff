"""Fuzz target: any bytes as a sample's JSON and caption: read, made into metadata, and given new ids."""

from __future__ import annotations

import atexit
import copy
import io
import json
import random
import shutil
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from nemo_image.datasets.load import metadata_of_tar
from nemo_image.export.rewrite import rewritten_json
from nemo_image.shards.read import ShardReader

MAX_LEN = 8192


@cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="nemo_image_json_text_", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def check(data: bytes) -> None:
    """Use the parts between ``\\xff\\xfe\\xff`` as the JSON of one sample each, and as its caption."""
    parts = data.split(b"\xff\xfe\xff")[:3]
    path = _folder() / "x.tar"
    with tarfile.open(path, "w") as tar:
        for number, part in enumerate(parts):
            for extension in ("json", "txt"):
                info = tarfile.TarInfo(f"{number}.{extension}")
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))
    with ShardReader(path) as reader:
        for sample, fields, part in zip(
            reader.index.samples, reader.read_jsons(reader.index.samples), parts, strict=True
        ):
            assert fields is None or isinstance(fields, dict)
            caption = reader.read_caption(sample)
            assert isinstance(caption, str)
            caption.encode()
            _check_rewritten(part)
        table = metadata_of_tar(reader)
    assert table.num_rows == len(parts)
    table.validate(full=True)
    written = io.BytesIO()
    pq.write_table(table, written)
    with pq.ParquetFile(written) as file:
        again = file.read(use_threads=False)
    assert again["key"].to_pylist() == [str(number) for number in range(len(parts))]


def _check_rewritten(data: bytes) -> None:
    new = rewritten_json(data, {"id": "new", "old": 5}, "0", "new")
    if new is None:
        return
    new.decode()  # what others read is UTF-8
    before, after = json.loads(data), json.loads(new)
    expected = {**before, "id": "new", "old": 5}
    if str(before.get("key")) == "0":
        expected["key"] = "new"
    assert json.dumps(after) == json.dumps(expected)
    # Where it was standard JSON, it still is.
    if _is_standard(data):
        json.loads(new, parse_constant=_refuse)


def _is_standard(data: bytes) -> bool:
    try:
        json.loads(data, parse_constant=_refuse)
    except ValueError:
        return False
    return True


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


def seeds() -> list[bytes]:
    """Return JSON of every kind."""
    values: list[Any] = [
        {"key": "0", "caption": "Käfer 甲虫", "width": 5, "score": 0.25, "tags": ["a", None], "exif": {"a": {"b": 1}}},
        {"id": 2**63, "x": -1e300, "y": [], "z": {}},
        {"a": [1, "two", 3.5, None, {"b": []}]},
    ]
    texts = [json.dumps(value, ensure_ascii=False).encode() for value in values]
    texts += [b'{"a": "\\ud800", "b": 1e999, "c": NaN, "d": -0.0}', b"[1, 2]", b"\xef\xbb\xbf{}", "{}".encode("utf-16")]
    texts += [b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", b'{"a": 1, "a": 2, "": 3, "shard": "x"}', b'{"caption": 5}']
    return [*texts, b"\xff\xfe\xff".join(texts[:3]), b'{"a": 1}\xff\xfe\xff{"a": "x"}\xff\xfe\xff{"a": [1]}']


_NAMES = ("key", "id", "old", "shard", "caption", "a", "", "image_embedding", "\ud800", "width")
_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 0.5, 1e300, "0", "", "Käfer 甲虫", "\ud800", "\0",
    [], {}, [[]], [{}], {"": {}}, [1, "a"], [1, 2.5], [None], {"a": [{"b": None}]}, "x" * 300,
)  # fmt: skip
_RAW = (b"NaN", b"1e999", b"-Infinity", b"1E400", b"9" * 5000, b"1." + b"0" * 400, b"-0", b"[" * 60 + b"]" * 60)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change values as values, now and then to what only text can say."""
    import atheris  # type: ignore[import-untyped]

    rng = random.Random(seed)
    if rng.random() < 0.3:
        return bytes(atheris.Mutate(data, max_size))
    parts = data.split(b"\xff\xfe\xff")
    place = rng.randrange(len(parts))
    try:
        value = json.loads(parts[place])
    except (ValueError, RecursionError):
        value = {}
    if rng.random() < 0.1 or not isinstance(value, dict):
        value = {}
    _change(value, rng)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        text = text.replace(b"null", rng.choice(_RAW), 1)
    parts[place] = text
    if rng.random() < 0.1 and len(parts) < 3:
        parts.append(rng.choice(parts))
    return b"\xff\xfe\xff".join(parts)[:max_size]


def _change(value: Any, rng: random.Random) -> None:
    while True:
        inner = [one for one in (value.values() if isinstance(value, dict) else value) if isinstance(one, dict | list)]
        if not inner or rng.random() < 0.6:
            break
        value = rng.choice(inner)
    new = copy.deepcopy(rng.choice(_VALUES))
    if isinstance(value, list):
        value.insert(rng.randrange(len(value) + 1), new)
    elif value and rng.random() < 0.3:
        del value[rng.choice(list(value))]
    else:
        value[rng.choice(_NAMES)] = new
