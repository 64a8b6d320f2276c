"""What visitors send: checked by the project's own decoder before anything else looks at it."""

import base64
import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from hf_knn.data import LARGE_PIXELS, MAX_UPLOADED_FILE, UploadError, decoding, uploaded

MAX_BYTES = MAX_UPLOADED_FILE
"""Of one file; the server refuses more while it is being sent."""

SpaceError = UploadError
"""Something a visitor can do something about; its message is shown as it is."""

_THUMBNAIL_SIDE = 192


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
    with uploaded(data) as image:
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
