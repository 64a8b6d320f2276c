"""Where the small pictures of published rows come from."""

import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from hf_knn.data import StoredPictures

from .uploads import small_picture


class Pictures(Protocol):
    """Finds the picture of a stored row."""

    def find(self, row_id: int, path: str) -> bytes | None:
        """A small WEBP of the picture; None if there is none.

        Args:
            row_id: of the row.
            path: as the datastore knows it; may be empty.
        """


class NoPictures:
    """Every row is shown as a plain tile."""

    def find(self, row_id: int, path: str) -> bytes | None:
        """Nothing."""
        return None


class ZipPictures:
    """Small pictures that were pushed beside the page.

    Args:
        file: a zip of WEBP files, each named after its picture's path.
    """

    def __init__(self, file: Path) -> None:
        self._zip = zipfile.ZipFile(file)
        self._names = set(self._zip.namelist())

    def find(self, row_id: int, path: str) -> bytes | None:
        """A small WEBP of the picture; None if there is none."""
        name = f"{path}.webp"
        return self._zip.read(name) if path and name in self._names else None


class FolderPictures:
    """Pictures in the folder that the model was trained on.

    Args:
        folder: what the paths of the datastore are relative to.
    """

    def __init__(self, folder: Path) -> None:
        self._stored = StoredPictures(folder)
        self._find = lru_cache(maxsize=4096)(self._read)

    def find(self, row_id: int, path: str) -> bytes | None:
        """A small WEBP of the picture; None if there is none."""
        return self._find(path)

    def _read(self, path: str) -> bytes | None:
        try:
            place = self._stored.find(path)  # paths come from a checkpoint, which may be anybody's
            if place is None:
                return None
            return small_picture(place)
        except (ValueError, OSError):  # then a tile is shown, as for one that is not there
            return None
