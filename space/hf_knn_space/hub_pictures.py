"""Pictures of the dataset on the Hub that a model's rows came from."""

import logging
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets.config import DOWNLOADED_DATASETS_PATH, HF_DATASETS_CACHE
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_CACHE

from hf_knn import BadImageError, load_splits

from .uploads import small_picture

MAX_DATASET_BYTES = 4 * 2**30
"""A larger dataset is not downloaded for its thumbnails."""

logger = logging.getLogger(__name__)


class HubPictures:
    """Small pictures of rows, by row id; none until the dataset is here, which is not waited for.

    Names and paths come from a checkpoint and a dataset, which may be anybody's: what is not public
    on the Hub is not shown, and no file outside the caches is read.

    Args:
        source: `dataset`, `revision` (a commit, so rows are those that were stored) and `split` of
            a datastore.
    """

    def __init__(self, source: Mapping[str, str]) -> None:
        self._name, self._revision = source["dataset"], source["revision"]
        self._split = source.get("split", "train")
        self._rows: Any = None
        self._places: dict[int, int] = {}
        self._find = lru_cache(maxsize=4096)(self._read)
        self.opening = threading.Thread(target=self._open, daemon=True)
        self.opening.start()

    def find(self, row_id: int, path: str) -> bytes | None:
        """A small WEBP of the picture; None if there is none, or none yet.

        Args:
            row_id: of the row.
            path: not used: the dataset knows its rows by id.
        """
        return None if self._rows is None else self._find(row_id)

    def _open(self) -> None:
        named = f"{self._name}@{self._revision[:12]}"
        try:
            size = _size_of(self._name, self._revision)
            if size > MAX_DATASET_BYTES:
                logger.warning(
                    "Rows are shown as plain tiles: %s has %.1f GB, more than the %.0f GB that are "
                    "downloaded for thumbnails; train with --thumbnails to keep them in the "
                    "checkpoint.", named, size / 1e9, MAX_DATASET_BYTES / 1e9,
                )  # fmt: skip
                return
            rows = load_splits(self._name, revision=self._revision, token=False)[self._split]
        except (OSError, ValueError, KeyError, DatasetsError) as error:
            logger.warning(
                "Rows are shown as plain tiles, since the pictures of %s could not be had: %s "
                "HF_KNN_PICTURES=none does not try.", named, error,
            )  # fmt: skip
            return
        self._places = {row_id: place for place, row_id in enumerate(rows["sample_id"])}
        self._rows = rows

    def _read(self, row_id: int) -> bytes | None:
        place = self._places.get(row_id)
        cell = None if place is None else self._rows[place]["image"]
        source = cell and (cell["bytes"] or _cached(cell["path"]))
        if not source:
            return None
        try:
            return small_picture(source)
        except (BadImageError, OSError):  # then a tile is shown, as for one that is not there
            return None


def _cached(path: str | None) -> Path | None:
    """A file that was downloaded; None for any other."""
    place = Path(path or "").resolve()
    roots = (HF_DATASETS_CACHE, DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
    is_ours = any(place.is_relative_to(Path(root).resolve()) for root in roots)
    return place if is_ours and place.is_file() else None


def _size_of(name: str, revision: str) -> int:
    """Bytes of a public dataset's files.

    Raises:
        ValueError: for a name that means a folder of this machine.
        OSError: if there is no such public dataset, or no network.
    """
    if Path(name).exists():
        raise ValueError(f"{name} is a place on this machine too.")
    info = HfApi(token=False).dataset_info(name, revision=revision, files_metadata=True)
    return sum(file.size or 0 for file in info.siblings or [])
