"""Names in tars are no paths: nothing is written outside of the output, nor is what is written when it is unpacked."""

from __future__ import annotations

import io
import re
import tarfile
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.embedders import TimmImageEmbedder
from nemo_image.errors import RunError
from nemo_image.shards.index import index_tar
from tests.makers import TINY_MODEL, write_rows


def write_hostile(path: Path, names: list[str]) -> None:
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"%03d" % number))


def exported(folder: Path, out: Path, keep_ids: bool) -> None:
    dataset = ImageTextPairDataset.from_webdataset(str(folder))
    dataset.metadata = dataset.metadata.assign(keep=dataset.metadata["key"] != "")
    dataset.to_webdataset(out, "keep", keep_ids=keep_ids)


def contents(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(path) as tar:
        return [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]


part = st.sampled_from(
    ["..", ".", "", "a", "b", "é", "a b", "C:", "~", "$HOME", "a\nb", "\x1b[31m", "\udcff", "n" * 300]
)
names = st.lists(
    st.builds(
        lambda parts, base, dots: dots.join(["/".join([*parts, base]), "jpg"]),
        st.lists(part, max_size=4),
        st.sampled_from(["x", "y", "..z", "\\..\\w", " ", "-rf", "000"]),
        st.sampled_from([".", ".seg.", "..", ".\\..\\"]),
    ),
    min_size=1,
    max_size=6,
    unique=True,
)


@settings(deadline=None, max_examples=20)
@given(names)
@example(["../escaped.jpg"])
@example(["/tmp/absolute.jpg", "a.jpg"])
@example(["a/../../../b.jpg"])
@example(["\udcff.jpg", "\udcfe.jpg"])
def test_export_writes_only_its_own_files_and_harmless_names(found: list[str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_hostile(root / "in" / "s.tar", found)
        index = index_tar(root / "in" / "s.tar")
        if not index.samples:
            return
        bodies = {member.name: b"%03d" % found.index(member.name) for one in index.samples for member in one.members}
        for keep_ids in (False, True):
            out = root / f"out{keep_ids}"
            if keep_ids and any(map(is_harmful, bodies)):
                with pytest.raises(RunError, match="unpacked outside"):
                    exported(root / "in", out, keep_ids)
                assert not list(out.glob("*.tar"))
                continue
            exported(root / "in", out, keep_ids)
            written = contents(out / "00000.tar")
            assert sorted(data for _, data in written) == sorted(bodies.values())
            for info, data in written:
                # Python's own filter for tars from strangers is the oracle.
                assert tarfile.data_filter(info, str(root / "unpacked")) is not None
                if keep_ids:
                    assert bodies[info.name] == data
                else:
                    assert re.fullmatch(r"00000000[0-9]\.[^/]+", info.name)
        # Nothing stands beside the input and the two outputs.
        assert {path.name for path in root.iterdir()} <= {"in", "outFalse", "outTrue"}
        assert [path.name for path in (root / "in").iterdir()] == ["s.tar"]


def is_harmful(name: str) -> bool:
    """As POSIX and Windows read paths."""
    parts = re.split(r"[/\\]", name)
    return parts[0] == "" or parts[0].endswith(":") or ".." in parts


def test_names_that_are_no_utf8_are_rows_like_any_other(tmp_path: Path) -> None:
    write_hostile(tmp_path / "in" / "s.tar", ["a.jpg", "\udcff.jpg", "\udcfe.jpg"])
    exported(tmp_path / "in", tmp_path / "out", keep_ids=True)
    assert pq.read_table(tmp_path / "out" / "00000.parquet")["key"].to_pylist() == ["a", "\\xff", "\\xfe"]
    assert [data for _, data in contents(tmp_path / "out" / "00000.tar")] == [b"000", b"001", b"002"]


@pytest.mark.parametrize("spare", ["\udcff.jpg", "a.\udcffx", "good.\udcff"])
def test_names_that_are_no_utf8_stand_in_the_ledger(spare: str, tmp_path: Path) -> None:
    # A sample without row, and a member that comes twice: both are named.
    write_hostile(tmp_path / "in" / "s.tar", ["good.jpg", spare, spare])
    write_rows(tmp_path / "in" / "s.parquet", {"key": ["good"]})
    dataset = TimmImageEmbedder(TINY_MODEL, autocast=False)(ImageTextPairDataset.from_webdataset(str(tmp_path / "in")))
    totals = dataset.save_metadata(tmp_path / "out").run_totals
    assert totals is not None
    assert (totals["repeated_members"], totals["failures"]) == (1, {"unknown": 1})
    assert re.search(r"\\\\(xff|udcff)", Path(totals["ledger"]).read_text(encoding="utf-8"))
