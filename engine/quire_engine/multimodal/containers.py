"""Of a picture's file what its decoder needs, and nothing else.

Texts, profiles, EXIF data, thumbnails, comments and further frames are left out before a decoder sees the file. They
are what grows when it is unpacked, names the same bytes thousands of times over, or is pasted together anew with each
block. The time and the memory that the rest takes go by its pixels, and how many there are is read off the header here.
"""

import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

_MOST_PIECES = 1 << 16  # segments, chunks or blocks that are walked over
_MOST_SCANS = 100  # of a JPEG: each goes over all its pixels, and encoders make about ten
_MOST_TEXT = 1 << 20  # bytes of an unpacked text
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_NEEDED = (b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_EXIF, _PNG_XMP = b"Raw profile type exif", b"XML:com.adobe.xmp"  # the texts that may say how it is turned
_JPEG_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")  # of what has a length, or the end
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_NEEDED = frozenset(range(0xC0, 0xE1)) | {0xEE}  # of APP0 to APP15 these two: they say what the colours are
_JPEG_EXIF, _JPEG_XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_WEBP_EXIF, _WEBP_XMP = (b"EXIF", 8), (b"XMP ", 4)  # chunks, with the flag that says that they are there
_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_IN_EXIF = 0x0112
_NUMBERS = {3: "H", 4: "I"}  # types of EXIF's numbers


class Unreadable(ValueError):
    """Why a file is not read: the end of a sentence about it."""


@dataclass(frozen=True)
class Contents:
    """`data`: a file of that format with the first frame alone. `orientation`: as in EXIF, 1 to 8; others mean 1."""

    format: str
    width: int
    height: int
    orientation: int
    data: bytes


def contents(data: bytes) -> Contents:
    """Raises Unreadable for what is none of the formats, and for what ends too soon."""
    for is_it, read in _FORMATS:
        if is_it(data):
            try:
                return read(data)
            except (struct.error, IndexError) as error:
                raise _cut_off() from error
    raise Unreadable(f"{_other_kind(data)}; what is read is PNG, JPEG, WebP and GIF")


def _cut_off() -> Unreadable:
    return Unreadable("ends before the picture does; send the whole file")


def _damaged(why: str) -> Unreadable:
    return Unreadable(f"is damaged: {why}; save it anew")


def _png(data: bytes) -> Contents:
    length, kind, width, height = struct.unpack_from(">I4sII", data, 8)
    if (length, kind) != (13, b"IHDR"):
        raise _damaged("a PNG begins with its header")
    kept, exif, texts = [data[:33]], b"", dict[bytes, bytes]()
    at = 33
    for _ in range(_MOST_PIECES):
        length, kind = struct.unpack_from(">I4s", data, at)
        start, at = at, at + 12 + length
        if at > len(data):
            raise _cut_off()
        if kind in _PNG_NEEDED:
            kept.append(data[start:at])
        elif kind == b"eXIf":
            exif = data[start + 8 : at - 4]
        elif kind in _PNG_TEXTS:
            texts |= _png_text(kind, data[start + 8 : at - 4])
        if kind == b"IEND":
            exif = exif or _unwrapped(texts.get(_PNG_EXIF, b""))
            return Contents("PNG", width, height, _orientation(exif, texts.get(_PNG_XMP, b"")), b"".join(kept))
    raise _damaged(f"it has more than {_MOST_PIECES} chunks")


def _png_text(kind: bytes, chunk: bytes) -> dict[bytes, bytes]:
    """One that may say how the picture is turned; others are not unpacked."""
    name, _, text = chunk.partition(b"\0")
    if name not in (_PNG_EXIF, _PNG_XMP):
        return {}
    packed = kind == b"zTXt"
    if kind == b"iTXt":
        packed = text[:1] == b"\1"
        text = text[2:].partition(b"\0")[2].partition(b"\0")[2]  # after a language and the name in it
    elif packed:
        text = text[1:]
    if packed:
        try:
            text = zlib.decompressobj().decompress(text, _MOST_TEXT)
        except zlib.error:
            return {}
    return {name: text}


def _unwrapped(text: bytes) -> bytes:
    """EXIF data that ImageMagick wrote as a text: three lines, then hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


def _jpeg(data: bytes) -> Contents:
    kept, exif, xmp, size = [data[:2]], list[bytes](), b"", (0, 0)
    at = 2
    for _ in range(_MOST_PIECES):
        marker, start, at = _segment(data, at)
        content = data[start + 4 : at]
        if marker == 0xDA:
            kept.append(data[start : _end_of_scans(data, at)])
            return Contents("JPEG", *size, _orientation(b"".join(exif), xmp), b"".join(kept))
        if marker == 0xD9:
            raise _cut_off()
        if marker == 0xE1 and content.startswith(_JPEG_EXIF):
            exif.append(content[6:])
        elif marker == 0xE1 and content.startswith(_JPEG_XMP):
            xmp = content
        elif marker in _JPEG_SIZES:
            if size != (0, 0):
                raise _damaged("it gives its size twice")
            height, width = struct.unpack_from(">HH", content, 1)
            size = (width, height)
        if marker in _JPEG_NEEDED:
            kept.append(data[start:at])
    raise _damaged(f"it has more than {_MOST_PIECES} segments")


def _segment(data: bytes, at: int) -> tuple[int, int, int]:
    """The next one's marker, where it starts and where it ends."""
    found = _JPEG_MARKER.search(data, at)
    if found is None:
        raise _cut_off()
    start, marker = found.start(), data[found.start() + 1]
    if marker == 0xD9:
        return marker, start, start + 2
    [length] = struct.unpack_from(">H", data, start + 2)
    if length < 2 or start + 2 + length > len(data):
        raise _cut_off()
    return marker, start, start + 2 + length


def _end_of_scans(data: bytes, at: int) -> int:
    """Past the picture's end. Thumbnails, which have scans too, lie in segments."""
    scans = 1
    for _ in range(_MOST_PIECES):
        marker, _, at = _segment(data, at)
        if marker == 0xD9:
            return at
        scans += marker == 0xDA
        if scans > _MOST_SCANS:
            raise _damaged(f"it has more than {_MOST_SCANS} scans")
    raise _damaged(f"it has more than {_MOST_PIECES} segments")


def _gif(data: bytes) -> Contents:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    kept = [data[:at]]
    for _ in range(_MOST_PIECES):
        if data[at] == 0x2C:  # an image
            left, top, own_width, own_height = struct.unpack_from("<4H", data, at + 1)
            kept.append(data[at:])
            return Contents("GIF", max(width, left + own_width), max(height, top + own_height), 1, b"".join(kept))
        if data[at] == 0x3B:  # the end
            break
        start = at
        at = _after_blocks(data, at + 2) if data[at] == 0x21 else at + 1  # decoders pass over what is no extension
        if data[start : start + 2] == b"\x21\xf9":  # what is transparent
            kept.append(data[start:at])
    raise _damaged("there is no image in it")


def _after_blocks(data: bytes, at: int) -> int:
    for _ in range(_MOST_PIECES):
        length = data[at]
        at += 1 + length
        if length == 0:
            return at
    raise _damaged(f"an extension has more than {_MOST_PIECES} blocks")


def _webp(data: bytes) -> Contents:
    kind = data[12:16]
    if kind == b"VP8X":
        flags, *size = struct.unpack_from("<4xI3s3s", data, 16)
        width, height = (int.from_bytes(side, "little") + 1 for side in size)
        exif, xmp = (_webp_chunk(data, name) if flags & flag else b"" for name, flag in (_WEBP_EXIF, _WEBP_XMP))
        return Contents("WEBP", width, height, _orientation(exif, xmp), data)
    if kind == b"VP8L":
        [bits] = struct.unpack_from("<I", data, 21)
        return Contents("WEBP", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, 1, data)
    width, height = struct.unpack_from("<HH", data, 26)
    return Contents("WEBP", width & 0x3FFF, height & 0x3FFF, 1, data)


def _webp_chunk(data: bytes, wanted: bytes) -> bytes:
    """The first of a name; nothing where there is none."""
    at = 12
    for _ in range(_MOST_PIECES):
        if at + 8 > len(data):
            break
        name, length = struct.unpack_from("<4sI", data, at)
        if name == wanted:
            return data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
    return b""


def _orientation(exif: bytes, xmp: bytes) -> int:
    """As PIL reads it: of EXIF data the first directory's, else what XMP says."""
    number = _in_exif(exif)
    if number is None:
        found = _IN_XMP.search(xmp)
        number = int(found[1]) if found else 1
    return number


def _in_exif(exif: bytes) -> int | None:
    """None where nothing is said, 1 where they are no such data. Only this entry is read: others may name any bytes,
    as often as they like.
    """
    for _ in range(2):
        exif = exif.removeprefix(_JPEG_EXIF)
    if not exif:
        return None
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return 1
    [at] = struct.unpack_from(f"{order}I", exif, 4)
    if at + 2 > len(exif):
        return None
    [count] = struct.unpack_from(f"{order}H", exif, at)
    entries = exif[at + 2 : at + 2 + 12 * count]
    entries = entries[: len(entries) // 12 * 12]
    for tag, kind, length, value in struct.iter_unpack(f"{order}HHI4s", entries):
        if tag != _IN_EXIF or kind not in _NUMBERS:
            continue
        form = f"{order}{_NUMBERS[kind]}"
        size = length * struct.calcsize(form)
        if length == 1:
            return int(struct.unpack_from(form, value)[0])
        if 0 < size <= 4 or 4 < size <= len(exif) - struct.unpack(f"{order}I", value)[0]:
            return 1  # several numbers, which are there
    return None


def _other_kind(data: bytes) -> str:
    """For the error."""
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for sign, name in _OTHERS:
        if start.startswith(sign):
            return f"is {name}"
    if data[4:8] == b"ftyp":
        return "is an HEIF, an AVIF or a video"
    return "is of an unknown format" if data else "is empty"


_OTHERS = (
    (b"<!doctype html", "a page in HTML"),
    (b"<html", "a page in HTML"),
    (b"<svg", "an SVG"),
    (b"<?xml", "an SVG or other XML"),
    (b"%pdf", "a PDF"),
    (b"ii*\0", "a TIFF"),
    (b"mm\0*", "a TIFF"),
    (b"bm", "a BMP"),
)
_FORMATS: tuple[tuple[Callable[[bytes], bool], Callable[[bytes], Contents]], ...] = (
    (lambda data: data.startswith(_PNG), _png),
    (lambda data: data.startswith(b"\xff\xd8\xff"), _jpeg),
    (lambda data: data.startswith((b"GIF87a", b"GIF89a")), _gif),
    (
        lambda data: data.startswith(b"RIFF") and data[8:12] == b"WEBP" and data[12:16] in (b"VP8 ", b"VP8L", b"VP8X"),
        _webp,
    ),
)
