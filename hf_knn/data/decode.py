"""The one decoder of the project: every picture, from wherever, comes through here."""

import io
import itertools
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin

from .formats import CONVERT, BadImageError, as_bad_image, identified, what_else
from .pixels import FULL_PIXELS, kind_of, reduce_jpeg, to_rgb

logger = logging.getLogger(__name__)

ALLOWED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
PICTURE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib",
    ".tif", ".tiff", ".avif", ".avifs", ".heic", ".heif", ".hif",
)  # fmt: skip
"""How the names of pictures end that are read, in lower case; HEIC with the extra `heic`."""

MAX_BYTES = 512 * 2**20
"""Of a file: 64 megapixels of 64 bits, uncompressed."""

MAX_PIXELS, MAX_JPEG_PIXELS = 64 * 10**6, 200 * 10**6
"""Width times height, of most formats and of JPEG, which can be decoded at a part of its size."""

ALONE_PIXELS = 32 * 10**6
"""Pictures with more are decoded one at a time."""

_SUBFILE, _TILE_WIDTH, _TILE_HEIGHT, _DNG = 254, 322, 323, 50706

_alone = threading.RLock()
_reduced = itertools.count()


class Limits(NamedTuple):
    """What a picture may have.

    Attributes:
        bytes: of the file.
        pixels: width times height; None is `MAX_JPEG_PIXELS` for a JPEG, `MAX_PIXELS` for others.
    """

    bytes: int
    pixels: int | None

    def pixels_of(self, kind: str | None) -> int:
        """The most pixels of a format; None is a picture made in memory."""
        if self.pixels is not None:
            return self.pixels
        return MAX_JPEG_PIXELS if kind == "JPEG" else MAX_PIXELS


def limits_of_process() -> Limits:
    """The limits where none are given: `$HF_KNN_MAX_BYTES`, `$HF_KNN_MAX_PIXELS`, or the usual.

    Raises:
        ValueError: for a variable that is no whole number above 0.
    """
    return Limits(_number("HF_KNN_MAX_BYTES") or MAX_BYTES, _number("HF_KNN_MAX_PIXELS"))


class _PillowsLimit:
    """Pillow's own limit is one of the process; it is off while any thread decodes here."""

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._before: int | None = None

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Within it only our limits decide; the last one out puts Pillow's back."""
        with self._lock:
            if not self._users:
                self._before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    Image.MAX_IMAGE_PIXELS = self._before


_pillows_limit = _PillowsLimit()


def decode_image(
    source: bytes | str | Path | Image.Image,
    *,
    formats: tuple[str, ...] = ALLOWED_FORMATS,
    max_bytes: int | None = None,
    max_pixels: int | None = None,
) -> Image.Image:
    """Decodes a picture: first frame or page, upright, over white, RGB, without metadata.

    Size and format are read from the header before anything is decoded. A file that is also an
    archive, a document or a program (a polyglot) is refused. Of 16 bits the upper 8 are kept;
    32-bit and float values are 0 to 1, 0 to 255 or 0 to 65535, by the highest there is. A JPEG of
    more than 64 megapixels is decoded at a half, a quarter or an eighth of its width and height,
    and this is logged. Pictures of more than 32 megapixels are decoded one at a time.

    Args:
        source: the file's bytes, its path, or an opened picture, which is always decoded in full.
        formats: Pillow format names that are accepted; HEIF needs the extra `heic`.
        max_bytes: the largest file; None is `$HF_KNN_MAX_BYTES` or 512 MiB.
        max_pixels: the largest width times height; None is `$HF_KNN_MAX_PIXELS`, or 200 million for
            a JPEG and 64 million for other formats.

    Returns:
        An RGB image.

    Raises:
        BadImageError: if it is not such a picture, in one sentence.
        FileNotFoundError: if there is no such file.
    """
    with decoding(source, formats=formats, max_bytes=max_bytes, max_pixels=max_pixels) as image:
        return image


@contextmanager
def decoding(
    source: bytes | str | Path | Image.Image,
    *,
    formats: tuple[str, ...] = ALLOWED_FORMATS,
    max_bytes: int | None = None,
    max_pixels: int | None = None,
    alone_above: int = ALONE_PIXELS,
) -> Iterator[Image.Image]:
    """A decoded picture as by `decode_image`; while a large one is in use, no other is decoded.

    Whoever makes something small of each picture inside the block needs memory for one large
    picture, however many threads there are.

    Args:
        source: as for `decode_image`.
        formats: as for `decode_image`.
        max_bytes: as for `decode_image`.
        max_pixels: as for `decode_image`.
        alone_above: width times height from which a picture is a large one.

    Raises:
        BadImageError: if it is not such a picture, in one sentence.
        FileNotFoundError: if there is no such file.
    """
    usual = limits_of_process()
    limits = Limits(max_bytes or usual.bytes, max_pixels or usual.pixels)
    with _opened(source, formats, limits) as image:
        is_large = image.width * image.height > alone_above
        with _alone if is_large else nullcontext():
            with _pillows_limit.lifted(), as_bad_image():
                rgb = to_rgb(image)
            if image is not source:
                image.close()  # its pixels are no longer needed
            yield rgb


def read_picture(picture: Any, number: int) -> Image.Image:
    """Decodes one of several pictures, of whatever kind; see `reading`."""
    with reading(picture, number) as image:
        return image


@contextmanager
def reading(picture: Any, number: int) -> Iterator[Image.Image]:
    """One of several pictures, of whatever kind, decoded as by `decoding`.

    Args:
        picture: a path, the content of a file, an opened picture, or an array [H, W, 3] uint8.
        number: which one it is, for the error.

    Raises:
        BadImageError: naming the picture, by its path or its number.
    """
    with ExitStack() as stack:
        try:
            source = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
            image = stack.enter_context(decoding(source))
        except (BadImageError, OSError, TypeError) as error:
            name = picture if isinstance(picture, str | Path) else f"picture {number}"
            reason = f"Expected {name} to be readable, but {error}."
            raise BadImageError(reason, getattr(error, "is_unread", False)) from error
        yield image


@contextmanager
def _opened(
    source: bytes | str | Path | Image.Image, formats: tuple[str, ...], limits: Limits
) -> Iterator[Image.Image]:
    """A picture whose header was read and is fine; a JPEG set to the size it is decoded at."""
    if isinstance(source, Image.Image):
        _check(source, formats, limits)
        yield source
        return
    with io.BytesIO(source) if isinstance(source, bytes) else _file(Path(source)) as file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            raise BadImageError("the file is empty")
        if size > limits.bytes:
            reason = f"the file has {size} bytes, more than {limits.bytes}; {CONVERT}"
            raise BadImageError(f"{reason}, or raise the limit (--max-bytes)", is_unread=True)
        with _pillows_limit.lifted(), as_bad_image():
            image = identified(file, formats)
            other = what_else(file, size)
            if other:
                raise BadImageError(f"the file is also {other}; save the picture anew")
            _check(image, formats, limits)
            width, height = image.size
            part = reduce_jpeg(image)
            if part > 1:
                _say_reduced(part, width, height)
        with image:
            yield image


def _file(path: Path) -> IO[bytes]:
    if path.is_dir():
        raise BadImageError("it is a folder; name the pictures in it")
    if path.exists() and not path.is_file():  # a pipe or a device may never end
        raise BadImageError("it is no plain file")
    return path.open("rb")


def _check(image: Image.Image, formats: tuple[str, ...], limits: Limits) -> None:
    """Refuses by the header."""
    kind = kind_of(image)
    if kind is not None and kind not in formats:
        reason = f"not a picture in one of the formats {', '.join(formats)}; {CONVERT}"
        raise BadImageError(reason, is_unread=True)
    width, height = image.size
    most = limits.pixels_of(kind)
    if width * height > most:
        reason = f"the picture has {width} x {height} pixels, more than {most}; make it smaller"
        raise BadImageError(f"{reason}, or raise the limit (--max-pixels)", is_unread=True)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        if tags.get(_SUBFILE, 0) & 1 or _DNG in tags:
            reason = f"it is a raw photo, of which only the preview could be read; {CONVERT}"
            raise BadImageError(reason, is_unread=True)
        if tags.get(_TILE_WIDTH, 0) * tags.get(_TILE_HEIGHT, 0) > max(most, MAX_PIXELS):
            raise BadImageError(f"its tiles have more than {max(most, MAX_PIXELS)} pixels")


def _say_reduced(part: int, width: int, height: int) -> None:
    level = logging.DEBUG if next(_reduced) else logging.WARNING  # said once per run
    logger.log(
        level,
        "A JPEG of %d x %d pixels is read at 1/%d of its width and height, as every one of more "
        "than %d pixels is.",
        width, height, part, FULL_PIXELS,
    )  # fmt: skip


def _number(variable: str) -> int | None:
    text = os.environ.get(variable, "").strip()
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(f"Expected ${variable} to be a whole number above 0, but got {text!r}.")
    return int(text)
