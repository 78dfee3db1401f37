"""Files of pictures, good ones from PIL and others put together by hand."""

import io
import random
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> Image.Image:
    """Smooth enough for JPEG, and different in every corner."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, channels), np.uint8)
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
    pixels = coarse if channels > 1 else coarse[..., 0]
    return Image.fromarray(pixels, mode).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes, pixels: bytes | None = None, depth: int = 8, colour: int = 2) -> bytes:
    """With `chunks` before the pixels, which are black where they are not given."""
    packed = zlib.compress(bytes((3 * width + 1) * height)) if pixels is None else pixels
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def segment(marker: int, content: bytes) -> bytes:
    """Of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    """Right after its start."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def exif(orientation: int, order: str = "<", *, kind: str = "H", more: bytes = b"", entries: int = 1) -> bytes:
    """The one entry, and `more` after it."""
    number = {"H": 3, "I": 4}[kind]
    value = struct.pack(f"{order}{kind}", orientation).ljust(4, b"\0")
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + struct.pack(f"{order}IHHHI", 8, entries, 0x0112, number, 1) + value + more + bytes(4)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """With a few bytes changed, cut out, doubled or put in."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.choice((draw.randrange(len(changed)), draw.randrange(min(64, len(changed)))))
        match draw.randrange(6):
            case 0:
                changed[at] = draw.randrange(256)
            case 1:
                changed[at] ^= 1 << draw.randrange(8)
            case 2:
                del changed[at : at + draw.choice((1, 2, 4, 40))]
            case 3:
                changed[at:at] = changed[at : at + draw.choice((1, 2, 12, 40))]
            case 4:
                changed[at : at + 4] = draw.choice(
                    (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\xc3\x50")
                )
            case 5:
                del changed[at:]
        if not changed:
            break
    return bytes(changed)
