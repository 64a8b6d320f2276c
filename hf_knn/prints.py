"""What can be told of a picture without a model: its hash, a tiny copy, or why it is broken."""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .data import picture_of
from .images import BadImageError

SIDE = 48
"""Side of the tiny copies that pictures are compared by, in pixels."""

_BATCH = 64


class Print(NamedTuple):
    """What is kept of one picture.

    Attributes:
        digest: sha256 of size and decoded RGB pixels: equal for files saved again without loss.
        tiny: [SIDE, SIDE, 3] uint8, the picture squeezed into a square.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
    """

    digest: str
    tiny: NDArray[np.uint8]
    width: int
    height: int


class Broken(NamedTuple):
    """A picture that cannot be decoded, with the reason."""

    reason: str


def print_of(image: Image.Image) -> Print:
    """The print of a decoded RGB picture."""
    digest = hashlib.sha256(f"{image.width} {image.height} ".encode())
    digest.update(image.tobytes())
    tiny = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return Print(digest.hexdigest(), np.asarray(tiny), image.width, image.height)


def prints_of(
    dataset: Any, on_progress: Callable[[int], object] = lambda done: None
) -> list[Print | Broken]:
    """The prints of all pictures of a prepared dataset, in row order, several threads at once.

    Args:
        dataset: see `hf_knn.data.prepare`.
        on_progress: called with how many pictures more are done.
    """
    found: list[Print | Broken] = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for rows in _batches(len(dataset)):
            found += threads.map(lambda row: _print_row(dataset, row), rows)
            on_progress(len(rows))
    return found


def _print_row(dataset: Any, row: int) -> Print | Broken:
    try:
        return print_of(picture_of(dataset, row))
    except (BadImageError, OSError) as error:
        return Broken(str(error))


def _batches(count: int) -> Iterator[range]:
    for start in range(0, count, _BATCH):
        yield range(start, min(start + _BATCH, count))
