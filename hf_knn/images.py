"""The one decoder of the project: every picture, from wherever, comes through here."""

import io
import struct
import zlib
from pathlib import Path

from PIL import Image, ImageOps

ALLOWED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64 * 10**6

# what Pillow's format plug-ins raise on malformed files
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError,
    OverflowError, NotImplementedError, struct.error, zlib.error, Image.DecompressionBombError,
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

    Size and format are read from the header before anything is decoded.

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
        _check_pixels(source, max_pixels)
        return _to_rgb(source)
    data = source if isinstance(source, bytes) else _read(Path(source), max_bytes)
    if not data:
        raise BadImageError("the file is empty")
    if len(data) > max_bytes:
        raise BadImageError(f"the file has {len(data)} bytes, more than {max_bytes}")
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            _check_pixels(image, max_pixels)
            image.seek(0)
            image.load()
            return _to_rgb(image)
    except BadImageError:
        raise
    except Image.UnidentifiedImageError:
        raise BadImageError(f"not a picture in one of the formats {', '.join(formats)}") from None
    except _DECODE_ERRORS as error:
        raise BadImageError(f"the picture cannot be decoded ({error})") from error


def _read(path: Path, max_bytes: int) -> bytes:
    with path.open("rb") as file:
        return file.read(max_bytes + 1)


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise BadImageError(f"the picture has {width} x {height} pixels, more than {max_pixels}")


def _to_rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, "white")
        upright = Image.alpha_composite(canvas, layer)
    elif upright.mode.startswith("I"):  # 16-bit greyscale: keep the high byte, do not clip
        upright = upright.convert("I").point(lambda value: value / 256).convert("L")
    rgb = upright.convert("RGB")
    if rgb is image:
        rgb = image.copy()
    rgb.info = {}
    return rgb
