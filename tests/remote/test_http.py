"""Datasets on a web server: read from there, saved and exported to a local disk or to S3."""

from __future__ import annotations

import datetime
import ipaddress
import shutil
import ssl
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_image.backend import to_matrix
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import TimmImageEmbedder
from nemo_image.engine.run_lock import run_lock
from nemo_image.errors import DatasetError, RunError, TarError
from nemo_image.shards import files
from nemo_image.shards.read import ShardReader
from nemo_image.shards.sources import open_file
from tests.makers import TINY_MODEL, make_dataset, sample, tar_members, write_rows, write_tar
from tests.remote.servers import Fault, Front, serving, static_app

pytestmark = pytest.mark.filterwarnings("ignore:.*is a random network.*")

SIZES = {"00000": 5, "00001": 4, "00002": 3}


@pytest.fixture
def made(folder: Path) -> Path:
    """A small dataset in a folder that the web servers serve."""
    return make_dataset(folder, SIZES)


def _embedded(path: Any, **options: Any) -> ImageTextPairDataset:
    dataset = ImageTextPairDataset.from_webdataset(path, **options)
    return TimmImageEmbedder(TINY_MODEL, autocast=False)(dataset)


def _matrix(dataset: ImageTextPairDataset) -> np.ndarray:
    frame = dataset.metadata.compute().sort_values(["shard", "key"])
    matrix, rows = to_matrix(frame["image_embedding"])
    assert len(rows) == len(frame)
    return np.asarray(matrix)


# Naming shards --------------------------------------------------------------------------------------------------------


def test_a_folder_that_the_server_lists(web_url: str, made: Path) -> None:
    for path in (f"{web_url}/{made.name}", f"{web_url}/{made.name}/"):
        dataset = ImageTextPairDataset.from_webdataset(path)
        assert list(dataset.shards) == list(SIZES)
        assert sorted(dataset.metadata["seed"].compute()) == list(range(12))


def test_shards_by_name(plain_url: str, made: Path, front: Front) -> None:
    root = f"{plain_url}/{made.name}"
    for path in (f"{root}/{{00000..00002}}.tar", [f"{root}/{name}.tar" for name in SIZES]):
        dataset = ImageTextPairDataset.from_webdataset(path)
        assert list(dataset.shards) == list(SIZES)
        assert len(dataset.metadata) == 12
    assert not any(one.path.endswith("/") for one in front.requests)


def test_a_folder_that_the_server_does_not_list(plain_url: str, made: Path) -> None:
    with pytest.raises(DatasetError, match=r"the web server lists no tars there: name them, as .*/\{00000\.\.00099\}"):
        ImageTextPairDataset.from_webdataset(f"{plain_url}/{made.name}")
    with pytest.raises(DatasetError, match="no such folder"):
        ImageTextPairDataset.from_webdataset(f"{plain_url}/nothing")


def test_a_tar_that_is_not_there(plain_url: str, made: Path, tmp_path: Path) -> None:
    (made / "00001.tar").unlink()
    lazy = _embedded(f"{plain_url}/{made.name}/{{00000..00002}}.tar")
    with pytest.raises(RunError, match=r"1 of 3 shards failed.*00001\.tar: no such tar") as caught:
        lazy.save_metadata(str(tmp_path / "out"), max_failure_ratio=1)
    assert list(caught.value.failures) == ["00001"]


def test_files_have_identities(web_url: str, made: Path) -> None:
    url = f"{web_url}/{made.name}/00000.tar"
    identity = files.identify(url)
    assert identity.size == (made / "00000.tar").stat().st_size
    assert identity.etag
    assert identity.modified is not None
    assert identity.modified.endswith("GMT")
    assert files.identify(url) == identity
    with open(made / "00000.tar", "ab") as file:
        file.write(bytes(512))
    assert files.identify(url) != identity


# The main job ---------------------------------------------------------------------------------------------------------


def test_save_and_resume(web_url: str, made: Path, front: Front, tmp_path: Path) -> None:
    root = f"{web_url}/{made.name}"
    saved = _embedded(root).save_metadata(str(tmp_path / "out"))
    assert saved.run_totals["shards"] == {"done": 3, "skipped": 0, "failed": 0}
    oracle = _embedded(str(made)).save_metadata(str(tmp_path / "local"))
    assert np.array_equal(_matrix(saved), _matrix(oracle))
    front.requests.clear()
    again = _embedded(root).save_metadata(str(tmp_path / "out"))
    assert again.run_totals["shards"] == {"done": 0, "skipped": 3, "failed": 0}
    assert front.served(".tar") == 0


def test_export(plain_url: str, made: Path, tmp_path: Path) -> None:
    dataset = ImageTextPairDataset.from_webdataset(f"{plain_url}/{made.name}/{{00000..00002}}.tar")
    dataset.metadata["kept"] = dataset.metadata["seed"] >= 2
    exported = dataset.to_webdataset(str(tmp_path / "out"), filter_column="kept", samples_per_shard=10, keep_ids=True)
    assert len(exported.metadata) == 10
    sources = {name: data for one in SIZES for name, data in tar_members(made / f"{one}.tar").items()}
    found = tar_members(tmp_path / "out" / "00000.tar")
    assert len(found) == 30
    assert found == {name: sources[name] for name in found}


def test_from_the_web_to_s3(plain_url: str, made: Path, bucket: str, front: Front) -> None:
    """Two storages in one run. The front knows one server, so the web is asked directly."""
    with serving(static_app(made)) as url:
        lazy = _embedded(url)
        saved = lazy.save_metadata(f"{bucket}/out")
        assert np.array_equal(_matrix(saved), _matrix(_embedded(str(made))))
        totals = lazy.save_metadata(f"{bucket}/out").run_totals
        assert totals["shards"]["skipped"] == 3


def test_a_web_server_cannot_be_written_to(plain_url: str, made: Path) -> None:
    dataset = ImageTextPairDataset.from_webdataset(f"{plain_url}/{made.name}/{{00000..00002}}.tar")
    with pytest.raises(Exception, match=r"http|write") as caught:
        TimmImageEmbedder(TINY_MODEL, autocast=False)(dataset).save_metadata()
    assert not isinstance(caught.value, AttributeError | TypeError)
    with run_lock(f"{plain_url}/{made.name}", "curate"):
        pass


# Ranges ---------------------------------------------------------------------------------------------------------------


def test_one_sample_of_a_large_tar_is_not_the_tar(web_url: str, folder: Path, front: Front) -> None:
    ballast = [(f"{number:06d}", {**sample(number, "x")[1], "bin": bytes(3 * 2**20)}) for number in range(8)]
    write_tar(folder / "x.tar", ballast)
    write_rows(folder / "x.parquet", {"key": [key for key, _ in ballast]})
    dataset = ImageTextPairDataset.from_webdataset(f"{web_url}/{folder.name}")
    dataset.metadata = dataset.metadata[dataset.metadata["key"] == "000005"]
    front.requests.clear()
    assert len(_matrix(TimmImageEmbedder(TINY_MODEL, autocast=False)(dataset))) == 1
    size = (folder / "x.tar").stat().st_size
    assert size > 24 * 2**20
    assert 0 < front.served("x.tar") < size / 10


def test_parquet_columns_are_read_alone(web_url: str, folder: Path, front: Front) -> None:
    wide = pa.array([bytes([row]) * 10_000 for row in range(200)], pa.binary())
    table = pa.table({"key": [str(row) for row in range(200)], "wide": wide})
    pq.write_table(table, folder / "x.parquet", compression="none", use_dictionary=False)
    with open_file(f"{web_url}/{folder.name}/x.parquet") as raw, pq.ParquetFile(raw) as file:
        assert file.read(columns=["key"]).column("key").to_pylist() == table["key"].to_pylist()
    assert (folder / "x.parquet").stat().st_size > 2_000_000
    assert front.served("x.parquet") < 100_000


# Bad servers ----------------------------------------------------------------------------------------------------------


def test_a_server_that_is_out_of_order_for_a_while(web_url: str, made: Path, front: Front, tmp_path: Path) -> None:
    root = f"{web_url}/{made.name}"
    front.every(4, "503", "short", "cut", "drop")
    saved = _embedded(root).save_metadata(str(tmp_path / "out"))
    assert np.array_equal(_matrix(saved), _matrix(_embedded(str(made))))
    assert saved.metadata["image_error"].compute().isna().all()


def _only(suffix: str, kind: str) -> Fault:
    return lambda method, path, number: kind if path.endswith(suffix) else None


def test_a_server_that_stays_out_of_order(plain_url: str, made: Path, front: Front, tmp_path: Path) -> None:
    lazy = _embedded(f"{plain_url}/{made.name}/{{00000..00002}}.tar")
    for kind, said in (("503", "503"), ("cut", "not completed"), ("short", "came: the transfer was cut off")):
        front.fault = _only("00001.tar", kind)
        with pytest.raises(RunError, match=rf"1 of 3 shards failed.*00001\.tar.*{said}.*5 tries") as caught:
            lazy.save_metadata(str(tmp_path / kind), max_failure_ratio=1)
        assert list(caught.value.failures) == ["00001"]


def test_a_parquet_file_out_of_reach_is_not_taken_for_missing(
    plain_url: str, made: Path, front: Front, tmp_path: Path
) -> None:
    """Its rows would be built from the tar, without what only it knows."""
    lazy = _embedded(f"{plain_url}/{made.name}/{{00000..00002}}.tar")
    front.fault = _only("00001.parquet", "503")
    with pytest.raises(RunError, match=r"00001\.parquet.*5 tries") as caught:
        lazy.save_metadata(str(tmp_path / "out"), max_failure_ratio=1)
    assert list(caught.value.failures) == ["00001"]
    front.fault = lambda method, path, number: None
    totals = lazy.save_metadata(str(tmp_path / "out")).run_totals
    assert totals["shards"] == {"done": 1, "skipped": 2, "failed": 0}


def test_a_server_that_ignores_ranges(web_url: str, made: Path, front: Front) -> None:
    url = f"{web_url}/{made.name}/00000.tar"
    front.every(1, "no ranges")
    with ShardReader(url) as reader, pytest.raises(TarError, match="the server ignores byte ranges: copy the file to"):
        reader.index  # noqa: B018
    front.every(1, "no length")
    with ShardReader(url) as reader, pytest.raises(TarError, match="the server does not tell the file's size"):
        reader.index  # noqa: B018


def test_a_tar_is_not_fetched_to_find_out(web_url: str, folder: Path, front: Front) -> None:
    """The server would send the whole tar for each range; the connection is closed at its first answer."""
    write_tar(folder / "x.tar", [("0", {"bin": bytes(24 * 2**20)})])
    front.every(1, "no ranges")
    with ShardReader(f"{web_url}/{folder.name}/x.tar") as reader, pytest.raises(TarError, match="ignores byte ranges"):
        reader.index  # noqa: B018
    assert front.served("x.tar") < 24 * 2**20


def test_a_server_that_dribbles(web_url: str, made: Path, front: Front) -> None:
    front.every(1, "dribble")
    with ShardReader(f"{web_url}/{made.name}/00002.tar") as reader:
        members = [member for found in reader.index.samples for member in found.members]
        read = dict(zip([member.name for member in members], reader.read_many(members), strict=True))
    assert read == tar_members(made / "00002.tar")


def test_a_tar_replaced_while_it_is_read(web_url: str, made: Path) -> None:
    with ShardReader(f"{web_url}/{made.name}/00000.tar") as reader:
        last = reader.index.samples[-1].members[-1]
        shutil.copyfile(made / "00002.tar", made / "00000.tar")
        with pytest.raises(TarError, match=r"00000\.tar: cannot be read"):
            reader.read(last)


# HTTPS ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1 that only who is told to trusts, with its key."""
    x509 = pytest.importorskip("cryptography.x509", reason="needs cryptography, which moto brings")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "loopback")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now - datetime.timedelta(days=1))
    made = made.not_valid_after(now + datetime.timedelta(days=1)).add_extension(address, critical=False)
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    form = serialization.Encoding.PEM
    secret = key.private_bytes(form, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(secret + made.sign(key, hashes.SHA256()).public_bytes(form))
    return path


@pytest.mark.in_process("a context of certificates does not travel")
def test_https(certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path / "in", {"00000": 3})
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    with serving(static_app(tmp_path / "in"), tls) as url:
        assert url.startswith("https://")
        trust = {"ssl": ssl.create_default_context(cafile=str(certificate))}
        dataset = ImageTextPairDataset.from_webdataset(url, storage_options=trust)
        assert sorted(dataset.metadata["seed"].compute()) == [0, 1, 2]
        with ShardReader(f"{url}/00000.tar", trust) as reader:
            assert len(reader.index) == 3
        with ShardReader(f"{url}/00000.tar") as reader, pytest.raises(TarError, match="certificate") as caught:
            reader.index  # noqa: B018
        assert "5 tries" not in str(caught.value)
        assert "no such tar" not in str(caught.value)
