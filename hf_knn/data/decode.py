"""The one decoder of the project: every picture, from wherever, comes through here."""

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

ALLOWED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
PICTURE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib",
    ".tif", ".tiff", ".avif", ".avifs", ".heic", ".heif", ".hif",
)  # fmt: skip
"""How the names of pictures end that are read, in lower case; HEIC with the extra `heic`."""

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64 * 10**6

_EDGE = 16 * 2**10
_FOREIGN = {
    b"%pdf-": "a PDF", b"<script": "a web page", b"<html": "a web page", b"<?php": "a program",
}  # fmt: skip
"""What makes other programs take a file for something else, looked for in its first and last 16 KB.

Bytes behind a picture as such are fine: phones put videos and second pictures there.
"""

# what Pillow's format plug-ins raise on malformed files
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError,
    OverflowError, NotImplementedError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


class BadImageError(ValueError):
    """A file that is not a picture we accept, with the reason."""


def decode_image(
    source: bytes | str | Path | Image.Image,
    *,
    formats: tuple[str, ...] = ALLOWED_FORMATS,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Decodes a picture: first frame, upright, over white, RGB, without metadata.

    Size and format are read from the header before anything is decoded. A file that is also an
    archive, a document or a program (a polyglot) is refused.

    Args:
        source: the file's bytes, its path, or an opened picture.
        formats: Pillow format names that are accepted (add `"TIFF"` if you must).
        max_bytes: the largest file.
        max_pixels: the largest width times height.

    Returns:
        An RGB image.

    Raises:
        BadImageError: if it is not such a picture, in one sentence.
        FileNotFoundError: if there is no such file.
    """
    if isinstance(source, Image.Image):
        return _decode_opened(source, formats, max_pixels)
    data = source if isinstance(source, bytes) else _read(Path(source), max_bytes)
    if not data:
        raise BadImageError("the file is empty")
    if len(data) > max_bytes:
        raise BadImageError(f"the file has {len(data)} bytes, more than {max_bytes}")
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            other = _what_else(data)
            if other:
                raise BadImageError(f"the file is also {other}; save the picture anew")
            return _decode_opened(image, formats, max_pixels)
    except BadImageError:
        raise
    except Image.UnidentifiedImageError:
        raise BadImageError(f"not a picture in one of the formats {', '.join(formats)}") from None
    except _DECODE_ERRORS as error:
        raise BadImageError(f"the picture cannot be decoded ({error})") from error


def read_picture(picture: Any, number: int) -> Image.Image:
    """Decodes one of several pictures, of whatever kind.

    Args:
        picture: a path, the content of a file, an opened picture, or an array [H, W, 3] uint8.
        number: which one it is, for the error.

    Raises:
        BadImageError: naming the picture, by its path or its number.
    """
    try:
        return decode_image(
            Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        )
    except (BadImageError, OSError, TypeError) as error:
        name = picture if isinstance(picture, str | Path) else f"picture {number}"
        raise BadImageError(f"Expected {name} to be readable, but {error}.") from error


def _decode_opened(image: Image.Image, formats: tuple[str, ...], max_pixels: int) -> Image.Image:
    kind = "JPEG" if image.format == "MPO" else image.format  # phones put several JPEGs into one
    if kind is not None and kind not in formats:
        raise BadImageError(f"not a picture in one of the formats {', '.join(formats)}")
    width, height = image.size
    if width * height > max_pixels:
        raise BadImageError(f"the picture has {width} x {height} pixels, more than {max_pixels}")
    try:
        if kind is not None:  # one made in memory has a single frame
            image.seek(0)
        image.load()
        return _to_rgb(image)
    except _DECODE_ERRORS as error:
        raise BadImageError(f"the picture cannot be decoded ({error})") from error


def _read(path: Path, max_bytes: int) -> bytes:
    if path.is_dir():
        raise BadImageError("it is a folder; name the pictures in it")
    with path.open("rb") as file:
        return file.read(max_bytes + 1)


def _what_else(data: bytes) -> str | None:
    """What a file is besides a picture; None for nothing known."""
    if zipfile.is_zipfile(io.BytesIO(data[-_EDGE:])):
        return "an archive"
    edges = (data if len(data) <= 2 * _EDGE else data[:_EDGE] + data[-_EDGE:]).lower()
    return next((kind for mark, kind in _FOREIGN.items() if mark in edges), None)


def _to_rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        upright = _to_8_bits(upright)
    elif upright.has_transparency_data:
        layer = upright.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, "white")
        upright = Image.alpha_composite(canvas, layer)
    rgb = upright.convert("RGB")
    if rgb is image:
        rgb = image.copy()
    rgb.info = {}
    return rgb


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit greyscale keeps its high byte; Pillow's own conversion clips."""
    values = np.asarray(image.convert("I"))
    grey = (values.clip(0, 65535) >> 8).astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey = np.where(values == key, np.uint8(255), grey)  # a transparent grey, over white
    return Image.fromarray(grey)
