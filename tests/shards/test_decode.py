"""Decoding against Pillow's own functions and against pictures whose pixels are known."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

from nemo_image.errors import ArgumentError, ImageError
from nemo_image.shards import decode
from nemo_image.shards.decode import MAX_PIXELS, decode_pillow, decode_rgb, read_header
from nemo_image.shards.jpeg import scan_jpeg
from tests.images import STORED, UPRIGHT, chunk, mutants, photograph, png
from tests.makers import encoded, picture

DECODERS = ("torchvision", "pillow")
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{}"/></rdf:RDF></x:xmpmeta>'
)


def pixels_of(data: bytes, decoder: Any = "torchvision") -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[H, W, 3], with everything that the header promises checked."""
    header, tensor = decode_rgb(data, decoder=decoder)
    assert tensor.dtype == torch.uint8
    assert tuple(tensor.shape) == (3, *header.upright_size[::-1])
    assert tensor.permute(1, 2, 0).is_contiguous()
    assert read_header(data) == header
    return tensor.permute(1, 2, 0).numpy()


def reason_of(data: bytes, decoder: Any = "torchvision", **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        decode_rgb(data, decoder=decoder, **options)
    return caught.value.reason


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("kind", ["PNG", "WebP", "BMP", "TIFF"])
def test_lossless_formats(kind: str, decoder: str) -> None:
    image = photograph("chelsea.png", 200)
    data = encoded(image, kind, **({"lossless": True} if kind == "WebP" else {}))
    assert (pixels_of(data, decoder) == np.asarray(image)).all()
    assert read_header(data) == decode.ImageHeader(kind.upper(), *image.size, 1, "RGB")


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_is_equal_on_both_decoders(subsampling: int, progressive: bool) -> None:
    data = encoded(photograph("coffee.png", 321), "JPEG", subsampling=subsampling, progressive=progressive)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    for decoder in DECODERS:
        assert (pixels_of(data, decoder) == expected).all()


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpeg_of_other_colours_is_equal_on_both_decoders(mode: str) -> None:
    data = encoded(photograph("coffee.png", 200).convert(mode), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for decoder in DECODERS:
        assert (pixels_of(data, decoder) == expected).all()
    assert read_header(data).plain_jpeg is (mode == "L")


def test_avif(decoder: str) -> None:
    image = photograph("chelsea.png", 200)
    found = pixels_of(encoded(image, "AVIF", quality=95, subsampling="4:4:4"), decoder)
    assert np.abs(found.astype(int) - np.asarray(image)).mean() < 2


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WebP", "TIFF", "AVIF", "MPO"])
def test_the_first_frame_counts(kind: str, decoder: str) -> None:
    frames = [Image.new("RGB", (24, 16), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.abs(pixels_of(data, decoder).astype(int) - [255, 0, 0]).max() <= 2
    assert read_header(data).format == ("JPEG" if kind == "MPO" else kind.upper())


def test_torchvision_decodes_plain_jpegs_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    native, seen = decode._torchvision_decode_jpeg(), []

    def spy(data: torch.Tensor, mode: int) -> torch.Tensor:
        seen.append(bytes(data.numpy()))
        return native(data, mode)

    monkeypatch.setattr(decode, "_torchvision_decode_jpeg", lambda: spy)
    jpeg = encoded(picture(1))
    others = [encoded(picture(1), kind) for kind in ("PNG", "WebP", "GIF", "BMP", "TIFF", "AVIF")]
    for data in [*others, encoded(picture(1).convert("CMYK")), jpeg]:
        decode_rgb(data)
        decode_rgb(data, decoder="pillow")
    assert seen == [jpeg]


def test_other_formats_of_pillows_are_refused(decoder: str) -> None:
    image = picture(1)
    for kind in ("EPS", "PPM", "ICO", "TGA", "PCX", "SGI", "PDF", "JPEG2000"):
        assert reason_of(encoded(image, kind), decoder).startswith(
            "unknown: not JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"
        )


@pytest.mark.parametrize("view", [bytearray, memoryview])
def test_any_bytes_like_object_is_taken(view: Any) -> None:
    data = encoded(picture(1))
    assert (pixels_of(view(data)) == pixels_of(data)).all()


# -------------------------------------------------------------------------------------------------------- alpha, depth


def test_alpha_is_composited_over_white(decoder: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (9, 8, 4), dtype=np.uint8)
    share = values[..., 3:].astype(np.float64) / 255
    expected = np.rint(values[..., :3] * share + 255 * (1 - share))
    assert (pixels_of(encoded(Image.fromarray(values), "PNG"), decoder) == expected).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_transparent_grey_of_a_png(depth: int) -> None:
    top = 2**depth - 1
    data = png([[0, 1, top, top - 1]], depth, 0, trns=struct.pack(">H", 1))
    scaled = [round(value * 255 / top) for value in (0, 1, top, top - 1)]
    expected = [255 if value == 1 else grey for value, grey in zip((0, 1, top, top - 1), scaled, strict=True)]
    assert pixels_of(data)[0, :, 0].tolist() == expected


def test_transparent_colour_of_a_png() -> None:
    row = [1, 2, 3, 1, 2, 4]
    assert pixels_of(png([row], 8, 2, trns=struct.pack(">3H", 1, 2, 3))).tolist() == [[[255] * 3, [1, 2, 4]]]
    deep = [value * 257 for value in row]
    assert pixels_of(png([deep], 16, 2, trns=struct.pack(">3H", *deep[:3]))).tolist() == [[[255] * 3, [1, 2, 4]]]


def test_sixteen_bit_grey_is_scaled() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None]
    assert (pixels_of(encoded(Image.fromarray(ramp), "PNG"))[..., 0] == np.rint(ramp / 257)).all()
    assert (pixels_of(encoded(Image.fromarray(ramp), "TIFF"))[..., 0] == np.rint(ramp / 257)).all()


# -------------------------------------------------------------------------------------------------------- orientation


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[274] = orientation
    return tags.tobytes()


def xmp_chunk(orientation: int) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", XMP.format(orientation))
    return info


def png_after_pixels(image: Image.Image, orientation: int) -> bytes:
    rows = np.asarray(image).reshape(image.height, -1).tolist()
    return png(rows, 8, 2, after=[(b"eXIf", exif(orientation).removeprefix(b"Exif\0\0"))])


ORIENTED = {
    "JPEG, EXIF": lambda image, o: encoded(image, "JPEG", exif=exif(o)),
    "JPEG, XMP": lambda image, o: encoded(image, "JPEG", xmp=XMP.format(o).encode()),
    "PNG, eXIf": lambda image, o: encoded(image, "PNG", exif=exif(o)),
    "PNG, eXIf behind the pixels": png_after_pixels,
    "PNG, XMP": lambda image, o: encoded(image, "PNG", pnginfo=xmp_chunk(o)),
    "WebP, EXIF": lambda image, o: encoded(image, "WebP", lossless=True, exif=exif(o)),
    "WebP, XMP": lambda image, o: encoded(image, "WebP", lossless=True, xmp=XMP.format(o).encode()),
    "AVIF, irot and imir": lambda image, o: encoded(image, "AVIF", exif=exif(o)),
    "TIFF, raw": lambda image, o: encoded(image, "TIFF", tiffinfo={274: o}),
    "TIFF, compressed": lambda image, o: encoded(image, "TIFF", tiffinfo={274: o}, compression="tiff_lzw"),
    "TIFF, XMP": lambda image, o: encoded(image, "TIFF", tiffinfo={700: XMP.format(o).encode()}),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("how", ORIENTED)
def test_orientation(how: str, orientation: int, decoder: str) -> None:
    stored = picture(5, 40, 24)
    data = ORIENTED[how](stored, orientation)
    header = read_header(data)
    assert (header.width, header.height, header.orientation) == (40, 24, orientation)
    untagged = pixels_of(ORIENTED[how](stored, 1), decoder)
    found = pixels_of(data, decoder)
    assert (found == UPRIGHT[orientation](untagged)).all()
    assert (found == np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))).all()


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_picture_stored_rotated_is_upright_again(orientation: int, decoder: str) -> None:
    upright = np.asarray(picture(5, 40, 24))
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    assert (pixels_of(encoded(stored, "PNG", exif=exif(orientation)), decoder) == upright).all()


@pytest.mark.parametrize("tags", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage", exif(0), exif(9)])
def test_a_broken_orientation_does_not_lose_the_picture(tags: bytes, decoder: str) -> None:
    data = encoded(picture(5), "JPEG", exif=tags)
    assert read_header(data).orientation == 1
    assert (pixels_of(data, decoder) == pixels_of(encoded(picture(5)), decoder)).all()


# ----------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty: the file has no bytes"),
        (b"<html>404</html>", "unknown: not JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF (starts with b'<html>40')"),
        (b"\xff\xd8\xff", "corrupt: damaged JPEG header"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\0", "corrupt: damaged PNG header"),
        (b"RIFF\x99\0\0\0WEBPVP8 ", "corrupt: "),
        (b"GIF89a\1", "corrupt: damaged GIF header"),
        (b"II*\0\x08\0\0\0\0\0", "corrupt: damaged TIFF header"),
    ],
)
def test_reasons(data: bytes, reason: str, decoder: str) -> None:
    assert reason_of(data, decoder).startswith(reason)
    for read in (read_header, decode_pillow):
        with pytest.raises(ImageError, match=f"^{reason.split(':', maxsplit=1)[0]}: "):
            read(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF"])
def test_truncated(kind: str, decoder: str) -> None:
    data = encoded(photograph("chelsea.png", 100), kind)
    assert reason_of(data[: len(data) * 2 // 3], decoder).startswith(("truncated: ", "corrupt: "))


@pytest.mark.parametrize("progressive", [False, True])
def test_both_decoders_refuse_every_cut_of_a_jpeg(progressive: bool) -> None:
    data = encoded(picture(2), "JPEG", progressive=progressive)
    for end in [*range(1, len(data), 29), len(data) - 2, len(data) - 1]:
        assert reason_of(data[:end], "torchvision") == reason_of(data[:end], "pillow")


def test_trailing_bytes_do_no_harm(decoder: str) -> None:
    data = encoded(picture(2))
    assert (pixels_of(data + b"trailing \xff\xd8 bytes", decoder) == pixels_of(data, decoder)).all()


def test_max_pixels(decoder: str) -> None:
    data = encoded(picture(2, 64, 48))
    assert reason_of(data, decoder, max_pixels=64 * 48 - 1) == "bomb: 64 x 48 pixels, more than max_pixels=3071"
    assert decode_rgb(data, decoder=decoder, max_pixels=64 * 48)[0].width == 64  # type: ignore[arg-type]
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS


def test_bombs_are_refused_by_their_header(decoder: str) -> None:
    huge = bytearray(encoded(picture(2), "PNG"))
    huge[16:24] = struct.pack(">II", 60000, 60000)
    header = bytes(huge[:8]) + chunk(b"IHDR", bytes(huge[16:29])) + bytes(huge[33:])
    assert reason_of(header, decoder).startswith("bomb: ")
    text = png([[0]], 8, 0, after=[(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**22)))])
    assert reason_of(text, decoder).startswith("bomb: ")


def test_a_jpeg_that_announces_two_sizes_is_judged_by_the_larger() -> None:
    data = encoded(picture(2, 64, 48))
    start = data.index(b"\xff\xc0")
    frame = data[start : start + 19]
    large = frame[:5] + struct.pack(">HH", 65500, 65500) + frame[9:]
    for decoder in DECODERS:
        assert reason_of(data[:start] + large + data[start:], decoder).startswith("bomb: ")
        small = frame[:5] + struct.pack(">HH", 40, 30) + frame[9:]
        assert reason_of(data[:start] + small + data[start:], decoder).startswith("corrupt: ")


@pytest.mark.parametrize(
    ("error", "category"),
    [
        (MemoryError(), "memory"),
        (RecursionError("maximum recursion depth exceeded"), "corrupt"),
        (struct.error("unpack requires a buffer of 4 bytes"), "corrupt"),
        (SyntaxError("broken PNG file"), "corrupt"),
        (OverflowError("signed integer is greater than maximum"), "corrupt"),
        (EOFError(), "truncated"),
        (NotImplementedError("no such compression"), "unsupported"),
        (Image.DecompressionBombError("Image size"), "bomb"),
        (Image.DecompressionBombWarning("Image size"), "bomb"),
        (OSError("cannot read <_io.BytesIO object at 0x7f3a1c0>"), "corrupt"),
    ],
)
def test_whatever_a_decoder_raises_is_a_reason(
    error: Exception, category: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", fail)
    reason = reason_of(encoded(picture(1), "PNG"))
    assert reason.startswith(f"{category}: ")
    assert "0x" not in reason  # an address would differ from run to run
    assert not reason.endswith(": ")


def test_an_interrupt_is_not_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "open", interrupt)
    with pytest.raises(KeyboardInterrupt):
        decode_rgb(encoded(picture(1), "PNG"))


def test_an_unknown_decoder_is_the_callers_mistake() -> None:
    with pytest.raises(ArgumentError, match="torchvision, pillow"):
        decode_rgb(b"", decoder="dali")  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- hostile and odd


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP", "GIF", "TIFF", "BMP", "AVIF"])
def test_mutants_end_as_a_picture_or_a_reason(kind: str) -> None:
    data = encoded(picture(4), kind)
    ends = {"picture": 0, "reason": 0}
    for mutant in mutants(data, 80, seed=len(kind)):
        results: list[Any] = []
        for decoder in DECODERS:
            try:
                results.append(decode_rgb(mutant, decoder=decoder)[1])  # type: ignore[arg-type]
            except ImageError as error:
                results.append(error.reason)
        first, second = results
        assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
        ends["reason" if isinstance(first, str) else "picture"] += 1
    assert min(ends.values()) > 0


def test_headers_read_without_pillow_say_what_pillow_says() -> None:
    rng = np.random.default_rng(5)
    kinds = [
        {}, {"progressive": True}, {"icc_profile": b"profile" * 40}, {"comment": b"text"}, {"optimize": True},
        {"exif": exif(6)}, {"xmp": XMP.format(8).encode()},
    ]  # fmt: skip
    files = [encoded(picture(4), "JPEG", **kind) for kind in kinds] + [encoded(picture(4).convert("L"), "JPEG")]
    own = 0
    for data in files:
        start = scan_jpeg(data).start
        for _ in range(400):
            mutant = bytearray(data)
            for place in rng.integers(2, start, rng.integers(0, 3)):
                mutant[place] = rng.integers(0, 256)
            header = decode._own_header(bytes(mutant), MAX_PIXELS)
            if header is None:
                continue
            own += 1
            try:
                _, by_pillow = decode._open(bytes(mutant), MAX_PIXELS)
            except Exception:
                assert reason_of(bytes(mutant)) == reason_of(bytes(mutant), "pillow")
            else:
                assert header == by_pillow
    assert own > 400


@pytest.mark.parametrize(
    "segment",
    [
        b"\xff\xe1\x00\x08Exif\0\0",
        b"\xff\xe0\x00\x05abc",
        b"\xff\xe0\x00\x07JFIF\0",
        b"\xff\xe2\x00\x06MPF\0",
        b"\xff\xe2\x00\x0eICC_PROFILE\0",
        b"\xff\x10\x00\x04ab",
    ],
    ids=["empty EXIF", "short", "short JFIF", "further pictures", "short profile", "unknown marker"],
)
def test_segments_that_pillow_looks_into_are_left_to_it(segment: bytes) -> None:
    data = encoded(picture(4), "JPEG")
    assert decode._own_header(data, MAX_PIXELS) is not None
    assert decode._own_header(data[:2] + segment + data[2:], MAX_PIXELS) is None


def test_large_pictures_are_judged_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(4, 40, 30), "JPEG")
    assert decode._own_header(data, 1200) is not None
    assert decode._own_header(data, 1199) is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1199)
    assert decode._own_header(data, 1200) is None


def test_odd_files(shared: Path) -> None:
    folder = shared / "data" / "odd"
    entries = json.loads((folder / "manifest.json").read_text())
    assert len(entries) == 139
    wrong, reasons = [], 0
    for entry in entries:
        data = (folder / entry["file"]).read_bytes()
        # What the manifest's Pillow refuses; older ones decode a cut palette bitmap.
        bad = any(kind.startswith(("truncated", "bomb", "odd_exception", "oserror")) for kind in entry["kinds"])
        try:
            first, second = (pixels_of(data, decoder) for decoder in DECODERS)
        except ImageError as error:
            reasons += 1
            if not bad or reason_of(data, "pillow") != error.reason:
                wrong.append(f"{entry}: {error.reason}")
        else:
            if not (first == second).all():
                wrong.append(f"{entry}: the decoders differ")
    assert not wrong
    assert reasons in (28, 29)


def test_odd_rotated_files_are_upright(shared: Path) -> None:
    folder = shared / "data" / "odd"
    entries = json.loads((folder / "manifest.json").read_text())
    files = [folder / entry["file"] for entry in entries if "exif_rotated" in entry["kinds"]]
    assert len(files) == 12
    for file in files:
        data = file.read_bytes()
        expected = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        assert (pixels_of(data) == np.asarray(expected)).all(), file.name
