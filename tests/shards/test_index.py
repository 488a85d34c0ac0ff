from __future__ import annotations

import gzip
import io
import logging
import lzma
import os
import pickle
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nemo_image.errors import TarError
from nemo_image.shards.index import Member, TarIndex, index_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}

Files = Sequence[tuple[str, bytes]]


def make_tar(files: Files, kind: int = tarfile.USTAR_FORMAT, **fields: Any) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def indexed(data: bytes) -> TarIndex:
    return index_tar(io.BytesIO(data))


def members_of(index: TarIndex) -> list[tuple[str, int, int]]:
    """Every member of the samples as (name, offset, size), by offset."""
    members = [member for sample in index.samples for member in sample.members]
    return sorted(((name, offset, size) for name, _, offset, size in members), key=lambda member: member[1])


def by_tarfile(data: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]


def header(
    name: bytes = b"a.jpg",
    size: bytes = b"00000000005\0",
    kind: bytes = b"0",
    magic: bytes = b"ustar\x0000",
    signed: bool = False,
    sum_format: bytes = b"%06o\0 ",
) -> bytes:
    """A header made by hand."""
    block = struct.pack(
        "100s24s12s12s8s1s100s8s247s", name, b"0000644\0" * 3, size, b"0" * 11, b" " * 8, kind, b"", magic, b""
    )
    total = sum(block)
    if signed:
        total -= 256 * sum(byte > 127 for byte in block)
    return block[:148] + (sum_format % total).ljust(8, b"\0") + block[156:]


def block(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


END = bytes(1024)


# --- samples


def test_members_that_share_a_key_are_a_sample() -> None:
    files = [("d/a.jpg", b"1"), ("d/a.txt", b"22"), ("d/a.json", b"{}"), ("b.PNG", b""), ("b.seg.png", b"4")]
    index = indexed(make_tar(files))
    assert index.keys == ["d/a", "b"]
    assert len(index) == 2
    first, second = index.samples
    assert first.members == (
        Member("d/a.jpg", "jpg", 512, 1),
        Member("d/a.txt", "txt", 1536, 2),
        Member("d/a.json", "json", 2560, 2),
    )
    assert (first.image, first.caption, first.json, first.offset) == (*first.members, 512)
    assert second.image == Member("b.PNG", "png", 3584, 0)
    assert (second.caption, second.json, second.offset) == (None, None, 3584)
    assert [member.extension for member in second.members] == ["png", "seg.png"]
    assert (index.repeated, index.ignored, index.size) == ((), (), 10240)


def test_members_of_one_key_need_not_stand_together() -> None:
    index = indexed(make_tar([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3"), ("b.txt", b"4")]))
    assert index.keys == ["a", "b"]
    assert [[member.name for member in sample.members] for sample in index.samples] == [
        ["a.jpg", "a.txt"],
        ["b.jpg", "b.txt"],
    ]


def test_of_two_images_the_first_counts() -> None:
    [sample] = indexed(make_tar([("a.txt", b""), ("a.webp", b"1"), ("a.jpg", b"2")])).samples
    assert sample.image is not None
    assert sample.image.name == "a.webp"
    assert len(sample.members) == 3
    [without] = indexed(make_tar([("a.txt", b""), ("a.cls", b"1")])).samples
    assert without.image is None


def test_of_a_repeated_member_the_first_counts() -> None:
    index = indexed(make_tar([("a.jpg", b"1"), ("b.jpg", b"22"), ("a.JPG", b"333"), ("./a.jpg", b"4444")]))
    assert [sample.members[0].size for sample in index.samples] == [1, 2]
    assert index.repeated == ("a.JPG", "./a.jpg")


def test_what_is_no_member_of_a_sample_is_named() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind in (
            ("folder.d", tarfile.DIRTYPE),
            ("soft.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
            ("disk.jpg", tarfile.BLKTYPE),
            ("README", tarfile.REGTYPE),
            (".hidden.jpg", tarfile.REGTYPE),
            ("a.jpg", tarfile.CONTTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    index = indexed(out.getvalue())
    assert index.keys == ["a"]
    assert index.ignored == ("README", ".hidden.jpg", "soft.jpg", "hard.jpg", "pipe.jpg", "disk.jpg")


def test_an_index_can_be_pickled() -> None:
    index = indexed(make_tar([("a.jpg", b"1"), ("README", b"")]))
    assert pickle.loads(pickle.dumps(index)) == index


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_keys_are_text_whatever_bytes_names_are_made_of(kind: str) -> None:
    names = ["\udcff.jpg", "\udcfe.jpg", "d/ü\udcff.jpg", "\udcff.txt", "a.\udcff", "ü.jpg"]
    index = indexed(make_tar([(name, b"1") for name in names], FORMATS[kind]))
    assert index.keys == ["\\xff", "\\xfe", "d/ü\\xff", "a", "ü"]
    assert sorted(name for name, _, _ in members_of(index)) == sorted(names)
    assert index.repeated == ()


def test_of_two_keys_with_one_text_the_first_counts() -> None:
    index = indexed(make_tar([("\\xff.jpg", b"1"), ("\udcff.jpg", b"22")], tarfile.GNU_FORMAT))
    assert [(sample.key, sample.members[0].size) for sample in index.samples] == [("\\xff", 1)]
    assert index.repeated == ("\udcff.jpg",)


def test_a_sample_may_have_any_number_of_members() -> None:
    names = [f"a.{number}" for number in range(20_000)]
    data = b"".join(header(name.encode(), size=b"0\0") for name in [*names, "a.19999", "a.3", "b.jpg"]) + END
    first, second = indexed(data).samples
    assert [member.name for member in first.members] == names
    assert second.key == "b"
    assert indexed(data).repeated == ("a.19999", "a.3")


# --- every format


names = st.lists(
    st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=90), min_size=1, max_size=4
)


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    files = []
    for _ in range(draw(st.integers(0, 6))):
        name = "/".join(draw(names)) + draw(st.sampled_from([".jpg", ".txt", ".JSON", ""]))
        files.append((name, b"x" * draw(st.integers(0, 1500))))
    kind = draw(st.sampled_from(sorted(FORMATS)))
    fields = draw(
        st.sampled_from([{}, {"mtime": 1.5}, {"uname": "ü" * 30}, {"pax_headers": {"comment": "path=" * 20}}])
    )
    try:
        return make_tar(files, FORMATS[kind], **fields)
    except ValueError:  # too long a name for ustar
        return make_tar([(f"{number}.jpg", data) for number, (_, data) in enumerate(files)], FORMATS[kind])


@settings(deadline=None, max_examples=150)
@given(archives())
def test_every_format_is_read_as_tarfile_reads_it(data: bytes) -> None:
    index = indexed(data)
    expected = by_tarfile(data)
    listed = {(name, offset, size) for name, offset, size in members_of(index)}
    assert listed <= set(expected)
    # What is not in a sample is named as repeated or as having no key, and nothing is lost.
    rest = sorted(name for name, offset, size in expected if (name, offset, size) not in listed)
    assert rest == sorted(index.repeated + index.ignored)
    assert index.size == len(data)


@pytest.mark.parametrize("kind", sorted(FORMATS))
@pytest.mark.parametrize("length", [99, 100, 101, 156])
def test_names_as_long_as_their_fields(length: int, kind: str) -> None:
    names = ["n" * (length - 4) + ".jpg"] if length <= 100 or kind != "ustar" else []
    names += ["d" * (length - 1) + "/" + "n" * 96 + ".txt", "d" * (length - 50) + "/é.json"]
    data = make_tar([(name, b"1") for name in names], FORMATS[kind])
    assert [name for name, _, _ in members_of(indexed(data))] == names
    assert members_of(indexed(data)) == by_tarfile(data)


@pytest.mark.parametrize("kind", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_what_gnu_tar_writes(kind: str, tmp_path: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("needs tar")
    names = ["a.jpg", "a.txt", "d/b.jpg", "ü.jpg"]
    if kind != "v7":
        names.append("d/" + "n" * (60 if kind == "ustar" else 180) + ".jpg")
    for number, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x" * number * 300)
    (tmp_path / "in" / "link.jpg").symlink_to("a.jpg")
    subprocess.run(
        ["tar", f"--format={kind}", "-C", str(tmp_path / "in"), "-cf", str(tmp_path / "x.tar"), "."], check=True
    )
    index = index_tar(tmp_path / "x.tar")
    assert {name.removeprefix("./") for name, _, _ in members_of(index)} == set(names)
    assert sorted(members_of(index)) == sorted(by_tarfile((tmp_path / "x.tar").read_bytes()))
    assert index.ignored == ("./link.jpg",)


def test_numbers_may_be_binary() -> None:
    # GNU's base-256: the top bit set, then big-endian.
    data = header(size=b"\x80" + (700).to_bytes(11, "big")) + bytes(1024) + header(b"b.jpg") + block(b"12345") + END
    assert members_of(indexed(data)) == by_tarfile(data) == [("a.jpg", 512, 700), ("b.jpg", 2048, 5)]


@pytest.mark.parametrize(
    "size", [b"         5 \0", b"5\0" + b"9" * 10, b"000000000005", b"0000000005 \0", b"5           "]
)
def test_numbers_may_be_padded_in_old_ways(size: bytes) -> None:
    data = header(size=size) + block(b"12345") + END
    assert members_of(indexed(data)) == by_tarfile(data) == [("a.jpg", 512, 5)]


def test_an_empty_size_is_zero() -> None:
    data = header(size=b"") + header(b"b.jpg", size=b" " * 12) + END
    assert members_of(indexed(data)) == by_tarfile(data) == [("a.jpg", 512, 0), ("b.jpg", 1024, 0)]


@pytest.mark.parametrize("sum_format", [b"%06o\0 ", b"%07o\0", b"%6o \0", b" %06o\0"])
def test_sums_may_be_padded_in_old_ways(sum_format: bytes) -> None:
    data = header(sum_format=sum_format) + block(b"12345") + END
    assert members_of(indexed(data)) == by_tarfile(data) == [("a.jpg", 512, 5)]


def test_sums_may_be_of_signed_bytes() -> None:
    data = header("ü.jpg".encode(), signed=True) + block(b"12345") + END
    assert members_of(indexed(data)) == by_tarfile(data) == [("ü.jpg", 512, 5)]


def test_the_oldest_format_marks_folders_by_a_slash() -> None:
    data = header(b"d/", kind=b"\0", magic=b"") + header(b"d/a.jpg", kind=b"\0", magic=b"") + block(b"12345") + END
    assert members_of(indexed(data)) == by_tarfile(data) == [("d/a.jpg", 1024, 5)]
    assert indexed(data).ignored == ()


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"5", b"6"])
def test_links_and_devices_have_no_data_whatever_their_size_says(kind: bytes) -> None:
    data = header(b"link.jpg", kind=kind) + header() + block(b"12345") + END
    assert members_of(indexed(data)) == by_tarfile(data) == [("a.jpg", 1024, 5)]


def test_unknown_kinds_are_skipped_with_their_data() -> None:
    data = header(b"v.jpg", kind=b"V") + block(b"12345") + header() + block(b"12345") + END
    assert members_of(indexed(data)) == by_tarfile(data)[-1:] == [("a.jpg", 1536, 5)]
    assert indexed(data).ignored == ("v.jpg",)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(b"%d" % length) + len(key) + len(value) + 3 != length:
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    payload = b"".join(record(key, value) for key, value in records)
    return header(b"pax", size=b"%011o\0" % len(payload), kind=kind) + block(payload)


def test_pax_headers_override() -> None:
    data = pax((b"path", "ü.jpg".encode()), (b"size", b"700"), (b"comment", b"x\ny=z\n")) + header() + bytes(1024)
    data += header(b"b.jpg") + block(b"12345") + END  # they hold for one member only
    assert members_of(indexed(data)) == by_tarfile(data) == [("ü.jpg", 1536, 700), ("b.jpg", 3072, 5)]


def test_pax_global_headers_hold_for_all_that_follow() -> None:
    data = pax((b"path", b"g.jpg"), kind=b"g") + header() + block(b"12345") + pax((b"path", b"own.jpg")) + header()
    data += block(b"12345") + header() + block(b"12345")
    assert by_tarfile(data + END) == [("g.jpg", 1536, 5), ("own.jpg", 3584, 5), ("g.jpg", 4608, 5)]
    # One at the end has no member to hold for, and harms nobody.
    for end in (END, pax((b"path", b"h.jpg"), kind=b"g") + END):
        index = indexed(data + end)
        assert members_of(index) == by_tarfile(data + END)[:2]
        assert index.repeated == ("g.jpg",)


def test_pax_names_that_are_no_utf8_keep_their_bytes() -> None:
    data = pax((b"hdrcharset", b"BINARY"), (b"path", b"\xff.jpg")) + header() + block(b"12345") + END
    assert members_of(indexed(data)) == by_tarfile(data) == [("\udcff.jpg", 1536, 5)]


def test_long_names_and_long_links() -> None:
    long = b"n" * 300 + b".jpg"
    data = header(b"././@LongLink", size=b"%011o\0" % 304, kind=b"L") + block(long)
    data += header(b"././@LongLink", size=b"%011o\0" % 304, kind=b"K") + block(long)
    data += header(b"cut") + block(b"12345") + header() + block(b"12345") + END
    assert members_of(indexed(data)) == by_tarfile(data) == [(long.decode(), 2560, 5), ("a.jpg", 3584, 5)]


def test_gnus_own_format_has_times_where_ustar_has_the_names_beginning() -> None:
    plain = header(magic=b"ustar  \0")
    dated = bytearray(plain)
    dated[345:357] = b"14000000000\0"
    dated[148:156] = b"%06o\0 " % (sum(plain) - sum(plain[148:156]) + 256 + sum(dated[345:357]))
    assert members_of(indexed(bytes(dated) + block(b"12345") + END)) == [("a.jpg", 512, 5)]


# --- ends


def test_an_empty_tar_has_no_samples() -> None:
    index = indexed(make_tar([]))
    assert (index.samples, index.size) == ((), 10240)
    assert len(indexed(bytes(512))) == 0


THREE = [("a.jpg", b"x" * 700), ("a.txt", b""), ("b.jpg", b"y" * 512)]


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_truncation_at_any_byte_is_seen(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    files = [*THREE, ("c" * 120 + "/é.jpg", b"z" * 10)] if kind != "ustar" else THREE
    data = make_tar(files, FORMATS[kind], mtime=1.5 if kind == "pax" else 0)
    whole = by_tarfile(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        ends = [info.offset_data + len(block(b"x" * info.size)) for info in tar]
    for cut in range(ends[-1] + 1200):
        caplog.clear()
        try:
            index: TarIndex | None = indexed(data[:cut])
        except TarError as error:
            index = None
            assert "download it again" in str(error)  # noqa: PT017 -- pytest.raises is too slow for each byte
        # Where a member ends, another may begin or the tar end: nobody could tell.
        assert (index is not None) == (cut in ends or cut > ends[-1])
        if index is not None:
            assert members_of(index) == [member for member, end in zip(whole, ends, strict=True) if end <= cut]
            has_end_mark = cut - ends[-1] >= 512
            assert has_end_mark == ("no end mark" not in caplog.text)


def test_a_header_cut_off_names_its_byte() -> None:
    data = make_tar(THREE)
    with pytest.raises(TarError, match=r"byte 1536: a header needs bytes up to 2048, the file ends at 1600: .*cut off"):
        indexed(data[:1600])
    with pytest.raises(TarError, match=r"byte 512: member 'a.jpg' needs bytes up to 1536, the file ends at 1000"):
        indexed(data[:1000])


def test_a_header_cut_off_in_its_zeros_is_seen_though_its_sum_is_right() -> None:
    # The zeros at a header's end add nothing to its sum, and the sum was seen before: "ab" and "ba" have the same.
    data = make_tar([("ab.jpg", b"1"), ("ba.jpg", b"1")])
    for cut in range(1025, 1536):
        with pytest.raises(TarError, match="byte 1024: a header needs bytes up to 1536, the file ends at"):
            indexed(data[:cut])


@pytest.mark.parametrize(
    "extended", [pax((b"path", b"p.jpg")), pax((b"comment", b"x")), header(size=b"1\0", kind=b"L") + block(b"a")]
)
@pytest.mark.parametrize("end", [b"", END])
def test_an_extended_header_needs_its_member(extended: bytes, end: bytes) -> None:
    data = header() + block(b"12345") + extended + end
    with pytest.raises(TarError, match=f"byte {len(data) - len(end)}: .*between an extended header and its member"):
        indexed(data)


def test_a_lone_block_of_zeros_is_damage() -> None:
    data = make_tar([("a.jpg", b"1")])[:1024] + bytes(512) + make_tar([("b.jpg", b"1")])
    with pytest.raises(TarError, match="byte 1024: a block of zeros where a header should be"):
        indexed(data)


def test_data_behind_the_end_is_told(caplog: pytest.LogCaptureFixture) -> None:
    first, second = make_tar([("a.jpg", b"1")]), make_tar([("b.jpg", b"1")])
    with caplog.at_level(logging.WARNING):
        assert members_of(indexed(first)) == [("a.jpg", 512, 1)]
        assert caplog.text == ""
        assert members_of(indexed(first + second)) == by_tarfile(first + second) == [("a.jpg", 512, 1)]
    assert "byte 1024: the tar ends here, but more data follows" in caplog.text


# --- what is no tar


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (bytes(100), "not a tar"),
        (b"x", "not a tar, it begins with b'x'"),
        (b"<!DOCTYPE html>" + b" " * 2000, "not a tar, it begins with b'<!DOCTYPE html>"),
        (os.urandom(4096), "not a tar|compressed"),
        (gzip.compress(make_tar(THREE)), "compressed with gzip.*decompress"),
        (lzma.compress(make_tar(THREE)), "compressed with xz"),
        (b"BZh9" + bytes(600), "compressed with bzip2"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed with zstd"),
        (b"PK\x03\x04" + bytes(600), "compressed with zip"),
    ],
)
def test_what_is_no_tar_is_said_so(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    path.write_bytes(data)
    with pytest.raises(TarError, match=message) as caught:
        index_tar(path)
    assert str(path) in str(caught.value)


def test_what_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(TarError, match="no such tar"):
        index_tar(tmp_path / "x.tar")
    with pytest.raises(TarError, match="no such tar"):
        index_tar("memory://nowhere/x.tar")
    with pytest.raises(TarError, match="cannot be read"):
        index_tar(tmp_path)


def test_garbage_between_members_is_seen() -> None:
    data = make_tar(THREE)
    with pytest.raises(TarError, match=r"byte 1536: no member's header.*damaged"):
        indexed(data[:1536] + b"g" * 512 + data[1536:])


def test_every_changed_byte_of_a_header_is_seen() -> None:
    data = make_tar([("a.jpg", b"1"), ("b.jpg", b"12345")])
    whole = indexed(data)
    for position in range(1024, 1536):
        changed = bytearray(data)
        changed[position] ^= 1
        if position - 1024 in (154, 155):  # behind the sum's digits: NUL and a space, which no sum covers
            changed[position] = 0
            assert indexed(bytes(changed)) == whole
        else:
            with pytest.raises(TarError, match="byte 1024"):
                indexed(bytes(changed))


# --- hostile tars


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(size=b"77777777777\0") + END, "byte 512: member 'a.jpg' needs bytes up to 8589935104"),
        (header(size=b"\x80" + b"\xff" * 11) + END, "needs bytes up to"),
        (header(size=b"\xff" * 12) + END, "byte 0: the member 'a.jpg' has no valid size"),
        (header(size=b"-0000000512\0") + END, "has no valid size"),
        (header(size=b"99999999999\0") + END, "has no valid size"),
        (header(size=b"0x000000005\0") + END, "has no valid size"),
        (pax((b"size", b"-512")) + header() + END, "byte 1024: the member 'a.jpg' has the size '-512'"),
        (pax((b"size", b"1e3")) + header() + END, "has the size"),
        (pax((b"size", b"9" * 5000)) + header() + END, "has the size"),
        (pax((b"size", b"9" * 18)) + header() + END, "needs bytes up to"),
        (header(size=b"77777777777\0", kind=b"x") + END, "an extended header needs bytes up to"),
        (header(size=b"\xff" * 12, kind=b"L") + END, "has no valid size"),
        (
            header(size=b"%011o\0" % 2**21, kind=b"L") + bytes(2**21) + header() + END,
            "an extended header of 2097152 bytes",
        ),
        (header(size=b"%011o\0" % 9, kind=b"x") + block(b"9 path=ab") + header() + END, "byte 512: a pax record"),
        (header(size=b"%011o\0" % 10, kind=b"x") + block(b"11 path=a\n") + header() + END, "byte 512: a pax record"),
        (header(size=b"%011o\0" % 9, kind=b"x") + block(b"-9 path=a\n") + header() + END, "byte 512: a pax record"),
        (header(size=b"%011o\0" % 9, kind=b"x") + block(b"0 path=a\n") + header() + END, "byte 512: a pax record"),
        (header(size=b"%011o\0" % 7, kind=b"x") + block(b"path=a\n") + header() + END, "byte 512: a pax record"),
        (pax((b"path", b"a.jpg\0.exe")) + header() + block(b"12345") + END, "byte 512: a pax record"),
        (header(size=b"%011o\0" % 10**7, kind=b"L") + block(b"n" * 10**7) + header() + END, "header of 10000000 bytes"),
        (pax((b"path", b"n" * 10**7)) + header() + END, "an extended header of 10000015 bytes"),
        (header(kind=b"S") + block(b"12345") + END, "stored sparse.*--sparse"),
        (pax((b"GNU.sparse.major", b"1")) + header() + block(b"12345") + END, "stored sparse"),
    ],
)
def test_lies_in_headers_are_errors(data: bytes, message: str) -> None:
    with pytest.raises(TarError, match=message):
        indexed(data)


@settings(deadline=None, max_examples=400)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), max_size=6),
    st.integers(0, 12000),
    st.booleans(),
)
@example("gnu", [(124, 0x80)], 12000, True)
def test_damage_never_leads_out_of_the_file(kind: str, edits: list[tuple[int, int]], cut: int, mend: bool) -> None:
    data = bytearray(
        make_tar([*THREE, ("long" * 40 + "/ü.jpg" if kind != "ustar" else "l.jpg", b"1" * 900)], FORMATS[kind])
    )
    for position, value in edits:
        data[position] = value
    if mend:  # as one who means harm would
        for start in range(0, len(data) - 512, 512):
            one = bytes(data[start : start + 512])
            if one[257:262] == b"ustar":
                data[start + 148 : start + 156] = b"%06o\0 " % (sum(one) - sum(one[148:156]) + 256)
    content = bytes(data[:cut])
    try:
        index = indexed(content)
    except TarError:
        return
    for _, offset, size in members_of(index):
        assert 512 <= offset <= offset + size <= len(content)
        assert size >= 0


def test_half_a_million_dots_before_a_name() -> None:
    name = "./" * 500_000 + "d/a.jpg"
    for kind in ("gnu", "pax"):
        [sample] = indexed(make_tar([(name, b"1")] * 3, FORMATS[kind])).samples
        assert (sample.key, sample.members[0].name) == ("d/a", name)


def test_thousands_of_global_headers(caplog: pytest.LogCaptureFixture) -> None:
    data = b"".join(pax((b"path", b"g%d.jpg" % number), kind=b"g") for number in range(5000))
    data += header() + block(b"12345") + END
    assert members_of(indexed(data)) == [("g4999.jpg", 5000 * 1024 + 512, 5)]


def test_names_are_never_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset").mkdir()
    names = ["../escaped.jpg", "/tmp/absolute.jpg", "a/../../b.jpg", "C:\\x.jpg", "~/x.jpg"]
    (tmp_path / "dataset" / "x.tar").write_bytes(make_tar([(name, b"1") for name in names]))
    index = index_tar(tmp_path / "dataset" / "x.tar")
    assert [name for name, _, _ in members_of(index)] == names
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["dataset", "x.tar"]


# --- remote tars


class Counted(MemoryFileSystem):
    """A remote file system that counts what is fetched."""

    protocol = "counted"
    fetched: list[int] = []  # noqa: RUF012

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        data: bytes = super().cat_file(path, start, end, **kwargs)
        self.fetched.append(len(data))
        return data


@pytest.fixture
def counted() -> type[Counted]:
    fsspec.register_implementation("counted", Counted, clobber=True)
    Counted.fetched.clear()
    return Counted


def put(url: str, data: bytes) -> str:
    fs, path = fsspec.core.url_to_fs(url)
    fs.pipe_file(path, data)
    return url


def test_large_members_of_a_remote_tar_are_not_fetched(counted: type[Counted]) -> None:
    data = make_tar([(f"{number}.jpg", bytes(6 * 2**20)) for number in range(5)])
    url = put("counted://d/x.tar", data)
    assert members_of(index_tar(url)) == by_tarfile(data)
    assert sum(counted.fetched) < 2**20


def test_small_members_of_a_remote_tar_stream_by_in_few_requests(counted: type[Counted]) -> None:
    data = make_tar([(f"{number}.jpg", bytes(20_000)) for number in range(1000)])
    url = put("counted://d/x.tar", data)
    assert members_of(index_tar(url)) == by_tarfile(data)
    assert len(counted.fetched) < 20
    assert sum(counted.fetched) <= len(data)


def test_a_server_that_ignores_ranges_is_found_out(counted: type[Counted], monkeypatch: pytest.MonkeyPatch) -> None:
    url = put("counted://d/x.tar", make_tar([("a.jpg", bytes(2**20))]))
    monkeypatch.setattr(Counted, "cat_file", lambda self, path, *args, **kwargs: self.store[path].getvalue())
    with pytest.raises(TarError, match="ignores byte ranges"):
        index_tar(url)


def test_a_remote_clients_own_errors_become_ours(counted: type[Counted], monkeypatch: pytest.MonkeyPatch) -> None:
    url = put("counted://d/x.tar", make_tar([("a.jpg", b"1")]))

    def refuse(*args: Any, **kwargs: Any) -> bytes:
        raise RuntimeError("SlowDown")

    monkeypatch.setattr(Counted, "cat_file", refuse)
    with pytest.raises(TarError, match="RuntimeError: SlowDown"):
        index_tar(url)
