"""Pictures that are drawn once and kept as a `datasets` folder."""

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, Features
from PIL import Image

from catalog.cache import build_once

REVISION = 1  # raise it when a picture, a name or a label string of a task would come out different

Row = dict[str, Any]


def png(picture: Image.Image) -> bytes:
    """A picture as an RGB PNG."""
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "PNG")
    return stream.getvalue()


def drawn(folder: Path, features: Features, rows: Callable[[], Iterable[Row]]) -> Dataset:
    """Open the dataset of `rows`, writing it first where it is missing."""

    def build(partial_folder: Path) -> None:
        Dataset.from_list(list(rows()), features=features).save_to_disk(partial_folder)

    return Dataset.load_from_disk(build_once(folder, build))
