"""Pictures from anybody: the pixels are those of transformers, and what is no picture is refused."""

import base64
import random
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, quote_from_bytes

import numpy as np
import pytest
from pictures import chunk, exif, mutated, noise, png, saved, segment, with_segments
from PIL import Image
from quire_engine.errors import InvalidParameter
from quire_engine.multimodal.pictures import PictureLimits, data_url, read_picture
from transformers.image_utils import load_image

pytestmark = pytest.mark.filterwarnings("ignore:Palette images")  # of PIL; see test_reading_says_nothing
LIMITS = PictureLimits()
WHAT = "image_url of part 1 of message 0"
RGB, RGBA = noise(40, 30), noise(40, 30, 4)
JPEG = saved(RGB, "JPEG", quality=90)
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'


def sixteen_bits() -> bytes:
    return saved(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "PNG")


def frames(count: int) -> list[Image.Image]:
    return [noise(40, 30, 4, seed) for seed in range(1, count)]


def multi_picture() -> bytes:
    """As phones write: a JPEG with another behind it."""
    return saved(RGB, "MPO", save_all=True, append_images=[noise(20, 10)])


def gif_beyond_its_screen() -> bytes:
    data = bytearray(saved(RGB.quantize(16), "GIF"))
    struct.pack_into("<HH", data, 6, 20, 10)
    return bytes(data)


def gif_in_a_corner() -> bytes:
    """Whose screen is larger than its frame."""
    data = bytearray(saved(RGB.quantize(16), "GIF", comment=b"a comment " * 100, transparency=3))
    struct.pack_into("<HH", data, 6, 70, 60)
    return bytes(data)


def imagemagick(orientation: int) -> bytes:
    """EXIF data as a text."""
    raw = exif(orientation)
    return b"Raw profile type exif\0\0" + zlib.compress(f"\nexif\n{len(raw):8}\n{raw.hex()}\n".encode())


GOOD: dict[str, Callable[[], bytes]] = {
    "png": lambda: saved(RGB, "PNG"),
    "png with alpha": lambda: saved(RGBA, "PNG"),
    "png, grey with alpha": lambda: saved(noise(40, 30, 2), "PNG"),
    "png, grey": lambda: saved(noise(40, 30, 1), "PNG"),
    "png, 16 bits": sixteen_bits,
    "png, 1 bit": lambda: saved(noise(40, 30, 1).convert("1"), "PNG"),
    "png, palette": lambda: saved(RGB.quantize(17), "PNG"),
    "png, palette, one transparent": lambda: saved(RGB.quantize(17), "PNG", transparency=4),
    "png, palette with alpha": lambda: saved(RGB.quantize(4), "PNG", transparency=bytes([0, 128, 255, 3])),
    "png, a transparent colour": lambda: saved(RGB, "PNG", transparency=(0, 0, 0)),
    "png, 16 bits of each colour": lambda: png(4, 3, pixels=zlib.compress(bytes(75)), depth=16),
    "png, with all that a PNG may hold": lambda: png(
        4,
        3,
        chunk(b"gAMA", struct.pack(">I", 45455)),
        chunk(b"pHYs", struct.pack(">IIB", 2835, 1, 1)),
        chunk(b"tEXt", b"Comment\0hello"),
        chunk(b"iCCP", b"icc\0\0" + zlib.compress(b"no profile")),
        pixels=zlib.compress(b"".join(b"\0" + bytes(range(row, row + 12)) for row in range(3))),
    ),
    "apng": lambda: saved(RGBA, "PNG", save_all=True, append_images=frames(3), duration=100),
    "apng with a picture of its own": lambda: saved(
        RGBA, "PNG", save_all=True, append_images=frames(3), default_image=True
    ),
    "jpeg": lambda: JPEG,
    "jpeg, progressive": lambda: saved(RGB, "JPEG", progressive=True, subsampling=2),
    "jpeg, grey": lambda: saved(noise(40, 30, 1), "JPEG"),
    "jpeg, CMYK": lambda: saved(RGB.convert("CMYK"), "JPEG"),
    "jpeg, RGB as it is": lambda: saved(RGB, "JPEG", keep_rgb=True),
    "jpeg with profile and comment": lambda: saved(
        RGB, "JPEG", icc_profile=bytes(100_000), comment=b"hello", dpi=(72, 72)
    ),
    "jpeg with restarts": lambda: saved(RGB, "JPEG", restart_marker_blocks=1),
    "jpeg with more behind it": lambda: JPEG + b"\xff\xda" * 200,
    "jpeg of a phone": multi_picture,
    "webp": lambda: saved(RGB, "WEBP"),
    "webp without loss": lambda: saved(RGBA, "WEBP", lossless=True),
    "webp with alpha": lambda: saved(RGBA, "WEBP"),
    "webp, animated": lambda: saved(RGBA, "WEBP", save_all=True, append_images=frames(4), duration=80),
    "gif": lambda: saved(RGB.quantize(200), "GIF"),
    "gif, transparent": lambda: saved(RGB.quantize(9), "GIF", transparency=2),
    "gif, animated": lambda: saved(RGBA, "GIF", save_all=True, append_images=frames(4), duration=80, loop=0),
    "gif, grey": lambda: saved(noise(40, 30, 1), "GIF"),
    "gif, interlaced": lambda: saved(RGB.quantize(200), "GIF", interlace=1),
    "gif beyond its screen": gif_beyond_its_screen,
    "gif in a corner": gif_in_a_corner,
    "one pixel": lambda: saved(noise(1, 1), "PNG"),
    "a line": lambda: saved(noise(150, 1), "JPEG"),
}


def reference(data: bytes, folder: Path) -> Image.Image:
    """What transformers reads."""
    path = folder / "picture"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_image(str(path))


def same(ours: Image.Image, theirs: Image.Image) -> bool:
    return ours.mode == theirs.mode == "RGB" and ours.size == theirs.size and ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("name", GOOD)
def test_pixels_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    data = GOOD[name]()
    assert same(read_picture(data, WHAT, LIMITS), reference(data, tmp_path))


TURNED: dict[str, Callable[[int], bytes]] = {
    "jpeg": lambda turn: saved(RGB, "JPEG", exif=exif(turn)),
    "jpeg, big-endian": lambda turn: saved(RGB, "JPEG", exif=exif(turn, ">")),
    "jpeg, in 32 bits": lambda turn: saved(RGB, "JPEG", exif=exif(turn, ">", kind="I")),
    "jpeg of a camera": lambda turn: with_segments(
        JPEG, segment(0xE1, b"Exif\0\0" + exif(turn, more=bytes(3000), entries=200))
    ),
    "jpeg in two segments": lambda turn: with_segments(
        JPEG, segment(0xE1, b"Exif\0\0" + exif(turn)[:12]), segment(0xE1, b"Exif\0\0" + exif(turn)[12:])
    ),
    "jpeg by XMP": lambda turn: with_segments(JPEG, segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP % turn)),
    "jpeg by XMP, otherwise by EXIF": lambda turn: with_segments(
        JPEG, segment(0xE1, b"Exif\0\0" + exif(turn)), segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP % 3)
    ),
    "png": lambda turn: saved(RGBA, "PNG", exif=exif(turn)),
    "png, after its pixels": lambda turn: saved(RGB, "PNG")[:-12] + chunk(b"eXIf", exif(turn)) + chunk(b"IEND", b""),
    "png of ImageMagick": lambda turn: png(4, 2, chunk(b"zTXt", imagemagick(turn))),
    "png by XMP": lambda turn: png(4, 2, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP % turn)),
    "png by packed XMP": lambda turn: png(
        4, 2, chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0x\0" + zlib.compress(XMP % turn))
    ),
    "webp": lambda turn: saved(RGB, "WEBP", exif=exif(turn)),
    "webp with the prefix of JPEGs": lambda turn: saved(RGB, "WEBP", exif=b"Exif\0\0" + exif(turn)),
    "webp by XMP": lambda turn: saved(RGB, "WEBP", xmp=XMP % turn),
}


@pytest.mark.parametrize("turn", range(10))
@pytest.mark.parametrize("name", TURNED)
def test_a_picture_is_turned_as_it_says(name: str, turn: int, tmp_path: Path) -> None:
    data = TURNED[name](turn)
    assert same(read_picture(data, WHAT, LIMITS), reference(data, tmp_path))


def test_each_way_of_turning_is_another() -> None:
    """Or the test above would say nothing."""
    seen = {read_picture(TURNED["png"](turn), WHAT, LIMITS).tobytes() for turn in range(1, 9)}
    assert len(seen) == 8


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is there many times over."""
    data = saved(RGB, "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + data[-2:]


def exif_bomb() -> bytes:
    """60,000 entries, each of which names the same 60,000 bytes."""
    entry = b"".join(struct.pack("<HHII", tag, 7, 60_000, 8) for tag in range(0x1000, 0x1000 + 60_000))
    return exif(1, more=entry, entries=60_001)


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "is empty"),
    "a page": (lambda: b"\n<!DOCTYPE html><html><body>not found</body></html>", "HTML"),
    "svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "svg with a declaration": (lambda: b'<?xml version="1.0"?><svg/>', "SVG"),
    "pdf": (lambda: b"%PDF-1.7", "PDF"),
    "tiff": (lambda: saved(RGB, "TIFF"), "TIFF"),
    "bmp": (lambda: saved(RGB, "BMP"), "BMP"),
    "icon": (lambda: saved(RGB, "ICO"), "unknown format"),
    "postscript": (lambda: saved(RGB, "EPS"), "unknown format"),
    "avif": (lambda: b"\0\0\0\x20ftypavif", "AVIF"),
    "noise": (lambda: random.Random(1).randbytes(5000), "unknown format"),
    "50,000 x 50,000 of black": (lambda: png(50_000, 50_000, pixels=bytes(100_000)), "50000 x 50000"),
    "2^31 pixels wide": (lambda: png(2**31 - 1, 2**31 - 1, pixels=b""), "2147483647 x 2147483647"),
    "a WebP of 16384 x 16384": (
        lambda: b"RIFF\x64\0\0\0WEBPVP8X" + struct.pack("<II", 10, 0) + b"\xff\x3f\0\xff\x3f\0" + bytes(70),
        "16384 x 16384",
    ),
    "a GIF of 65535 x 65535": (lambda: b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\1\0\1\0\0\2\1\0\0;", "65535 x 65535"),
    "a GIF's frame of 65535 x 65535": (
        lambda: b"GIF89a\1\0\1\0\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\1\0\0;",
        "65535 x 65535",
    ),
    "1 x 300": (lambda: saved(noise(1, 300), "PNG"), "1 x 300"),
    "300 x 1": (lambda: saved(noise(300, 1), "PNG"), "300 x 1"),
    "no pixel": (lambda: png(0, 5, pixels=b""), "0 x 5"),
    "png without pixels": (lambda: png(5, 5, pixels=b""), "damaged"),
    "png of too few": (lambda: png(50, 50, pixels=zlib.compress(bytes(100))), "damaged"),
    "png whose pixels are no zlib": (lambda: png(50, 50, pixels=bytes(100)), "damaged"),
    "png with two headers": (lambda: png(5, 5, pixels=zlib.compress(bytes(80)), depth=7), "damaged"),
    "png without a header": (lambda: b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT", bytes(30)), "begins with its header"),
    "png of chunks": (lambda: png(5, 5, chunk(b"tIME", b"") * 70_000), "65536 chunks"),
    "png, cut": (lambda: saved(RGB, "PNG")[:-20], "ends before"),
    "jpeg, cut": (lambda: JPEG[:-200], "ends before"),
    "jpeg, cut before its pixels": (lambda: JPEG[:100], "ends before"),
    "jpeg without pixels": (lambda: b"\xff\xd8\xff\xd9" * 2, "ends before"),
    "jpeg of two sizes": (
        lambda: with_segments(JPEG, segment(0xC0, struct.pack(">BHHB", 8, 9, 9, 1) + b"\1\x11\0")),
        "its size twice",
    ),
    "jpeg of 10,000 scans": (lambda: scans(10_000), "100 scans"),
    "jpeg of segments": (lambda: with_segments(JPEG, segment(0xFE, b"") * 70_000), "65536 segments"),
    "jpeg of 65535 x 65535": (
        lambda: JPEG.replace(struct.pack(">HH", 30, 40), b"\xff\xff\xff\xff", 1),
        "65535 x 65535",
    ),
    "gif, cut": (lambda: saved(RGB.quantize(200), "GIF")[:900], "damaged, or ends too soon"),
    "gif without an image": (lambda: b"GIF89a\1\0\1\0\0\0\0;", "no image"),
    "gif of blocks": (lambda: b"GIF89a\1\0\1\0\0\0\0!\xfe" + b"\1a" * 70_000 + b"\0;", "65536 blocks"),
    "webp, cut": (lambda: saved(RGB, "WEBP")[:-30], "damaged, or ends too soon"),
    "webp of two sizes": (
        lambda: saved(RGBA, "WEBP").replace(b"\x27\0\0\x1d\0\0", b"\x28\0\0\x1d\0\0", 1),
        "damaged",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_is_refused(name: str) -> None:
    make, why = BAD[name]
    data = make()
    tracemalloc.start()
    try:
        with pytest.raises(InvalidParameter) as refused:
            read_picture(data, WHAT, LIMITS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(refused.value).startswith(f"{WHAT}: the file ")
    assert why in str(refused.value)
    assert refused.value.parameter == "messages"
    assert peak < 16 << 20


COMMENT = b"!\xfe" + b"\xff" * 256 * 200 + b"\0"  # of a GIF
BOMB = zlib.compress(bytes(64 << 20), 9)
STUFFED: dict[str, Callable[[], bytes]] = {
    "zTXt": lambda: png(5, 5, chunk(b"zTXt", b"Comment\0\0" + BOMB)),
    "iTXt": lambda: png(5, 5, chunk(b"iTXt", b"Comment\0\1\0\0\0" + BOMB)),
    "iTXt of XMP": lambda: png(5, 5, chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB)),
    "zTXt of EXIF": lambda: png(5, 5, chunk(b"zTXt", b"Raw profile type exif\0\0" + BOMB)),
    "iCCP": lambda: png(5, 5, chunk(b"iCCP", b"icc\0\0" + BOMB)),
    "many texts": lambda: png(5, 5, chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 20), 9)) * 500),
    "EXIF of a PNG": lambda: png(5, 5, chunk(b"eXIf", exif_bomb())),
    "EXIF of a WebP": lambda: saved(RGB, "WEBP", exif=exif_bomb()),
    "EXIF of a JPEG": lambda: with_segments(
        JPEG,
        *(segment(0xE1, b"Exif\0\0" + exif_bomb()[at : at + 60_000]) for at in range(0, len(exif_bomb()), 60_000)),
    ),
    "comments of a GIF": lambda: b"GIF89a\1\0\1\0\0\0\0" + COMMENT * 20 + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;",
}


@pytest.mark.parametrize("name", STUFFED)
def test_what_is_stuffed_into_a_picture_is_not_unpacked(name: str) -> None:
    data = STUFFED[name]()
    tracemalloc.start()
    try:
        assert min(read_picture(data, WHAT, LIMITS).size) >= 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


def test_limits_hold_just_there() -> None:
    data = saved(RGB, "PNG")
    for exact, name in ((len(data), "max_bytes"), (1200, "max_pixels")):
        assert read_picture(data, WHAT, PictureLimits(**{name: exact})).size == (40, 30)
        with pytest.raises(InvalidParameter, match=str(exact - 1)):
            read_picture(data, WHAT, PictureLimits(**{name: exact - 1}))
    assert read_picture(saved(noise(200, 1), "PNG"), WHAT, LIMITS).size == (200, 1)
    with pytest.raises(InvalidParameter, match="201 x 1"):
        read_picture(saved(noise(201, 1), "PNG"), WHAT, LIMITS)


@pytest.mark.parametrize("name", GOOD)
def test_any_beginning_of_a_file_is_refused_or_shows_the_whole(name: str) -> None:
    """A file may lack what follows its pixels, but no pixels."""
    data = GOOD[name]()
    whole = read_picture(data, WHAT, LIMITS).tobytes()
    for length in sorted({*range(min(len(data), 80)), *range(0, len(data), max(len(data) // 60, 1)), len(data) - 1}):
        try:
            assert read_picture(data[:length], WHAT, LIMITS).tobytes() == whole
        except InvalidParameter as error:
            assert str(error).startswith(WHAT)


@pytest.mark.parametrize("name", [*GOOD, *(f"turned {name}" for name in TURNED)])
def test_damaged_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    """Nothing else may happen, and where transformers reads one too, it sees the same."""
    data = TURNED[name.removeprefix("turned ")](6) if name.startswith("turned ") else GOOD[name]()
    draw = random.Random(name)
    limits = PictureLimits(max_pixels=1 << 20)
    for _ in range(40):
        bad = mutated(data, draw)
        try:
            ours = read_picture(bad, WHAT, limits)
        except InvalidParameter as error:
            assert str(error).startswith(WHAT)
            continue
        try:
            theirs = reference(bad, tmp_path)
        except Exception:  # it is stricter about what is left out here
            continue
        assert same(ours, theirs), bad.hex()


def test_reading_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """PIL warns of odd files, which a log is no place for. In a process of its own, for tests set their filters."""
    code = (
        "from pictures import *\n"
        "from quire_engine.multimodal.pictures import PictureLimits, read_picture\n"
        "limits = PictureLimits(max_pixels=1 << 40)\n"
        "for data in (\n"
        "    saved(noise(40, 30).quantize(4), 'PNG', transparency=bytes([0, 128, 255, 3])),\n"
        "    with_segments(saved(noise(9, 9), 'JPEG'), segment(0xE1, b'Exif\\0\\0' + exif(6, entries=9)[:-9])),\n"
        "    png(12_000, 8_000),\n"
        "):\n"
        "    read_picture(data, 'x', limits)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
    said = capfd.readouterr()
    assert said.out + said.err == ""


def test_pil_is_not_imported_before_a_picture_comes() -> None:
    code = "import sys; sys.modules['PIL'] = None\nimport quire_engine.multimodal.pictures"
    subprocess.run([sys.executable, "-c", code], check=True)


def encoded(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize("size", [0, 1, 2, 3, 1000, (1 << 20) - 1, 3 << 18, (3 << 18) + 1, 5 << 20])
def test_data_urls(size: int) -> None:
    data = random.Random(size).randbytes(size)
    text = base64.b64encode(data).decode()
    for url in (
        encoded(data),
        encoded(data, ""),
        encoded(data, "text/html;charset=utf-8;name=a.png"),
        f"DATA:image/png;BASE64,{text}",
        f"data:image/png;base64,{quote(text, safe='')}",
        f"data:image/png,{quote_from_bytes(data, safe='')}",
        f"data:,{quote_from_bytes(data).lower() if size < 3 else quote_from_bytes(data)}",
    ):
        assert data_url(url, WHAT, LIMITS) == data


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "data URL is written"),
        ("data:image/png;base64", "data URL is written"),
        ("data:" + "x" * 2000 + ",", "data URL is written"),
        ("http://example.org/,", "data URL is written"),
        ("data:image/png;base64,AAA", "multiple of four"),
        ("data:image/png;base64,AA=A", "no base64"),
        ("data:image/png;base64,AAAA====", "one piece"),
        ("data:image/png;base64,AA==AAAA", "no base64"),
        ("data:image/png;base64,====", "no base64"),
        ("data:image/png;base64,AA-_", "no base64"),
        ("data:image/png;base64,AAAA\nAAA", "white space"),
        ("data:image/png;base64,AAAA\nAAAA", "white space"),
        ("data:image/png;base64,AA%20", "white space"),
        ("data:image/png;base64,AAAA%0D%0AAA", "white space"),
        ("data:image/png;base64,AA%3", "% without"),
        ("data:image/png,a%", "% without"),
        ("data:image/png,%4", "% without"),
        ("data:image/png,%%41", "% without"),
        ("data:image/png,%zz", "% without"),
        ("data:image/png,é", "ASCII"),
        ("data:image/png;base64,\ud800", "ASCII"),
        ("data:image/png;base64," + "AAAA" * ((1 << 18) - 1) + "AA==" + "AAAA", "one piece"),
    ],
)
def test_bad_data_urls(url: str, why: str) -> None:
    with pytest.raises(InvalidParameter, match=why) as refused:
        data_url(url, WHAT, LIMITS)
    assert str(refused.value).startswith(f"{WHAT}: ")
    assert len(str(refused.value)) < 300


def test_data_urls_hold_no_more_than_may_be() -> None:
    limits = PictureLimits(max_bytes=1000)
    for size in range(995, 1001):
        data = bytes(size)
        assert data_url(encoded(data), WHAT, limits) == data
        assert data_url(f"data:,{quote_from_bytes(data)}", WHAT, limits) == data
    for url in (encoded(bytes(1001)), f"data:,{quote_from_bytes(bytes(1001))}", "data:," + "%41" * 2000):
        with pytest.raises(InvalidParameter, match="smaller"):
            data_url(url, WHAT, limits)
