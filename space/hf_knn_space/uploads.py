"""What visitors send: checked by the project's own decoder before anything else looks at it."""

import base64
import ctypes
import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from hf_knn.data import decoding

MAX_BYTES = 64 * 2**20
"""Of one file; the server refuses more while it is being sent."""

LARGE_PIXELS = 24 * 10**6
"""Pictures with more are decoded and looked at one at a time; `decode_image` has the limits."""

MAX_FILES = 16
"""Pictures in one request."""

MAX_LABEL = 60
"""Characters of a label."""

_THUMBNAIL_SIDE = 192


_MMAP_THRESHOLD = -3
"""What glibc's `mallopt` calls the size from which a block of memory is the system's own."""

_LARGE_BLOCK = 8 * 2**20


def give_back_large_blocks() -> bool:
    """Lets large blocks of memory go back to the system when they are freed, in this process.

    glibc does so by itself, until a first large block was freed: from then on blocks of up to 32 MB
    stay with the thread that had them. 2,000 malformed files left 600 MB with the server instead of
    200.

    Returns:
        Whether the C library is one that can be told.
    """
    try:
        tell = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows: other ways of their own
        return False
    return bool(tell(_MMAP_THRESHOLD, _LARGE_BLOCK))


class SpaceError(ValueError):
    """Something a visitor can do something about; its message is shown as it is."""


class Upload(NamedTuple):
    """A picture that was read.

    Attributes:
        name: of the file, without its folder.
        digest: sha256 of the file, in hexadecimal digits.
        image: RGB, upright, without metadata.
    """

    name: str
    digest: str
    image: Image.Image


@contextmanager
def reading(path: str | Path | None) -> Iterator[Upload]:
    """Reads one file; while a large picture is in use, no other is read.

    Args:
        path: of the file; None if nothing was sent.

    Raises:
        SpaceError: if nothing was sent.
        BadImageError: if it is not a picture that is accepted, with the reason.
    """
    if not path:
        raise SpaceError("Expected a picture, but got none; choose a file first.")
    place = Path(path)
    with place.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    digest = hashlib.sha256(data).hexdigest()
    with decoding(data, max_bytes=MAX_BYTES, alone_above=LARGE_PIXELS) as image:
        yield Upload(place.name, digest, image)


def small_picture(source: bytes | str | Path) -> bytes:
    """A small WEBP of the picture in a file.

    Args:
        source: the file's bytes, or its path.

    Raises:
        BadImageError: if it is not a picture that is accepted, with the reason.
        OSError: if it cannot be read.
    """
    with decoding(source, alone_above=LARGE_PIXELS) as image:
        return thumbnail(image)


def check_files(paths: list[str] | None) -> list[str]:
    """Refuses none, or more files than one request may have.

    Raises:
        SpaceError: with both numbers.
    """
    if not paths:
        raise SpaceError("Expected pictures, but got none; choose some files first.")
    if len(paths) > MAX_FILES:
        raise SpaceError(f"Expected at most {MAX_FILES} pictures at once, but got {len(paths)}.")
    return paths


def check_label(label: str | None) -> str:
    """A label that can be shown: one line of printable text.

    Args:
        label: as it was typed.

    Returns:
        Without space around it.

    Raises:
        SpaceError: for an empty or long one, or one with control characters.
    """
    text = (label or "").strip()
    if not text:
        raise SpaceError(
            f"Expected a label of 1 to {MAX_LABEL} printable characters, but got none; type one."
        )
    if len(text) > MAX_LABEL or not text.isprintable():
        raise SpaceError(
            f"Expected a label of 1 to {MAX_LABEL} printable characters, but got {len(text)} "
            "characters or some that cannot be shown; type another one."
        )
    return text


def shrink(image: Image.Image) -> Image.Image:
    """A picture that takes little memory and still makes the same kind of thumbnail.

    Args:
        image: RGB, as the decoder returns it.
    """
    factor = max(image.size) // (2 * _THUMBNAIL_SIDE)
    return image.reduce(factor) if factor > 1 and min(image.size) >= factor else image


def thumbnail(image: Image.Image) -> bytes:
    """A small WEBP of a picture, made from its pixels alone.

    Args:
        image: RGB, as the decoder returns it.
    """
    small = image.copy()
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    if max(small.size) < _THUMBNAIL_SIDE // 2:  # tiny scans stay sharp
        scale = _THUMBNAIL_SIDE // max(small.size)
        size = (small.width * scale, small.height * scale)
        small = small.resize(size, Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=82, method=2)  # half the time of 4, and as small
    return buffer.getvalue()


def as_uri(picture: bytes) -> str:
    """A WEBP for the `src` of an `img`."""
    return "data:image/webp;base64," + base64.b64encode(picture).decode()
