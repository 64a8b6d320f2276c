"""Drawings of Debian's package `openclipart-png`, by the folder of their category.

The package is no Python package and 130 MB large, so nothing here fetches it.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from datasets.utils import tqdm
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from catalog.drawn import REVISION, Row, drawn, png
from hf_knn.checkup import find_pairs
from hf_knn.data import BadImageError, decode_image, print_of

logger = logging.getLogger(__name__)

OPENCLIPART = Path("/usr/share/openclipart/png")
"""Where the package puts its pictures."""

OPENCLIPART_SIDE = 256  # pixels of the longer side at most


def clip_files() -> list[Path]:
    """The pictures below `OPENCLIPART`, in order; links show a drawing of another folder again.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    if not OPENCLIPART.is_dir():
        raise FileNotFoundError(
            f"Expected the pictures of Debian's package openclipart-png in {OPENCLIPART}, but "
            "there is no such folder; do `apt-get install openclipart-png`, or pass "
            "--task imagefolder:PATH with the folder `png` of its unpacked files."
        )
    found = (path for path in OPENCLIPART.rglob("*.png") if not path.is_symlink())
    return sorted(found, key=lambda path: path.relative_to(OPENCLIPART).as_posix())


def draw_clip(path: Path) -> Image.Image:
    """A drawing on white, RGB, the longer side `OPENCLIPART_SIDE` pixels at most.

    Raises:
        BadImageError: It is too large, or none.
    """
    picture = decode_image(path)
    picture.thumbnail((OPENCLIPART_SIDE, OPENCLIPART_SIDE))
    return picture


def build_openclipart(folder: Path) -> Dataset:
    """All drawings, drawn below a folder on first use; a group is of nearly the same pictures.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    files = clip_files()
    names = [path.relative_to(OPENCLIPART).as_posix() for path in files]
    listing = [(name, path.stat().st_size) for name, path in zip(names, files, strict=True)]
    content = hashlib.sha256(repr(listing).encode()).hexdigest()[:16]
    columns = dict.fromkeys(["name", "label", "group"], Value("string"))
    features = Features({"image": ImageColumn(), **columns})
    place = folder / f"openclipart_files-{content}_r{REVISION}"
    return drawn(place, features, lambda: _clip_rows(files, names))


def _clip_rows(files: list[Path], names: list[str]) -> Iterator[Row]:
    kept, pictures, prints, refused = [], [], [], []
    progress = tqdm(
        zip(files, names, strict=True), "Drawing openclipart", len(files), unit="picture"
    )
    for path, name in progress:
        try:
            picture = draw_clip(path)
        except BadImageError as error:
            refused.append(f"{name}: {error}")
            continue
        kept.append(name)
        pictures.append(png(picture))
        prints.append(print_of(picture))
    if refused:
        logger.warning("%d of %d were left out. %s", len(refused), len(files), " ".join(refused))
    for content, name, group in zip(pictures, kept, _groups(prints), strict=True):
        yield {
            "image": {"bytes": content, "path": None},
            "name": name,
            "label": name.split("/")[0],
            "group": kept[group],  # called after its first picture
        }


def _groups(prints: Sequence[Any]) -> list[int]:
    """The first picture of those that each is linked to by pairs of near-duplicates."""
    pairs = find_pairs(prints, None)
    links = coo_array((np.ones(len(pairs.first)), (pairs.first, pairs.second)), [len(prints)] * 2)
    _, groups = connected_components(links, directed=False)
    firsts = np.unique(groups, return_index=True)[1]
    return [int(first) for first in firsts[groups]]
