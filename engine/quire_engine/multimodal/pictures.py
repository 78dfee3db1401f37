"""A picture's bytes into its pixels, whoever sent them.

They come out as those of transformers' `load_image`: turned as EXIF data say, then converted to RGB, which drops what
is transparent. PIL is imported when the first picture comes: a server that gets none does without.
"""

import binascii
import warnings
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from quire_engine.errors import InvalidParameter
from quire_engine.multimodal.containers import Contents, Unreadable, contents

if TYPE_CHECKING:
    from PIL.Image import Image

_MOST_HEADER = 1024  # characters before a data URL's comma
_PIECE = 1 << 20  # characters of base64; a multiple of 4. Between pieces other threads run
_HEX = np.full(256, 255, np.uint8)
for _digit in "0123456789abcdefABCDEF":
    _HEX[ord(_digit)] = int(_digit, 16)


@dataclass(frozen=True, kw_only=True)
class PictureLimits:
    """Of one picture: its file's bytes, its pixels, and its longer side in shorter sides."""

    max_bytes: int = 20 << 20
    max_pixels: int = 1 << 26
    max_aspect: int = 200  # image processors refuse more


def read_picture(data: bytes, what: str, limits: PictureLimits) -> "Image":
    """The first or only frame of a PNG, JPEG, WebP or GIF, the way up it is to be seen, in RGB. Which it is its content
    says.

    It takes time, and memory for several copies of its pixels at four bytes each: it belongs in a thread, and not into
    many at once. Raises InvalidParameter, whose message begins with `what`: which of a call's pictures this is.
    """
    check_size(len(data), what, limits)
    try:
        found = contents(data)
        _check_pixels(found, limits)
        return _decoded(found)
    except Unreadable as error:
        raise wrong(what, f"the file {error}") from error
    except Exception as error:  # of any kind, from a decoder that was given anything
        raise wrong(what, "the file is damaged, or ends too soon; send the whole file, or save it anew") from error


def data_url(url: str, what: str, limits: PictureLimits) -> bytes:
    """What a `data:` URL holds, in base64 or with escapes (RFC 2397). Of what kind it says it is does not matter.

    Raises InvalidParameter.
    """
    comma = url.find(",", 0, _MOST_HEADER)
    scheme, _, header = url[: max(comma, 0)].partition(":")
    if scheme.lower() != "data":
        raise wrong(what, "a data URL is written as data:image/png;base64,iVBOR...; send it so")
    at_most = _MOST_HEADER + 4 * limits.max_bytes  # base64 with every character escaped
    if len(url) > at_most:
        raise wrong(what, f"the URL has {len(url)} characters, and {at_most} are read; send a smaller file")
    try:
        text = url[comma + 1 :].encode("ascii")
    except UnicodeEncodeError as error:
        raise wrong(what, "the data URL holds characters that are not ASCII; send the file in base64") from error
    text = _unescaped(text, what)
    if header.lower().endswith(";base64"):
        check_size(len(text) // 4 * 3 - text.count(b"=", -2), what, limits)
        return _from_base64(text, what)
    check_size(len(text), what, limits)
    return text


def check_size(size: int, what: str, limits: PictureLimits) -> None:
    """Of a file, in bytes. Raises InvalidParameter."""
    if size > limits.max_bytes:
        raise wrong(what, f"the file has {size} bytes, and at most {limits.max_bytes} are read; send a smaller one")


def wrong(what: str, why: str) -> InvalidParameter:
    """The error about one of a call's pictures."""
    return InvalidParameter(f"{what}: {why}", "messages")


def _check_pixels(found: Contents, limits: PictureLimits) -> None:
    shape = f"has {found.width} x {found.height} pixels"
    shorter, longer = sorted((found.width, found.height))
    if shorter == 0:
        raise Unreadable(f"{shape}; there is nothing to see")
    if longer > limits.max_aspect * shorter:
        raise Unreadable(f"{shape}; the longer side may be {limits.max_aspect} times the shorter one: crop it")
    if shorter * longer > limits.max_pixels:
        raise Unreadable(f"{shape}, and at most {limits.max_pixels} in all are read; send it smaller")


def _decoded(found: Contents) -> "Image":
    """What its header does not tell, or tells otherwise, is an error."""
    from io import BytesIO

    image_module = _pil()
    with image_module.open(BytesIO(found.data), formats=[found.format]) as image:
        if image.size != (found.width, found.height):
            raise Unreadable("is damaged: it is of two sizes; save it anew")
        turned = {
            2: image_module.Transpose.FLIP_LEFT_RIGHT,
            3: image_module.Transpose.ROTATE_180,
            4: image_module.Transpose.FLIP_TOP_BOTTOM,
            5: image_module.Transpose.TRANSPOSE,
            6: image_module.Transpose.ROTATE_270,
            7: image_module.Transpose.TRANSVERSE,
            8: image_module.Transpose.ROTATE_90,
        }.get(found.orientation)
        image.load()
        upright = image if turned is None else image.transpose(turned)
        return upright.convert("RGB")


@cache
def _pil() -> ModuleType:
    """PIL.Image, whose warnings about what is odd in a file are of no use to who runs a server."""
    from PIL import Image

    warnings.filterwarnings("ignore", module=r"PIL\.")
    return Image


def _unescaped(text: bytes, what: str) -> bytes:
    """Without its %41s. All at once: there may be millions."""
    if b"%" not in text:
        return text
    characters = np.frombuffer(text, np.uint8)
    at = np.flatnonzero(characters == ord("%"))
    if at[-1] + 2 >= len(text):
        raise _stray_percent(what)
    high, low = _HEX[characters[at + 1]], _HEX[characters[at + 2]]
    if 255 in high or 255 in low:
        raise _stray_percent(what)
    plain, kept = characters.copy(), np.ones(len(text), bool)
    plain[at] = high * 16 + low
    kept[at + 1] = kept[at + 2] = False
    return plain[kept].tobytes()


def _stray_percent(what: str) -> InvalidParameter:
    return wrong(what, "the data URL holds a % without two hexadecimal digits after it; write it as %25")


def _from_base64(text: bytes, what: str) -> bytes:
    if any(byte in text for byte in b" \n\r\t"):
        raise wrong(what, "its base64 holds white space; send it in one line")
    if len(text) % 4:
        raise wrong(what, "its base64 is no multiple of four characters: it was cut off, or lacks = at its end")
    try:
        pieces = [binascii.a2b_base64(text[at : at + _PIECE], strict_mode=True) for at in range(0, len(text), _PIECE)]
    except binascii.Error as error:
        raise wrong(what, "its base64 holds what is no base64; send A-Z a-z 0-9 + / and = at the end") from error
    if text.endswith(b"===") or any(text[at - 1 : at] == b"=" for at in range(_PIECE, len(text), _PIECE)):
        raise wrong(what, "its base64 has = before its end; send one file in one piece")
    return b"".join(pieces)
