"""The reader: samples, captions, metadata and bytes of tars, in batches."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import json
import logging
import pickle
import tarfile
import threading
import zipfile
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_image import schema
from nemo_image.engine import threads
from nemo_image.engine.prefetch import prefetch
from nemo_image.errors import ArgumentError, IdMismatchError, ImageError, MetadataFileError, ShardError, TarError
from nemo_image.shards.idx_file import idx_url, write_idx
from nemo_image.shards.index import index_tar
from nemo_image.shards.parquet import Footer, write_table
from nemo_image.stages.reader import ImageReaderStage
from nemo_image.stages.reading import pixels_ahead, sample_rows, samples
from nemo_image.stages.reading.samples import shard_name
from nemo_image.stages.tasks import FileGroup
from tests.makers import encoded, make_dataset, picture, sample, tar_members, write_rows, write_tar
from tests.stages.reading import group_of, images_of, read

IMG2DATASET = Path(__file__).parents[1] / "datasets" / "img2dataset_sample" / "sample.zip"


def quiet(**options: Any) -> ImageReaderStage:
    return ImageReaderStage(verbose=False, **options)


# ----------------------------------------------------------------------------------------------------------- arguments


def test_published_arguments() -> None:
    stage = ImageReaderStage(batch_size=7, num_threads=16, num_gpus_per_worker=0.5, verbose=False)
    assert (stage.batch_size, stage.num_threads, stage.verbose, stage.name) == (7, 16, False, "image_reader")
    assert stage.resources.gpus == 0.5
    assert ImageReaderStage().resources.gpus == 0.25
    assert ImageReaderStage().batch_size == 100
    assert ImageReaderStage(dali_batch_size=32).batch_size == 32
    assert ImageReaderStage(dali_batch_size=32, batch_size=32).batch_size == 32
    assert dataclasses.replace(ImageReaderStage(dali_batch_size=32), batch_size=5).batch_size == 5
    assert stage.task_types()[0] is FileGroup
    assert ImageReaderStage.thread_safe
    assert ImageReaderStage.works_ahead
    assert pickle.loads(pickle.dumps(stage)) == stage


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": "100"}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"batch_size": 10, "dali_batch_size": 20}, "dali_batch_size"),
        ({"num_threads": 0}, "num_threads"),
        ({"max_pixels": 0}, "max_pixels"),
        ({"max_pixels": 10**9}, "max_pixels must be at most 89478485"),
        ({"on_error": "ignore"}, "on_error"),
        ({"id_col": ""}, "id_col"),
        ({"num_gpus_per_worker": 2}, "gpus=2"),
    ],
)
def test_unusable_arguments(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        ImageReaderStage(**options)


# ------------------------------------------------------------------------------------------------------------- samples


def test_everything_that_belongs_to_an_image(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"00000": 5, "00001": 3})
    batches, counts = read(quiet(batch_size=2), group_of(tmp_path, "00000.tar", "00001.tar"))
    assert counts == {}
    assert [(batch.task_id, len(batch.data)) for batch in batches] == [
        ("00000:0", 2), ("00000:2", 2), ("00000:4", 1), ("00001:0", 2), ("00001:2", 1)
    ]  # fmt: skip
    assert {batch.dataset_name for batch in batches} == {"photos"}
    assert [batch.metadata for batch in batches] == [{"from": "a test"}] * 5
    for shard in ("00000", "00001"):
        rows = pq.read_table(tmp_path / f"{shard}.parquet")
        members = tar_members(tmp_path / f"{shard}.tar")
        mine = [image for batch in batches for image in batch.data if image.shard == shard]
        assert [image.image_id for image in mine] == rows["key"].to_pylist()
        assert [image.metadata for image in mine] == rows.to_pylist()
        assert [image.caption for image in mine] == rows["caption"].to_pylist()
        assert [image.original_caption for image in mine] == rows["caption"].to_pylist()
        assert all(batch.fields == rows.schema for batch in batches)
        for image in mine:
            key = image.image_id
            assert image.image_path == f"{tmp_path}/{shard}.tar/{key}.jpg"
            assert image.files == {one: members[f"{key}.{one}"] for one in ("jpg", "txt", "json")}
            assert image.image_bytes == members[f"{key}.jpg"]
            assert (image.width, image.height, image.image_error) == (64, 48, None)
            assert image.source is not None
            assert [image.source.read(member) for member in image.source.sample.members] == [
                members[member.name] for member in image.source.sample.members
            ]


def test_process_gives_what_stream_gives(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"00000": 3})
    group = group_of(tmp_path, "00000.tar")
    assert [image.image_id for image in images_of(quiet(batch_size=2).process(group))] == ["000000", "000001", "000002"]
    assert [one.task_id for one in quiet(batch_size=2).process(group)] == ["00000:0", "00000:2"]


def test_folders_in_names_and_below_the_root(tmp_path: Path) -> None:
    write_tar(tmp_path / "a" / "b" / "00000.tar", [sample(1, "x/one"), sample(2, "./x/two"), sample(3, "y/one")])
    found = images_of(read(quiet(), group_of(tmp_path, "a/b/00000.tar"))[0])
    assert [image.image_id for image in found] == ["x/one", "x/two", "y/one"]
    assert {image.shard for image in found} == {"a/b/00000"}
    assert found[0].image_path == f"{tmp_path}/a/b/00000.tar/x/one.jpg"


def test_a_shards_name() -> None:
    assert shard_name("/data/in/00000.tar", "/data/in") == "00000"
    assert shard_name("/data/in/a/0.1.tar", "/data/in/") == "a/0.1"
    assert shard_name("s3://bucket/in/x/00000.tar", "s3://bucket") == "in/x/00000"
    assert shard_name("/00000.tar", "/") == "00000"
    assert shard_name("x/00000.TAR", "x") == "00000"
    assert shard_name("x/00000.tar", ".") == "x/00000"
    assert shard_name("./x/00000.tar", ".") == "x/00000"
    assert shard_name("/data/in/00000.tar", "") == "00000"
    with pytest.raises(ShardError, match=r"/data/other/00000\.tar does not lie below /data/in,"):
        shard_name("/data/other/00000.tar", "/data/in")
    with pytest.raises(ShardError, match=r"/data/input/00000\.tar does not lie below"):
        shard_name("/data/input/00000.tar", "/data/in")
    with pytest.raises(ShardError, match=r"in/00000\.parquet does not end in \.tar"):
        shard_name("in/00000.parquet", "in")


def test_interleaved_members_and_other_formats(tmp_path: Path) -> None:
    png, webp = encoded(picture(1), "PNG"), encoded(picture(2), "WEBP")
    write_tar(tmp_path / "0.tar", [("a", {"txt": b"first"}), ("b", {"webp": webp}), ("a", {"PNG": png, "cls": b"7"})])
    one, two = images_of(read(quiet(), group_of(tmp_path, "0.tar"))[0])
    assert one.files == {"txt": b"first", "png": png, "cls": b"7"}
    assert (one.image_id, one.caption, one.image_path) == ("a", "first", f"{tmp_path}/0.tar/a.PNG")
    assert (two.image_id, two.caption, two.files) == ("b", None, {"webp": webp})


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        file = tmp_path / "x.jpg"
        file.write_bytes(encoded(picture(1)))
        tar.add(file, "caf\xe9.jpg")
    (image,) = images_of(read(quiet(), group_of(tmp_path, "0.tar"))[0])
    assert (image.image_id, image.image_path) == ("caf\\xe9", f"{tmp_path}/0.tar/caf\\xe9.jpg")


def test_repeated_members_are_counted_and_the_first_counts(tmp_path: Path) -> None:
    first, second = encoded(picture(1)), encoded(picture(2))
    write_tar(tmp_path / "0.tar", [("a", {"jpg": first}), ("b", {"jpg": second}), ("a", {"jpg": second, "txt": b"x"})])
    batches, counts = read(quiet(), group_of(tmp_path, "0.tar"))
    assert counts == {"repeated_members": 1}
    assert [(image.image_id, image.image_bytes, image.caption) for image in images_of(batches)] == [
        ("a", first, "x"), ("b", second, None)
    ]  # fmt: skip


@pytest.mark.parametrize("extra", [0, 1])
def test_large_members_stay_in_the_tar(tmp_path: Path, extra: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "SMALL", 5000)
    monkeypatch.setattr(samples, "SMALL_TEXT", 100)
    depth = bytes(range(250)) * 20 + b"!" * extra
    members = {
        "jpg": encoded(picture(1, 400, 300), quality=95), "depth": depth, "txt": b"t" * (100 + extra),
        "json": b'{"a": 1}', "cls": b"7"
    }  # fmt: skip
    assert len(members["jpg"]) > 5000
    write_tar(tmp_path / "0.tar", [("a", members)])
    (image,) = images_of(read(quiet(), group_of(tmp_path, "0.tar"))[0])
    left = {"depth", "txt"} if extra else set()
    assert image.files == {name: data for name, data in members.items() if name not in left}
    assert image.caption == (None if extra else "t" * 100)
    assert image.source is not None
    lying = {member.extension: member for member in image.source.sample.members}
    assert image.source.read(lying["depth"]) == depth


def test_a_batch_travels_without_pixels_and_bytes(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"00000": 3})
    (batch,), _ = read(quiet(), group_of(tmp_path, "00000.tar"))
    pixels = [image.image_data for image in batch.data]
    pickled = pickle.dumps(batch)
    assert len(pickled) < 5000 < sum(image.nbytes for image in pixels if image is not None)
    back = pickle.loads(pickled)
    assert [image.files for image in back.data] == [{}, {}, {}]
    assert [image.metadata for image in back.data] == [image.metadata for image in batch.data]
    assert back.fields == batch.fields
    for image, was, seen in zip(back.data, batch.data, pixels, strict=True):
        assert not image.holds_pixels
        assert image.image_bytes == was.files["jpg"]
        assert np.array_equal(image.image_data, seen)


# ------------------------------------------------------------------------------------------------------------ captions


def test_captions(tmp_path: Path) -> None:
    jpg = encoded(picture(1))
    texts = {
        "bad": b"caf\xe9 \xff", "bom": b"\xef\xbb\xbfwith a mark", "empty": b"", "utf8": "naïve ☃\n".encode()
    }  # fmt: skip
    json_only = {"j_text": b'{"caption": "from json"}', "j_number": b'{"caption": 7}', "j_null": b'{"caption": null}'}
    tar = [(key, {"jpg": jpg, "txt": text, "json": b'{"caption": "not this"}'}) for key, text in texts.items()]
    tar += [(key, {"jpg": jpg, "json": text}) for key, text in json_only.items()]
    write_tar(tmp_path / "0.tar", tar)
    found = {image.image_id: image.caption for image in images_of(read(quiet(), group_of(tmp_path, "0.tar"))[0])}
    assert found == {
        "bad": "caf\ufffd \ufffd", "bom": "with a mark", "empty": "", "utf8": "naïve ☃\n",
        "j_text": "from json", "j_number": None, "j_null": None,
    }  # fmt: skip


def test_a_caption_from_the_row(tmp_path: Path) -> None:
    jpg = encoded(picture(1))
    write_tar(tmp_path / "0.tar", [("a", {"jpg": jpg}), ("b", {"jpg": jpg, "txt": b"of the tar"}), ("c", {"jpg": jpg})])
    write_rows(tmp_path / "0.parquet", {"key": ["a", "b", "c"], "caption": ["of the row", "unused", None]})
    found = images_of(read(quiet(), group_of(tmp_path, "0.tar"))[0])
    assert [image.caption for image in found] == ["of the row", "of the tar", None]
    assert [image.original_caption for image in found] == ["of the row", "of the tar", None]
    assert found[1].metadata["caption"] == "unused"


# ------------------------------------------------------------------------------------------------------ metadata: JSON


def test_metadata_of_tars_without_parquet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    jpg = encoded(picture(1))
    fields = {"key": "good", "n": 3, "x": 0.5, "none": None, "list": [1, {"a": "ü"}], "shard": "theirs"}
    deep = b'{"a":' * 100 + b"1" + b"}" * 100
    texts = {
        "good": json.dumps(fields).encode(), "garbage": b"{not json", "list": b"[1, 2]", "deep": deep, "empty": b"",
        "half": b'{"t": "a\\ud800b", "\\udfff": 1, "whole": "\\ud83d\\ude00"}', "utf16": '{"t": "ü"}'.encode("utf-16"),
        "latin": b'{"t": "caf\xe9"}',
    }  # fmt: skip
    tar = [(key, {"jpg": jpg, "json": text}) for key, text in texts.items()]
    write_tar(tmp_path / "0.tar", [*tar, ("without", {"jpg": jpg})])
    (batch,), counts = read(quiet(), group_of(tmp_path, "0.tar"))
    assert {image.image_id: image.metadata for image in batch.data} == {
        "good": fields, "garbage": {}, "list": {}, "deep": {}, "empty": {}, "without": {},
        "half": {"t": "a?b", "?": 1, "whole": "\U0001f600"}, "utf16": {"t": "ü"}, "latin": {"t": "caf\ufffd"},
    }  # fmt: skip
    assert batch.data[0].files["json"] == texts["good"]
    assert counts == {}
    assert batch.fields == pa.schema([])
    assert caplog.text.count("its JSON") == 1  # one line for a shard


# --------------------------------------------------------------------------------------------------- metadata: Parquet


@pytest.mark.parametrize("folder", ["resized", "as_is"])
def test_img2dataset(folder: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(IMG2DATASET) as packed:
        packed.extractall(tmp_path)
    tars = sorted(path.name for path in (tmp_path / folder).glob("*.tar"))
    rows = {path.stem: pq.read_table(path) for path in (tmp_path / folder).glob("*.parquet")}
    good = {
        (shard, row["key"]): row
        for shard, table in rows.items()
        for row in table.to_pylist()
        if row["status"] == "success"
    }
    failed = sum(len(table) for table in rows.values()) - len(good)
    batches, counts = read(quiet(on_error="keep"), group_of(tmp_path / folder, *tars))
    found = images_of(batches)
    assert {(image.shard, image.image_id): image.metadata for image in found} == good
    assert len(found) == len(good)
    assert counts == {"rows_without_sample": failed}
    assert failed > 0
    # Where there is no caption, img2dataset writes null and an empty text.
    assert all(image.caption == (image.metadata["caption"] or "") for image in found)
    assert {batch.data[0].shard: batch.fields.names for batch in batches} == {
        shard: table.schema.names for shard, table in rows.items() if (shard in {one for one, _ in good})
    }


@pytest.mark.parametrize("window", [3, 10_000])
def test_rows_in_another_order_than_the_samples(tmp_path: Path, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_rows, "WINDOW_ROWS", window)
    monkeypatch.setattr(sample_rows, "_PYTHON_ROWS", 2)
    keys = [f"{number:04d}" for number in range(20)]
    write_tar(tmp_path / "0.tar", [sample(number, key) for number, key in enumerate(keys)])
    shuffled = np.random.default_rng(0).permutation(20)
    ids = [keys[number] for number in shuffled] + ["0003", "absent", None]
    table = pa.table({"key": ids, "seed": [*shuffled.tolist(), -1, -1, -1]})
    pq.write_table(table.filter(pa.array([one not in ("0005", "0019") for one in ids])), tmp_path / "0.parquet")
    batches, counts = read(quiet(batch_size=7), group_of(tmp_path, "0.tar"))
    found = images_of(batches)
    assert [image.image_id for image in found] == keys
    assert [image.metadata["seed"] for image in found] == list(range(20))  # two of them from the sample's JSON
    assert [len(image.metadata) for image in found] == [2] * 20
    assert found[5].metadata == {"key": "0005", "seed": 5}
    assert counts == {"rows_without_sample": 2, "repeated_rows": 1, "samples_without_row": 2}


def test_integers_name_zero_padded_keys(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [sample(1, "00007"), sample(2, "00010"), sample(3, "00002")])
    write_rows(tmp_path / "0.parquet", {"uid": [10, 2, 7], "said": ["ten", "two", "seven"]})
    found = images_of(read(quiet(id_col="uid"), group_of(tmp_path, "0.tar"))[0])
    assert [image.metadata["said"] for image in found] == ["seven", "ten", "two"]
    assert [image.metadata["uid"] for image in found] == [7, 10, 2]


def test_ids_that_live_in_the_json(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [sample(1, "00000", uid="c"), sample(2, "00001", uid="a"), sample(3, "00002")])
    write_rows(tmp_path / "0.parquet", {"uid": ["a", "b", "c"], "said": ["A", "B", "C"]})
    batches, counts = read(quiet(id_col="uid"), group_of(tmp_path, "0.tar"))
    assert [image.metadata.get("said") for image in images_of(batches)] == ["C", "A", None]
    assert counts == {"rows_without_sample": 1, "samples_without_row": 1}


def test_all_types_come_as_plain_values(tmp_path: Path) -> None:
    when = datetime.datetime(2024, 5, 6, 7, 8, 9, tzinfo=datetime.UTC)
    nested = pa.struct([("a", pa.int16()), ("b", pa.string())])
    columns = {
        "key": pa.array(["a", "b"]),
        "shard": pa.array(["0", "0"]).dictionary_encode(),
        "word": pa.array(["x", None]).dictionary_encode(),
        "big": pa.array(["long", "text"], pa.large_string()),
        "raw": pa.array([b"\0\1", None], pa.large_binary()),
        "whole": pa.array([2**62, None], pa.int64()),
        "half": pa.array([0.5, float("inf")], pa.float32()),
        "yes": pa.array([True, None]),
        "when": pa.array([when, None], pa.timestamp("us", "UTC")),
        "money": pa.array([Decimal("1.50"), None], pa.decimal128(9, 2)),
        "vector": pa.array([[1.0, 2.0, 0.5], None], pa.list_(pa.float32(), 3)),
        "nested": pa.array([[{"a": 1, "b": "z"}], []], pa.large_list(nested)),
        "nothing": pa.nulls(2),
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "0.parquet")
    write_tar(tmp_path / "0.tar", [sample(1, "a"), sample(2, "b")])
    (batch,), _ = read(quiet(), group_of(tmp_path, "0.tar"))
    assert [image.metadata for image in batch.data] == [
        {
            "key": "a", "word": "x", "big": "long", "raw": b"\0\1", "whole": 2**62, "half": 0.5, "yes": True,
            "when": when, "money": Decimal("1.50"), "vector": [1.0, 2.0, 0.5], "nested": [{"a": 1, "b": "z"}],
            "nothing": None,
        },
        {
            "key": "b", "word": None, "big": "text", "raw": None, "whole": None, "half": float("inf"), "yes": None,
            "when": None, "money": None, "vector": None, "nested": [], "nothing": None,
        },
    ]  # fmt: skip
    kinds = {one.name: one.type for one in batch.fields}
    assert kinds == {
        "key": pa.string(), "word": pa.string(), "big": pa.string(), "raw": pa.binary(), "whole": pa.int64(),
        "half": pa.float32(), "yes": pa.bool_(), "when": pa.timestamp("us", "UTC"), "money": pa.decimal128(9, 2),
        "vector": pa.list_(pa.float32()), "nested": pa.list_(nested),
        "nothing": pa.null(),
    }  # fmt: skip
    # So that a writer can write them again.
    for one in batch.fields:
        again = pa.array([image.metadata[one.name] for image in batch.data], one.type)
        assert again.to_pylist() == [image.metadata[one.name] for image in batch.data]


def test_a_column_shard(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [sample(1, "a")])
    # Ours by its type, or by the footer.
    plain = pa.table({"key": ["a"], "shard": ["theirs"]})
    for table, footer, names in [
        (pa.table({"key": ["a"], "shard": pa.array(["0"]).cast(schema.SHARD_TYPE)}), None, ["key"]),
        (plain, Footer(), ["key"]),
        (plain, None, ["key", "shard"]),
    ]:
        write_table(str(tmp_path / "0.parquet"), table, footer)
        (batch,), _ = read(quiet(), group_of(tmp_path, "0.tar"))
        assert (batch.fields.names, list(batch.data[0].metadata)) == (names, names)


def test_text_that_is_no_utf8_in_parquet(tmp_path: Path) -> None:
    bad = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 4, 5], np.int32)), pa.py_buffer(b"caf\xe9x"))
    pq.write_table(pa.table({"key": ["a", "b"], "said": bad}), tmp_path / "0.parquet")
    write_tar(tmp_path / "0.tar", [sample(1, "a"), sample(2, "b")])
    found = images_of(read(quiet(), group_of(tmp_path, "0.tar"))[0])
    assert [image.metadata["said"] for image in found] == ["caf\ufffd", "x"]


def test_a_value_that_python_has_no_place_for(tmp_path: Path) -> None:
    late = pa.array([2**55], pa.timestamp("ms"))
    pq.write_table(pa.table({"key": ["a"], "when": late}), tmp_path / "0.parquet")
    write_tar(tmp_path / "0.tar", [sample(1, "a")])
    with pytest.raises(MetadataFileError, match=r"0\.parquet: column 'when' holds a value that Python has no place"):
        read(quiet(), group_of(tmp_path, "0.tar"))


# ----------------------------------------------------------------------------------------------- samples without image


def test_samples_without_an_image(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [sample(1, "a"), ("b", {"txt": b"no picture", "json": b'{"n": 1}'}), sample(2, "c")])
    group = group_of(tmp_path, "0.tar")
    batches, counts = read(quiet(batch_size=2), group)
    assert [(batch.task_id, [image.image_id for image in batch.data]) for batch in batches] == [
        ("0:0", ["a"]), ("0:2", ["c"])
    ]  # fmt: skip
    assert counts == {"samples_without_image": 1}

    batches, counts = read(quiet(on_error="keep"), group)
    assert counts == {"samples_without_image": 1}
    _, image, _ = images_of(batches)
    assert image.image_error == "missing: sample 'b' of 0.tar has no image, only txt, json"
    assert (image.caption, image.metadata, image.image_path) == ("no picture", {"n": 1}, f"{tmp_path}/0.tar/b")
    assert (image.image_bytes, image.image_data, image.width) == (None, None, None)

    with pytest.raises(ImageError, match=r"0\.tar/b: sample 'b' of 0\.tar has no image.*on_error='skip'") as caught:
        read(quiet(on_error="raise"), group)
    assert caught.value.category == "missing"


def test_tars_without_anything(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [])
    write_tar(tmp_path / "1.tar", [("b", {"txt": b"no picture"})])
    write_tar(tmp_path / "2.tar", [])
    write_rows(tmp_path / "2.parquet", {"key": ["a", "b"]})  # all of img2dataset's downloads failed
    batches, counts = read(quiet(), group_of(tmp_path, "0.tar", "1.tar", "2.tar"))
    assert batches == []
    assert counts == {"samples_without_image": 1, "rows_without_sample": 2}


# -------------------------------------------------------------------------------------------------------------- memory


def test_batches_close_where_their_files_would_take_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [40, 50, 10, 1, 500, 2, 99, 1, 1]
    write_tar(tmp_path / "0.tar", [(str(number), {"jpg": b"x" * size}) for number, size in enumerate(sizes)])
    monkeypatch.setattr(samples, "CHUNK_BYTES", 100)
    for limit, expected in [(100, [3, 1, 1, 1, 2, 1]), (2, [2, 2, 1, 1, 2, 1])]:
        chunks = list(samples.tar_chunks(f"{tmp_path}/0.tar", group_of(tmp_path), size=limit, id_col="key"))
        assert [len(chunk.images) for chunk in chunks] == expected
        firsts = np.cumsum([0, *expected])[:-1].tolist()
        assert [chunk.first for chunk in chunks] == firsts
    # What stays in the tar does not count.
    monkeypatch.setattr(samples, "SMALL", 30)
    write_tar(tmp_path / "1.tar", [(str(number), {"jpg": b"x" * 30, "npy": b"y" * 31}) for number in range(4)])
    chunks = list(samples.tar_chunks(f"{tmp_path}/1.tar", group_of(tmp_path), size=9, id_col="key"))
    assert [len(chunk.images) for chunk in chunks] == [3, 1]


def test_neighbours_are_fetched_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    real = samples.ShardReader.read_many

    def read_many(self: Any, members: Any) -> Any:
        members = list(members)
        asked.append([member.name for member in members])
        return real(self, members)

    monkeypatch.setattr(samples.ShardReader, "read_many", read_many)
    tar = [("a", {"txt": b"1"}), ("b", {"txt": b"2"}), ("a", {"jpg": encoded(picture(1))})]
    write_tar(tmp_path / "0.tar", [*tar, ("b", {"jpg": encoded(picture(2))}), sample(3, "c")])
    assert len(images_of(read(quiet(batch_size=2), group_of(tmp_path, "0.tar"))[0])) == 3
    assert asked == [["a.txt", "b.txt", "a.jpg", "b.jpg"], ["c.jpg", "c.json"]]


# -------------------------------------------------------------------------------------------------------------- remote


def test_a_remote_tar(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"00000": 5, "x/00001": 4})
    fs = fsspec.filesystem("memory")
    for path in tmp_path.rglob("*.*"):
        fs.pipe_file(f"/reader-test/{path.relative_to(tmp_path)}", path.read_bytes())
    for path in tmp_path.glob("*.tar"):
        write_idx(index_tar(path), idx_url(f"memory://reader-test/{path.name}"))
    tars = ("00000.tar", "x/00001.tar")
    try:
        for use_index_files in (False, True):
            remote = group_of("memory://reader-test", *tars, storage_options={"skip_instance_cache": True})
            stage = quiet(batch_size=2, use_index_files=use_index_files)
            batches, counts = read(stage, remote)
            local, _ = read(stage, group_of(tmp_path, *tars))
            assert counts == {}
            for one, other in zip(images_of(batches), images_of(local), strict=True):
                assert (one.image_id, one.shard, one.files) == (other.image_id, other.shard, other.files)
                assert (one.metadata, one.caption) == (other.metadata, other.caption)
                assert one.image_path.startswith("memory://reader-test/")
            back = pickle.loads(pickle.dumps(batches[0].data[0]))
            assert back.source.storage_options == {"skip_instance_cache": True}
            assert back.image_bytes == batches[0].data[0].files["jpg"]
    finally:
        fs.rm("/reader-test", recursive=True)


def test_index_files_are_read_only_if_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_dataset(tmp_path, {"00000": 3})
    (tmp_path / "00000.idx").write_text("nonsense")
    group = group_of(tmp_path, "00000.tar")
    assert len(images_of(read(quiet(), group)[0])) == 3
    assert "00000.idx" not in caplog.text
    assert len(images_of(read(quiet(use_index_files=True), group)[0])) == 3
    assert "00000.idx: begins with b'nonsense'" in caplog.text


# -------------------------------------------------------------------------------------------------------------- errors


def test_tars_that_cannot_be_read(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"00000": 3, "00001": 3})
    whole = (tmp_path / "00001.tar").read_bytes()
    (tmp_path / "00001.tar").write_bytes(whole[: len(whole) // 2])
    group = group_of(tmp_path, "00000.tar", "00001.tar")
    stream = quiet().stream(iter([group]), group)
    assert [image.image_id for image in next(stream).data] == ["000000", "000001", "000002"]
    with pytest.raises(TarError, match=r"00001\.tar"):
        next(stream)
    with pytest.raises(TarError, match=r"absent\.tar: no such tar"):
        read(quiet(), group_of(tmp_path, "absent.tar"))
    with pytest.raises(ShardError, match=r"00000\.parquet does not end in \.tar.*file_extensions"):
        read(quiet(), group_of(tmp_path, "00000.parquet"))


def test_a_tar_that_may_have_been_cut_off_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_dataset(tmp_path, {"00000": 3})
    with tarfile.open(tmp_path / "00000.tar") as tar:
        end = tar.getmembers()[-1]
    data = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(data[: end.offset_data + -(-end.size // 512) * 512])
    batches, counts = read(quiet(), group_of(tmp_path, "00000.tar"))
    assert len(images_of(batches)) == 3
    assert counts == {"tars_without_end_mark": 1}
    assert "00000.tar has no end mark" in caplog.text


def test_metadata_that_cannot_be_used(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"00000": 3})
    group = group_of(tmp_path, "00000.tar")
    with pytest.raises(MetadataFileError, match=r"00000\.parquet has no column 'uid' \(id_col\); it has key, caption"):
        read(quiet(id_col="uid"), group)
    write_rows(tmp_path / "00000.parquet", {"key": ["x", "y"], "n": [1, 2]})
    with pytest.raises(IdMismatchError, match=r"none of the 2 values of 'key' in .*00000\.parquet .*'x'.*'000000'"):
        read(quiet(), group)
    (tmp_path / "00000.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(MetadataFileError, match=r"00000\.parquet: cannot be read as Parquet"):
        read(quiet(), group)


def test_a_parquet_file_without_rows(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"00000": 3})
    pq.write_table(pa.table({"key": pa.array([], pa.string())}), tmp_path / "00000.parquet")
    batches, counts = read(quiet(), group_of(tmp_path, "00000.tar"))
    assert [image.metadata["seed"] for image in images_of(batches)] == [0, 1, 2]
    assert counts == {"samples_without_row": 3}


def test_leaving_early_closes_everything(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"00000": 6})
    group = group_of(tmp_path, "00000.tar")
    before = set(threading.enumerate())
    stream: Any = quiet(batch_size=1).stream(iter([group]), group)
    next(stream)
    assert any(one.name == "nemo-image-prefetch" for one in set(threading.enumerate()) - before)
    stream.close()
    assert not any(one.name == "nemo-image-prefetch" for one in set(threading.enumerate()) - before)


# ----------------------------------------------------------------------------------------------------------------- log


def test_one_line_a_file_group(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    jpg = encoded(picture(1))
    tar = [("a", {"jpg": jpg}), ("b", {"jpg": jpg[:300]}), ("c", {"jpg": b"<html>"}), ("d", {"txt": b""})]
    write_tar(tmp_path / "0.tar", [*tar, ("e", {"jpg": b"<html>"}), ("f", {"jpg": jpg})])
    group = group_of(tmp_path, "0.tar")
    with caplog.at_level(logging.INFO, "nemo_image"):
        _, counts = read(ImageReaderStage(), group)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("image_reader: g-0: 2 images, 4 bad (1 missing, 1 truncated, 2 unknown), ")
    assert line.endswith(" images/s")
    assert counts == {"samples_without_image": 1, "error: truncated": 1, "error: unknown": 2, "skipped": 3}
    caplog.clear()
    with caplog.at_level(logging.INFO, "nemo_image"):
        read(quiet(), group)
    assert caplog.records == []


# ------------------------------------------------------------------------------------------------------------- threads


def test_the_tasks_share_is_asked_for_in_the_tasks_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path, {"00000": 2})
    group = group_of(tmp_path, "00000.tar")
    asked: list[Any] = []
    used: Counter[int] = Counter()
    real = pixels_ahead.for_each_row

    def task_share() -> int:
        asked.append(threading.current_thread())
        return 3

    def for_each_row(one: Any, count: int, num_threads: int) -> None:
        used[num_threads] += 1
        real(one, count, num_threads)

    monkeypatch.setattr(threads, "task_share", task_share)
    monkeypatch.setattr(pixels_ahead, "for_each_row", for_each_row)
    for limit in (8, 2):
        stage = copy.copy(quiet(num_threads=limit))
        assert len(list(prefetch(stage.stream(iter([group]), group)))) == 1
    assert asked == [threading.main_thread()] * 2
    assert used == {3: 1, 2: 1}
