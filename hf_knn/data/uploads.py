"""What strangers send to a server: how much of it is taken, the same by the Space and `serve`."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from PIL import Image

from .decode import decoding, limits_of_process

MAX_UPLOADED_FILE = 64 * 2**20
"""Bytes of one file; the server refuses more while it is being sent."""

MAX_UPLOAD = 4 * MAX_UPLOADED_FILE
"""Bytes of one request that sends files: sixteen photos, or a few huge ones."""

LARGE_PIXELS = 24 * 10**6
"""Pictures with more are decoded and looked at one at a time; `decode_image` has the limits."""

MAX_FILES = 16
"""Pictures in one request."""

MAX_LABEL = 60
"""Characters of a label."""

_MMAP_THRESHOLD = -3
"""What glibc's `mallopt` calls the size from which a block of memory is the system's own."""

_LARGE_BLOCK = 8 * 2**20

Sent = TypeVar("Sent")


class UploadError(ValueError):
    """Something that whoever sent it can do something about; its message is shown as it is."""


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


@contextmanager
def uploaded(source: bytes | str | Path) -> Iterator[Image.Image]:
    """A decoded picture of a stranger; while a large one is in use, no other is decoded.

    Args:
        source: the file's bytes, or its path.

    Raises:
        BadImageError: if it is not a picture that is accepted, with the reason.
        OSError: if it cannot be read.
    """
    with decoding(source, max_bytes=largest_upload(), alone_above=LARGE_PIXELS) as image:
        yield image


def largest_upload() -> int:
    """Bytes of one file: `MAX_UPLOADED_FILE`, or less where the process decodes less."""
    return min(MAX_UPLOADED_FILE, limits_of_process().bytes)


def check_count(pictures: list[Sent] | None) -> list[Sent]:
    """Refuses none, or more pictures than one request may have.

    Args:
        pictures: or what names them.

    Raises:
        UploadError: with both numbers.
    """
    if not pictures:
        raise UploadError("Expected pictures, but got none; choose some files first.")
    if len(pictures) > MAX_FILES:
        raise UploadError(
            f"Expected at most {MAX_FILES} pictures at once, but got {len(pictures)}."
        )
    return pictures


def check_label(label: str | None) -> str:
    """A label that can be shown: one line of printable text.

    Args:
        label: as it was typed.

    Returns:
        Without space around it.

    Raises:
        UploadError: for an empty or long one, or one with control characters.
    """
    text = (label or "").strip()
    if not text:
        raise UploadError(
            f"Expected a label of 1 to {MAX_LABEL} printable characters, but got none; type one."
        )
    if len(text) > MAX_LABEL or not text.isprintable():
        raise UploadError(
            f"Expected a label of 1 to {MAX_LABEL} printable characters, but got {len(text)} "
            "characters or some that cannot be shown; type another one."
        )
    return text
