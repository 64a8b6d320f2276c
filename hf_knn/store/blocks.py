"""A datastore of more rows than fit into memory, written from blocks of features as they come.

Rows wait in a file without a name, which is gone with the process. Then k-means sees a sample of
them, each row finds its list, and all are written in the order of the lists: those that a search
compares lie beside each other.
"""

import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NotRequired, Self, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.config import Normalization, check_metric
from ..core.rows import Values, as_features, as_whole_numbers, check_row_numbers
from ..core.search import Floats
from ..core.votes import Metric
from .casting import Centers, sums_of, to_storage
from .changes import mean_for
from .disk import Contents, write_datastore
from .index import MIN_RECALL, RowIndex
from .kinds import AUTO
from .table import RowTable, check_paths

Block = (
    tuple[Tensor | NDArray, Values]
    | tuple[Tensor | NDArray, Values, Values | None]
    | tuple[Tensor | NDArray, Values, Values | None, Sequence[str] | None]
)
"""Features, labels, and where somebody knows them ids and paths: what `Datastore.add` takes."""

_MANY_ROWS = 2**40
_COPIED = 65_536


class Options(TypedDict):
    """Options of `Datastore.from_features`, all of which may be left out."""

    metric: NotRequired[str]
    normalization: NotRequired[str]
    index: NotRequired[str]
    max_memory: NotRequired[str | int | None]
    min_recall: NotRequired[float]


def write_blocks(blocks: Iterable[Block], folder: Path, options: Options) -> RowIndex:
    """Writes rows into a folder, in the order of the lists that they are in, where there are lists.

    Args:
        blocks: with a row at least.
        folder: made if needed.
        options: of the datastore.

    Returns:
        How the rows are to be searched; what they are searched with is to be built and measured.

    Raises:
        ValueError: for bad options, features, labels, ids or paths, or no rows.
        OSError: if something could not be written; a version that was there is intact.
    """
    metric = str(options.get("metric", Metric.COSINE))
    normalization = str(options.get("normalization", Normalization.L2_CENTERED))
    check_metric(metric, normalization)
    choose = partial(
        RowIndex.chosen, options.get("index", AUTO), max_memory=options.get("max_memory"),
        min_recall=options.get("min_recall", MIN_RECALL),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with _Waiting(folder) as waiting:
        for block in blocks:
            if not waiting.count:
                choose(_MANY_ROWS, np.shape(block[0])[-1])  # so that wrong options are said at once
            waiting.add(*block)
        table = waiting.table()
        mean = mean_for(table, None)
        index = choose(len(table), waiting.width)
        index, table = index.listed(table, (mean.double().numpy(), metric, normalization, None))
        contents = Contents(table, mean, metric, normalization, None, index, None, {})
        write_datastore(folder, contents, [])
    return index


class _Waiting:
    """Rows as they come; their features are in a file without a name.

    Args:
        folder: on the disk that has room for them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.dtype, self.width, self.count = folder, torch.float16, 0, 0
        self.file = self._new_file()
        self.labels: list[Tensor] = []
        self.ids: list[Tensor] = []
        self.paths: list[str] | None = None
        self.sums: tuple[Floats, Floats] | None = None
        self.next_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(
        self, features: Tensor | NDArray, labels: Values, ids: Values | None = None,
        paths: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        """Takes a block in; see `Datastore.add`."""
        rows = as_features(features, "features", self.width or None)
        numbers: Values = torch.arange(self.next_id, self.next_id + len(rows))
        wanted, known = check_row_numbers(
            as_whole_numbers(labels, "labels"),
            as_whole_numbers(numbers if ids is None else ids, "ids"),
            len(rows),
        )
        new_paths = check_paths(paths, len(rows))
        if not len(rows):
            return
        self._write(rows)
        if new_paths is not None or self.paths is not None:
            before = [""] * self.count if self.paths is None else self.paths
            self.paths = [*before, *(new_paths or [""] * len(rows))]
        self.width, self.count = rows.shape[1], self.count + len(rows)
        self.next_id = max(self.next_id, int(known.max()) + 1)
        self.labels.append(wanted)
        self.ids.append(known)

    def table(self) -> RowTable:
        """All of them, mapped.

        Raises:
            ValueError: for ids that are there twice, or no rows.
        """
        if not self.count:
            raise ValueError("Expected `blocks` to hold rows, but there are none.")
        labels, ids = torch.cat(self.labels), torch.cat(self.ids)
        check_row_numbers(labels, ids, self.count)
        return RowTable.of(self._features(), labels, ids, self.paths)

    def _write(self, rows: Tensor) -> None:
        """Casts rows about the mean of all so far; all are widened if these need it."""
        now = sums_of(rows)
        self.sums = now if self.sums is None else (self.sums[0] + now[0], self.sums[1] + now[1])
        count = self.count + len(rows)
        stored = to_storage(rows, self.dtype, Centers(self.sums[0] / count, self.sums[1] / count))
        if stored.dtype != self.dtype:
            self._widen(stored.dtype)
        self.file.write(stored.numpy().data)

    def _widen(self, dtype: torch.dtype) -> None:
        before, narrow = self._features() if self.count else torch.empty(0, 1), self.file
        self.dtype, self.file = dtype, self._new_file()
        for part in before.split(_COPIED):
            self.file.write(part.to(dtype).numpy().data)
        narrow.close()

    def _new_file(self) -> BinaryIO:
        return cast(BinaryIO, tempfile.TemporaryFile(dir=self.folder))

    def _features(self) -> Tensor:
        self.file.flush()
        values = np.memmap(
            self.file, str(self.dtype).removeprefix("torch."), "r+", 0, (self.count, self.width)
        )
        return torch.from_numpy(values)
