"""Letters and digits in the typefaces that matplotlib ships."""

import string
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from datasets.utils import tqdm
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from catalog.cache import versioned
from catalog.drawn import REVISION, Row, drawn, png

GLYPH_SIZE = 224  # pixels
GLYPH_FACES = {
    "DejaVu Sans": ("DejaVuSans", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVu Sans Mono": ("DejaVuSansMono", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVu Serif": ("DejaVuSerif", "-Bold", "-Italic", "-BoldItalic"),
    "STIX General": ("STIXGeneral", "Bol", "Italic", "BolIta"),
    "Computer Modern Roman": ("cmr10",),
    "Computer Modern Sans": ("cmss10",),
    "Computer Modern Typewriter": ("cmtt10",),
}
"""Families of text faces: the file of the upright one, and what the others add to its name."""


def render_glyph(face: str, character: str) -> bytes:
    """Draw a character in the middle of a white square.

    Args:
        face: File of the typeface, without its ending, as matplotlib ships it.
        character: One character.

    Returns:
        The picture as PNG, RGB.
    """
    path = Path(get_data_path(), "fonts", "ttf", f"{face}.ttf")
    font = ImageFont.truetype(str(path), round(0.7 * GLYPH_SIZE))
    picture = Image.new("RGB", (GLYPH_SIZE, GLYPH_SIZE), "white")
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = draw.textbbox((0, 0), character, font)
    corner = ((GLYPH_SIZE - left - right) / 2, (GLYPH_SIZE - top - bottom) / 2)
    draw.text(corner, character, "black", font)
    return png(picture)


def _glyph_rows() -> Iterator[Row]:
    faces = [
        (family, upright + ending)
        for family, (upright, *others) in GLYPH_FACES.items()
        for ending in ("", *others)
    ]
    characters = string.ascii_letters + string.digits
    pairs = [(face, character) for face in faces for character in characters]
    for (family, face), character in tqdm(pairs, desc="Drawing glyphs", unit="picture"):
        yield {
            "image": {"bytes": render_glyph(face, character), "path": None},
            "name": f"{character} {face}",
            "label": character,
            "group": family,
        }


def build_glyphs(folder: Path) -> Dataset:
    """All glyphs, drawn below a folder on first use; a group is a family of typefaces."""
    columns = dict.fromkeys(["name", "label", "group"], Value("string"))
    features = Features({"image": ImageColumn(), **columns})
    return drawn(folder / versioned("glyphs", ("matplotlib",), REVISION), features, _glyph_rows)
