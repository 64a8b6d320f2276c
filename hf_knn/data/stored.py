"""Pictures of stored rows out of the dataset that they came from."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .loading import ids_of, picture_of


class RowPictures(Mapping[int, Any]):
    """Pictures by row id, decoded one at a time: full-sized ones do not pile up.

    Args:
        dataset: prepared, see `load_splits`.
        row_ids: of stored rows.
        sample_ids: of the same rows in the dataset; None means that they are the same.

    Raises:
        KeyError: for a sample id that the dataset does not have.
    """

    def __init__(
        self, dataset: Any, row_ids: Sequence[int], sample_ids: Sequence[int] | None = None
    ) -> None:
        places = {sample_id: place for place, sample_id in enumerate(ids_of(dataset).tolist())}
        wanted = row_ids if sample_ids is None else sample_ids
        self._dataset = dataset
        self._places = {row: places[i] for row, i in zip(row_ids, wanted, strict=True)}

    def __getitem__(self, row_id: int) -> Any:
        return picture_of(self._dataset, self._places[row_id])

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
