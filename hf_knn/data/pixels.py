"""An opened picture as RGB. Exported scripts hold this file, so that they read the same pixels."""

import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

FULL_PIXELS = 64 * 10**6
"""A JPEG with more is decoded at a half, a quarter or an eighth of its width and height."""

_STRIP = 4 * 10**6
_HIGHER = 512
"""From here on 32-bit values are of 16 bits; a little above 255 is what a filter leaves."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip

# what Pillow's format plug-ins raise on malformed files
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, ArithmeticError,
    NotImplementedError, RuntimeError, Warning, struct.error, zlib.error,
)  # fmt: skip


class ForeignValuesError(ValueError):
    """Values that are no picture's."""


def kind_of(image: Image.Image) -> str | None:
    """The format of a picture; None for one made in memory."""
    return "JPEG" if image.format == "MPO" else image.format  # phones put several JPEGs into one


def reduce_jpeg(image: Image.Image) -> int:
    """Sets a huge JPEG to a part of its size, which its decoder makes without the whole.

    Args:
        image: opened and not loaded.

    Returns:
        What width and height are divided by, 1 for what is read in full.
    """
    width, height = image.size
    if kind_of(image) != "JPEG" or width * height <= FULL_PIXELS:
        return 1
    part = next((n for n in (2, 4) if -(-width // n) * -(-height // n) <= FULL_PIXELS), 8)
    image.draft(None, (width // part, height // part))
    return part


def to_rgb(image: Image.Image) -> Image.Image:
    """A new RGB picture: first frame, upright, over white, without metadata.

    It is made strip by strip where it is large.

    Args:
        image: opened; it is loaded.

    Raises:
        ForeignValuesError: for numbers beyond 65535.
    """
    if image.format is not None:  # one made in memory has a single frame
        image.seek(0)
    image.load()
    turn = _TURNS.get(_orientation(image))
    upright = image if turn is None else image.transpose(turn)
    scale = _scale(upright)
    width, height = upright.size
    rows = max(1, _STRIP // max(1, width))
    if rows >= height or (upright.mode == "RGB" and not upright.has_transparency_data):
        rgb = _flat(upright, scale)
        if rgb is image:
            rgb = image.copy()
    else:
        rgb = Image.new("RGB", upright.size)
        for top in range(0, height, rows):
            box = (0, top, width, min(top + rows, height))
            rgb.paste(_flat(upright.crop(box), scale), box)
    rgb.info = {}
    return rgb


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION)
    except DECODE_ERRORS:  # pixels are fine where only what is said about them is damaged
        return None


def _scale(image: Image.Image) -> float:
    """What brings the values of a 32-bit or float picture to 0 to 255, the same for all of them."""
    if image.mode not in ("I", "F"):
        return 1
    values = np.asarray(image)
    highest = float(values.max(initial=0, where=np.isfinite(values)))
    if highest >= 65536:
        reason = f"its values reach {highest:.6g} where those of pictures end at 1, 255 or 65535"
        raise ForeignValuesError(reason)
    return 255 if highest <= 1 else 1 if highest < _HIGHER else 1 / 256


def _flat(image: Image.Image, scale: float) -> Image.Image:
    """RGB over white; the picture itself where that is what it is."""
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image), nan=0, posinf=0, neginf=0) * scale
        values = values.clip(0, 255)
        # a whole number survives division by 255 and back only when it is rounded
        values = np.rint(values) if scale > 1 else values
        image = Image.fromarray(values.astype(np.uint8))
    elif image.mode.startswith("I"):
        image = _to_8_bits(image)
    elif image.has_transparency_data:
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit greyscale keeps its high byte; Pillow's own conversion clips."""
    values = np.asarray(image.convert("I"))
    grey = (values.clip(0, 65535) >> 8).astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey = np.where(values == key, np.uint8(255), grey)  # a transparent grey, over white
    return Image.fromarray(grey)
