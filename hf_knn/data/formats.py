"""What a file is, by its header: a picture that is read, one that is not, or something else too."""

import io
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import IO

from PIL import Image, TiffImagePlugin

from .pixels import DECODE_ERRORS, ForeignValuesError

_EDGE = 16 * 2**10
CONVERT = "convert it to JPEG or PNG"
_LONGEST = 160
"""Characters of what a decoder says."""

_FOREIGN = {
    b"%pdf-": "a PDF", b"<script": "a web page", b"<html": "a web page", b"<?php": "a program",
}  # fmt: skip
"""What makes other programs take a file for something else, looked for in its first and last 16 KB.

Bytes behind a picture as such are fine: phones put videos and second pictures there.
"""

_UNREAD = {
    b"\xff\x0a": "a JPEG XL picture", b"\0\0\0\x0cJXL ": "a JPEG XL picture",
    b"\0\0\0\x0cjP  ": "a JPEG 2000 picture", b"\xff\x4f\xff\x51": "a JPEG 2000 picture",
    b"8BPS": "a Photoshop file", b"gimp xcf": "a GIMP file", b"%PDF-": "a PDF",
    b"%!PS": "a PostScript file", b"\xc5\xd0\xd3\xc6": "a PostScript file",
    b"\0\0\1\0": "an icon", b"\0\0\2\0": "a cursor", b"icns": "an icon",
    b"DDS ": "a DDS texture", b"qoif": "a QOI picture", b"v/1\x01": "an OpenEXR picture",
    b"#?RADIANCE": "a Radiance picture", b"SIMPLE  =": "a FITS file",
    b"FUJIFILMCCD-RAW": "a raw photo", b"IIRO": "a raw photo", b"IIRS": "a raw photo",
    b"IIU\0": "a raw photo", b"\x1aE\xdf\xa3": "a video", b"\xd7\xcd\xc6\x9a": "a WMF drawing",
    b"AT&TFORM": "a DjVu document",
}  # fmt: skip
"""Pictures of formats that are not read, by their first bytes."""

_PNM = re.compile(rb"P([1-6]\s+[\d#]|[Ff]\s+\d|7\nWIDTH)")
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"heif"}


class BadImageError(ValueError):
    """A file that is not a picture we accept, with the reason.

    Args:
        reason: in one sentence, without its full stop; of what is not read it says what to do.
        is_unread: whether it may be a whole picture, of a format or size that is not read.
    """

    def __init__(self, reason: str, is_unread: bool = False) -> None:
        super().__init__(reason)
        self.is_unread = is_unread


@contextmanager
def as_bad_image() -> Iterator[None]:
    """What a decoder raises becomes one kind of error."""
    try:
        yield
    except BadImageError:
        raise
    except ForeignValuesError as error:
        raise BadImageError(f"{error}; {CONVERT}", is_unread=True) from error
    except DECODE_ERRORS as error:
        said = " ".join(str(error).split())[:_LONGEST]
        raise BadImageError(f"the picture cannot be decoded ({said})") from error


def identified(file: IO[bytes], formats: tuple[str, ...]) -> Image.Image:
    """The picture in a file, of which only the header was read."""
    file.seek(0)
    start = file.read(1024)
    brands = _brands(start)
    is_heic = not brands.isdisjoint(_HEIC)
    if is_heic and "HEIF" in formats and not _reads_heic():
        raise BadImageError(
            f"it is a HEIC picture; run `pip install 'hf-knn[heic]'`, or {CONVERT}", is_unread=True
        )
    known = tuple(name for name in formats if name != "HEIF" or is_heic)
    file.seek(0)
    try:
        return Image.open(file, formats=known)
    except Image.UnidentifiedImageError:
        what = _unread(start, known) or _unread_tiff(file, start)
        allowed = ", ".join(formats)
        if what:
            reason = f"it is {what}, not a picture in one of the formats {allowed}; {CONVERT}"
            raise BadImageError(reason, is_unread=True) from None
        raise BadImageError(f"not a picture in one of the formats {allowed}") from None


def _brands(start: bytes) -> set[bytes]:
    """What an ISO media file (AVIF, HEIC, CR3, video) says it is; nothing for other files."""
    if start[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(start[:4], "big"), len(start))
    return {start[8:12], *(start[at : at + 4] for at in range(16, end, 4))}


def _unread(start: bytes, formats: tuple[str, ...]) -> str | None:
    """The name of a format that is known and not read; None for anything else."""
    known = next((kind for mark, kind in _UNREAD.items() if start.startswith(mark)), None)
    if known:
        return known
    brands = _brands(start)
    if brands:
        if not brands.isdisjoint(_HEIC):
            return None if "HEIF" in formats else "a HEIC picture"
        if b"avif" in brands or b"avis" in brands:
            return None if "AVIF" in formats else "an AVIF picture"
        return "a raw photo" if b"crx " in brands else "a video"
    if _PNM.match(start):
        return "a PNM picture"
    if start[8:10] == b"CR" and start[:2] == b"II":
        return "a raw photo"
    if start[128:132] == b"DICM":
        return "a DICOM file"
    return "an SVG drawing" if b"<svg" in start.lower() else None


def _unread_tiff(file: IO[bytes], start: bytes) -> str | None:
    """Says whether a file is a whole TIFF of values that are not read, such as float colours."""
    if start[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    file.seek(0)
    try:
        TiffImagePlugin.TiffImageFile(file)
    except SyntaxError as error:
        if "pixel mode" in str(error) or isinstance(error.__cause__, KeyError):
            return "a TIFF of an unusual kind"
    except DECODE_ERRORS:
        return None
    return None


@cache
def _reads_heic() -> bool:
    """Teaches Pillow to read HEIC, if the extra is installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def what_else(file: IO[bytes], size: int) -> str | None:
    """What a file is besides a picture; None for nothing known."""
    file.seek(0)
    start = file.read(_EDGE)
    file.seek(max(len(start), size - _EDGE))
    end = file.read(_EDGE)
    if zipfile.is_zipfile(io.BytesIO((start + end)[-_EDGE:])):
        return "an archive"
    edges = (start + end).lower()
    return next((kind for mark, kind in _FOREIGN.items() if mark in edges), None)
