"""Pictures for a report: those that were asked about, and stored ones, none of another picture."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data.batches import content_of
from ..data.decode import read_picture
from ..model.memory import Memory
from .html import thumbnail, webp_uri


class Gallery:
    """Where the page of a report takes its pictures from.

    Args:
        memory: of the model, as it was when it was asked.
        asked: pictures by sample id, or None.
        stored: pictures by row id, or None; where the model keeps prints, each is shown only if it
            has that of its row.
    """

    def __init__(
        self, memory: Memory, asked: Mapping[int, Any] | None, stored: Mapping[int, Any] | None
    ) -> None:
        self._memory, self._asked, self._stored = memory, asked, stored

    def asked(self, ids: Iterable[int]) -> dict[int, str]:
        """Pictures that were asked about, as data URIs; without those that cannot be had.

        Args:
            ids: of the pictures.
        """
        found = {i: _open(self._asked, i) for i in ids}
        return {i: thumbnail(image) for i, image in found.items() if image is not None}

    def stored(self, ids: Iterable[int]) -> dict[int, str]:
        """Pictures of rows, as data URIs; without those that cannot be had, or are others now.

        Args:
            ids: of the rows.
        """
        wanted, found = [*dict.fromkeys(ids)], {}
        prints, small = self._prints(wanted), self._memory.thumbnails
        for row_id in wanted:
            image = _open(self._stored, row_id)
            if image is not None and prints is not None:
                own = prints.get(row_id)
                is_same = own is not None and content_of(image) == own.tobytes()
                image = image if is_same else None
            kept = None if small is None else small.get(row_id)
            if image is not None:
                found[row_id] = thumbnail(image)
            elif kept is not None:
                found[row_id] = webp_uri(kept)
        return found

    def _prints(self, ids: list[int]) -> dict[int, NDArray[np.uint8]] | None:
        """The prints of rows that are still there; None for a model that keeps none."""
        rows, contents = self._memory.rows, self._memory.contents
        if rows is None or contents is None:
            return None
        try:
            return contents.prints_of(rows.rows_of(np.array(ids, np.int64)))
        except ValueError:  # rows were removed since
            return {}


def _open(pictures: Mapping[int, Any] | None, number: int) -> Image.Image | None:
    """A picture, decoded; None where there is none that can be read."""
    try:
        return None if pictures is None else read_picture(pictures[number], number)
    except (KeyError, ValueError, OSError):  # it is gone, or broken, or of no known place
        return None
