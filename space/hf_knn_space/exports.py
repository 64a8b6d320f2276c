"""Files for visitors to take away, which do not stay."""

import csv
import io
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from hf_knn import Datastore, Explanation, KnnForImageClassification

from .explanations import first
from .guard import shelf
from .journal import Example
from .service import Look
from .uploads import SpaceError


def write_text(name: str, content: str) -> str:
    """A text file.

    Args:
        name: what it is called when it is downloaded.
        content: of the file.

    Returns:
        Its path; it is deleted within hours.
    """
    path = _new_folder(4 * len(content)) / name
    path.write_text(content, encoding="utf-8")
    return str(path)


def as_csv(looks: Sequence[Look], found: Sequence[Explanation]) -> str:
    """One line per picture: the answer, how sure each voice is, and the nearest rows."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    names = ["picture", "answer", "probability", "head", "head_probability", "knn"]
    writer.writerow([*names, "knn_probability", "typicality", "nearest_ids"])
    for look, one in zip(looks, found, strict=True):
        head, knn = first(one.head), first(one.knn)
        nearest = " ".join(str(near.row_id) for near in one.neighbors)
        rest = ["" if one.typicality is None else one.typicality, nearest]
        known = [look.name, one.answer, one.probabilities[one.answer], *head, *knn, *rest]
        writer.writerow([_plain(value) for value in known])
    return buffer.getvalue()


def write_dataset(examples: Iterable[Example]) -> str:
    """Small pictures and a `metadata.csv` of file_name and label, as `datasets` reads it.

    Returns:
        The path of a zip file.
    """
    kept = list(examples)
    path = _new_folder(sum(len(one.thumbnail) for one in kept)) / "pictures.zip"
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["file_name", "label"])
    with zipfile.ZipFile(path, "w") as file:
        for one in kept:
            file.writestr(f"{one.row_id}.webp", one.thumbnail)
            rows.writerow([f"{one.row_id}.webp", one.label])
        file.writestr("metadata.csv", table.getvalue())
    return str(path)


def write_checkpoint(model: KnnForImageClassification) -> str:
    """The model with everything that was taught.

    Returns:
        The path of a zip file.
    """
    folder = _new_folder(2 * _size_of(model))  # before and after it is packed
    model.save_pretrained(folder / "model")
    path = shutil.make_archive(str(folder / "model"), "zip", folder / "model")
    shutil.rmtree(folder / "model")
    return path


def _new_folder(size: int) -> Path:
    if not shelf().has_room(size):
        raise SpaceError("The server has no room for files right now; try again later.")
    return Path(tempfile.mkdtemp(dir=shelf().folder))


def _size_of(model: KnnForImageClassification) -> int:
    parts = list(model.state_dict().values())
    if isinstance(model.datastore, Datastore):
        parts.append(model.datastore.features)
    return sum(part.nbytes for part in parts)


def _plain(value: object) -> object:
    """Spreadsheets run what begins like a formula."""
    is_formula = isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r")
    return f"'{value}" if is_formula else value
