"""Files for visitors to take away, which do not stay."""

import csv
import io
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from journal import Example
from service import Look
from views import first

from hf_knn import Explanation, KnnForImageClassification

_ROOT = Path(tempfile.gettempdir()) / "hf_knn_space"
_KEPT_SECONDS = 900


def write_text(name: str, content: str) -> str:
    """A text file.

    Args:
        name: what it is called when it is downloaded.
        content: of the file.

    Returns:
        Its path; it is deleted after a quarter of an hour.
    """
    path = _new_folder() / name
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
    path = _new_folder() / "pictures.zip"
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["file_name", "label"])
    with zipfile.ZipFile(path, "w") as file:
        for row in examples:
            file.writestr(f"{row.row_id}.webp", row.thumbnail)
            rows.writerow([f"{row.row_id}.webp", row.label])
        file.writestr("metadata.csv", table.getvalue())
    return str(path)


def write_checkpoint(model: KnnForImageClassification) -> str:
    """The model with everything that was taught.

    Returns:
        The path of a zip file.
    """
    folder = _new_folder()
    model.save_pretrained(folder / "model")
    path = shutil.make_archive(str(folder / "model"), "zip", folder / "model")
    shutil.rmtree(folder / "model")
    return path


def _new_folder() -> Path:
    _ROOT.mkdir(exist_ok=True)
    oldest = time.time() - _KEPT_SECONDS
    for folder in list(_ROOT.iterdir()):
        if folder.stat().st_mtime < oldest:
            shutil.rmtree(folder, ignore_errors=True)  # another request may have been faster
    return Path(tempfile.mkdtemp(dir=_ROOT))


def _plain(value: object) -> object:
    """Spreadsheets run what begins like a formula."""
    is_formula = isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r")
    return f"'{value}" if is_formula else value
