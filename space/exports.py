"""Files for visitors to take away, which do not stay."""

import csv
import io
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

from journal import Example

from hf_knn import KnnForImageClassification

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
