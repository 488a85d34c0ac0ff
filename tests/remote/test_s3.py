"""Datasets on an S3 server: read, enriched, exported and resumed there, with the same results as on a local disk."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from nemo_image.backend import to_matrix
from nemo_image.cli import main
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import TimmImageEmbedder
from nemo_image.engine import lease
from nemo_image.engine.run_lock import run_lock
from nemo_image.errors import DatasetError, OutputBusyError, RunError
from nemo_image.schema import FOOTER_KEY
from nemo_image.shards import files, parquet, retries
from tests.makers import TINY_MODEL, make_dataset
from tests.remote.everywhere import environment
from tests.remote.servers import Front

pytestmark = pytest.mark.filterwarnings("ignore:.*is a random network.*")

SIZES = {"00000": 5, "00001": 4, "00002": 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset on the local disk."""
    return make_dataset(tmp_path_factory.mktemp("made") / "in", SIZES)


@pytest.fixture
def store(bucket: str, made: Path) -> Any:
    """s3fs, asked directly; the dataset is at ``<bucket>/in``."""
    import s3fs

    fs = s3fs.S3FileSystem(use_listings_cache=False)
    for path in made.iterdir():
        fs.pipe_file(f"{bucket}/in/{path.name}", path.read_bytes())
    return fs


def _embedded(root: str, **options: Any) -> ImageTextPairDataset:
    dataset = ImageTextPairDataset.from_webdataset(root, **options)
    return TimmImageEmbedder(TINY_MODEL, autocast=False)(dataset)


def _matrix(dataset: ImageTextPairDataset) -> np.ndarray:
    frame = dataset.metadata.compute().sort_values(["shard", "key"])
    matrix, rows = to_matrix(frame["image_embedding"])
    assert len(rows) == len(frame)
    return np.asarray(matrix)


def _uploads(store: Any, bucket: str) -> list[Any]:
    return list(store.list_multipart_uploads(bucket.removeprefix("s3://")))


# Reading and saving ---------------------------------------------------------------------------------------------------


def test_a_dataset_is_enriched_in_place_and_once(s3: Front, bucket: str, store: Any, made: Path) -> None:
    root = f"{bucket}/in"
    before = {name: store.cat_file(f"{root}/{name}") for name in ("00000.tar", "00001.tar", "00002.tar")}
    saved = _embedded(root).save_metadata()
    assert saved.run_totals["shards"] == {"done": 3, "skipped": 0, "failed": 0}
    oracle = _matrix(_embedded(str(made)))
    assert np.array_equal(_matrix(saved), oracle)
    assert {name: store.cat_file(f"{root}/{name}") for name in before} == before
    s3.requests.clear()
    again = _embedded(root).save_metadata()
    assert again.run_totals["shards"] == {"done": 0, "skipped": 3, "failed": 0}
    assert s3.count("GET", ".tar") == 0
    assert s3.count("PUT", ".parquet") == 0
    assert _uploads(store, bucket) == []


def test_what_is_missing_is_filled(s3: Front, bucket: str, store: Any) -> None:
    root = f"{bucket}/in"
    _embedded(root).save_metadata(f"{bucket}/out")
    store.rm_file(f"{bucket}/out/00001.parquet")
    store.pipe_file(f"{root}/00002.tar", store.cat_file(f"{root}/00002.tar") + bytes(512))  # another etag and size
    s3.requests.clear()
    again = _embedded(root).save_metadata(f"{bucket}/out")
    assert again.run_totals["shards"] == {"done": 2, "skipped": 1, "failed": 0}
    assert s3.count("GET", "00000.tar") == 0
    assert s3.count("GET", "00001.tar") > 0
    assert len(_matrix(again)) == 12


@pytest.fixture
def options(s3: Front, store: Any, everywhere: Any) -> Iterator[dict[str, Any]]:
    """What names the server and its keys, once the environment does not."""
    options = {"key": "key", "secret": "secret", "client_kwargs": {"region_name": "us-east-1"}}
    options["endpoint_url"] = os.environ["AWS_ENDPOINT_URL"]
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    with environment(everywhere, dict.fromkeys(names)):
        yield options


def test_storage_options_are_carried_along(bucket: str, options: dict[str, Any]) -> None:
    lazy = _embedded(f"{bucket}/in", storage_options=options)
    lazy.metadata["kept"] = lazy.metadata["score"] >= 0.5
    exported = lazy.to_webdataset(f"{bucket}/new", filter_column="kept", samples_per_shard=4)
    assert len(exported.metadata) == 7
    assert len(_matrix(exported)) == 7


def test_storage_options_are_carried_to_workers(bucket: str, options: dict[str, Any], cluster: Any) -> None:
    dataset = ImageTextPairDataset.from_webdataset(f"{bucket}/in", storage_options=options)
    dataset.metadata["double"] = dataset.metadata["seed"] * 2
    with cluster.as_current():
        saved = dataset.save_metadata(f"{bucket}/out")
        assert saved.run_totals["shards"]["done"] == 3
        assert sorted(saved.metadata["double"].compute()) == list(range(0, 24, 2))


def test_globs_lists_and_braces(bucket: str, store: Any) -> None:
    for path in (
        f"{bucket}/in/*.tar",
        f"{bucket}/in/0000[0-2].tar",
        f"{bucket}/in/{{00000..00002}}.tar",
        [f"{bucket}/in/0000{number}.tar" for number in range(3)],
    ):
        dataset = ImageTextPairDataset.from_webdataset(path)
        assert list(dataset.shards) == ["00000", "00001", "00002"]
        assert len(dataset.metadata) == 12
    with pytest.raises(DatasetError, match="00009"):
        ImageTextPairDataset.from_webdataset(f"{bucket}/in/{{00000,00009}}.tar")
    with pytest.raises(DatasetError, match="no such folder"):
        ImageTextPairDataset.from_webdataset(f"{bucket}/nothing")
    with pytest.raises((DatasetError, OSError), match="bucket"):
        ImageTextPairDataset.from_webdataset("s3://no-such-bucket-at-all/in")


def test_what_another_process_writes_is_seen(bucket: str, store: Any, made: Path) -> None:
    """s3fs remembers listings for ever."""
    root = f"{bucket}/in"
    assert len(ImageTextPairDataset.from_webdataset(root).shards) == 3
    summary = parquet.read_summary(f"{root}/00000.parquet")
    for suffix in ("tar", "parquet"):
        store.pipe_file(f"{root}/00003.{suffix}", (made / f"00001.{suffix}").read_bytes())
    store.pipe_file(f"{root}/00000.parquet", (made / "00002.parquet").read_bytes())
    assert len(ImageTextPairDataset.from_webdataset(root).shards) == 4
    assert files.exists(f"{root}/00003.tar")
    assert parquet.summary_or_none(f"{root}/00003.parquet") is not None
    assert (summary.rows, parquet.read_summary(f"{root}/00000.parquet").rows) == (5, 3)


# Ranges ---------------------------------------------------------------------------------------------------------------


def test_one_sample_of_a_large_tar_is_not_the_tar(s3: Front, bucket: str, made: Path) -> None:
    """A frame of one row reads the headers and that picture; headers are 1 MiB apart or more here."""
    import s3fs

    from tests.makers import sample, write_tar

    fs = s3fs.S3FileSystem(use_listings_cache=False)
    ballast = [(f"{number:06d}", {**sample(number, "x")[1], "bin": bytes(3 * 2**20)}) for number in range(8)]
    write_tar(made.parent / "large.tar", ballast)
    table = {"key": [key for key, _ in ballast]}
    pq.write_table(pa.table(table), made.parent / "large.parquet")
    for suffix in ("tar", "parquet"):
        fs.pipe_file(f"{bucket}/large/x.{suffix}", (made.parent / f"large.{suffix}").read_bytes())
    dataset = ImageTextPairDataset.from_webdataset(f"{bucket}/large")
    dataset.metadata = dataset.metadata[dataset.metadata["key"] == "000005"]
    s3.requests.clear()
    assert len(_matrix(TimmImageEmbedder(TINY_MODEL, autocast=False)(dataset))) == 1
    size = (made.parent / "large.tar").stat().st_size
    assert size > 24 * 2**20
    assert 0 < s3.served("x.tar") < size / 10
    assert all(one.range is not None for one in s3.requests if one.method == "GET" and one.path.endswith(".tar"))


# Writing --------------------------------------------------------------------------------------------------------------


def _write(url: str, size: int, error: BaseException | None = None) -> None:
    with files.atomic_writer(url, {"default_block_size": 5 * 2**20}) as file:
        for _ in range(size // 2**20):
            file.write(bytes(2**20))
        if error is not None:
            raise error


@pytest.mark.parametrize("size", [2 * 2**20, 12 * 2**20])
def test_an_upload_given_up_leaves_nothing(bucket: str, store: Any, size: int) -> None:
    with pytest.raises(RuntimeError, match="mine"):
        _write(f"{bucket}/x.tar", size, RuntimeError("mine"))
    assert [name for name in store.find(bucket) if "/in/" not in name] == []
    assert _uploads(store, bucket) == []
    _write(f"{bucket}/x.tar", size)
    assert store.info(f"{bucket}/x.tar")["size"] == size


@pytest.mark.parametrize("failing", ["begin", "part", "complete"])
def test_an_upload_that_fails_leaves_nothing(s3: Front, bucket: str, store: Any, failing: str) -> None:
    store.pipe_file(f"{bucket}/x.tar", b"before")
    count = {"POST": 0, "PUT": 0}

    def fault(method: str, path: str, number: int) -> str | None:
        if path.endswith("x.tar") and method in count:
            count[method] += 1
            begins = method == "POST" and count["POST"] == 1
            ends = method == "POST" and count["POST"] > 1
            return "503" if {"begin": begins, "part": method == "PUT", "complete": ends}[failing] else None
        return None

    s3.fault = fault
    with pytest.raises(OSError, match=r"s3://.*/x.tar: the upload failed \("):
        _write(f"{bucket}/x.tar", 12 * 2**20)
    assert sum(count.values()) > 0
    s3.fault = lambda method, path, number: None
    assert store.cat_file(f"{bucket}/x.tar") == b"before"
    assert _uploads(store, bucket) == []


def test_a_completion_without_answer(s3: Front, bucket: str, store: Any) -> None:
    """The store has it, and the writer does not know: it is whole, or an error is raised, or both; never half."""
    posts = []

    def fault(method: str, path: str, number: int) -> str | None:
        if method == "POST" and path.endswith("x.tar"):
            posts.append(path)
            return "drop" if len(posts) == 2 else None
        return None

    s3.fault = fault
    try:
        _write(f"{bucket}/x.tar", 12 * 2**20)
    except OSError as error:
        assert not isinstance(error, FileNotFoundError)  # noqa: PT017
        assert "x.tar: the upload failed" in str(error)  # noqa: PT017
    assert store.info(f"{bucket}/x.tar")["size"] == 12 * 2**20
    assert _uploads(store, bucket) == []


def test_a_store_that_is_out_of_order_for_a_while(s3: Front, bucket: str, store: Any, made: Path) -> None:
    s3.every(4, "503", "cut", "drop")
    saved = _embedded(f"{bucket}/in").save_metadata(f"{bucket}/out")
    oracle = _matrix(_embedded(str(made)))
    assert np.array_equal(_matrix(saved), oracle)


def test_a_store_that_stays_out_of_order(s3: Front, bucket: str, store: Any) -> None:
    lazy = _embedded(f"{bucket}/in")
    s3.fault = lambda method, path, number: "503" if path.endswith("00001.tar") else None
    with pytest.raises(RunError, match=r"1 of 3 shards failed.*00001.*5 tries") as caught:
        lazy.save_metadata(f"{bucket}/out", max_failure_ratio=1)
    assert list(caught.value.failures) == ["00001"]
    s3.fault = lambda method, path, number: None
    totals = lazy.save_metadata(f"{bucket}/out").run_totals
    assert totals["shards"] == {"done": 1, "skipped": 2, "failed": 0}


# One run at a time ----------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import contextvars

    monkeypatch.setattr(lease, "BEAT_S", 0.05)

    def take(part: tuple[int, int] | None = None) -> None:
        with run_lock(f"{bucket}/out", "second", part=part):
            pass

    with run_lock(f"{bucket}/out", "first"):
        assert files.list_files(f"{bucket}/out/_nemo_image", "") == ["run.lock"]
        with pytest.raises(OutputBusyError, match="first on"):
            contextvars.Context().run(take)
        with pytest.raises(OutputBusyError, match="first on"):
            contextvars.Context().run(take, (1, 2))
    contextvars.Context().run(take)
    assert not files.exists(f"{bucket}/out")


def test_the_lease_is_made_once(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that find none, the store lets one make it."""
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    fs, path = files.open_fs(f"{bucket}/out/_nemo_image/run.lock")
    first, second = (lease.Lease(fs, path, bucket, lease.Holder(name), list) for name in ("first", "second"))
    seen = iter([None])
    monkeypatch.setattr(second, "_read", lambda path: next(seen, first._holder.to_bytes()))
    first.acquire()
    with pytest.raises(OutputBusyError, match="first on"):
        second.acquire()
    first.release()


def test_a_bucket_that_is_not_there(s3: Front) -> None:
    with pytest.raises(OSError, match=r"s3://no-such-bucket-at-all/out: cannot be written to .*bucket"):  # noqa: SIM117
        with run_lock("s3://no-such-bucket-at-all/out", "curate"):
            pass
    with pytest.raises(OSError, match=r"s3://no-such-bucket-at-all/x: the upload failed .*bucket"):  # noqa: SIM117
        with files.atomic_writer("s3://no-such-bucket-at-all/x") as file:
            file.write(b"1")


# The same as on a local disk ------------------------------------------------------------------------------------------


def _curate(source: str, out: str) -> dict[str, Any]:
    options = ["--model", TINY_MODEL, "--no-autocast", "--json", "--keep", "score < 1.0", "--samples-per-shard", "4"]
    done = CliRunner().invoke(main, ["curate", source, out, *options, "--shuffle-seed", "3"])
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


def _objects(root: str) -> dict[str, bytes]:
    fs, path = files.open_fs(root)
    names = [name for name in fs.find(path) if not name.endswith((".jsonl", ".lock"))]
    return {name.removeprefix(path).lstrip("/"): fs.cat_file(name) for name in names}


def _parts(parquet_file: bytes) -> tuple[bytes, dict[str, Any]]:
    """Return a Parquet file's rows, as bytes, and our record in its footer."""
    footer_size = int.from_bytes(parquet_file[-8:-4], "little")
    with pq.ParquetFile(io.BytesIO(parquet_file)) as file:
        return parquet_file[: -footer_size - 8], json.loads(file.metadata.metadata[FOOTER_KEY])


def test_curate_is_the_same_on_s3_and_on_a_local_disk(
    bucket: str, store: Any, made: Path, tmp_path: Path, s3: Front
) -> None:
    local = _curate(str(made), str(tmp_path / "out"))
    remote = _curate(f"{bucket}/in", f"{bucket}/out")
    varying = ("input", "output", "seconds", "rows_per_second", "ledgers")
    assert {name: value for name, value in local.items() if name not in varying} == {
        name: value for name, value in remote.items() if name not in varying
    }
    ours, theirs = _objects(str(tmp_path / "out")), _objects(f"{bucket}/out")
    assert {name for name in ours if name.endswith(".tar")} == {"00000.tar", "00001.tar", "00002.tar"}
    assert sorted(ours) == sorted(theirs)
    tokens = [json.loads(objects["_nemo_image/export.json"])["token"].encode() for objects in (ours, theirs)]
    for name, data in ours.items():
        # What may differ: a source's time (local) or time and etag (S3) in the footers of the enriched rows, the
        # token of the export, which covers them, and where the source lies.
        if name.startswith("_nemo_image/enriched/") and name.endswith(".parquet"):
            (here, record), (there, other) = _parts(data), _parts(theirs[name])
            assert here == there, name
            assert {key for key in record if record[key] != other[key]} == {"source", "metadata_source"}
            assert record["source"]["size"] == other["source"]["size"]
            assert (record["source"]["etag"], len(other["source"]["etag"])) == (None, 34)
        elif name.endswith((".tar", ".idx", ".parquet")):
            assert data.replace(*tokens) == theirs[name], name
        else:
            assert data.replace(str(made.parent).encode(), bucket.encode()).replace(*tokens) == theirs[name], name
    s3.requests.clear()
    again = _curate(f"{bucket}/in", f"{bucket}/out")
    assert again["rows_out"] == 10
    totals = json.loads(files.read_bytes(again["ledgers"][0]).splitlines()[-1])["run"]
    assert totals["shards"] == {"done": 0, "skipped": 3, "failed": 0}
    assert s3.count("PUT", ".tar") == s3.count("PUT", ".parquet") == 0


def test_nothing_was_tried_again_without_need(bucket: str, store: Any, caplog: pytest.LogCaptureFixture) -> None:
    ImageTextPairDataset.from_webdataset(f"{bucket}/in").metadata.compute()
    assert "trying again" not in caplog.text
    assert retries.TRIES == 5
