"""How the rows of a datastore are searched, as a value beside them: chosen, built, in step."""

from dataclasses import dataclass, field, replace
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from ..core.manifest import IndexInfo
from ..core.search import Ints, Singles
from .faiss import FaissApproximate
from .index import (
    FLAT,
    Placement,
    StoredLists,
    build_searcher,
    choose_index,
    parse_memory,
)
from .searcher import GrowingSearcher, IndexSpace
from .table import RowTable, Shard


@dataclass(frozen=True)
class RowIndex:
    """Which index a table has, where it runs, and the index itself once it stands.

    What follows a change of the table returns the new table too, since each row's list in an
    inverted file is a column of it.

    Attributes:
        info: which one, with its parameters and measured recall once it was built.
        max_memory: bytes that it may take; None for no limit.
        min_recall: recall at 20 that an approximate index is set to reach.
        placement: where searches run.
        centroids: [n, D'] float32 of an inverted file; None for other kinds.
        trusted: an open, hashed file with the index of these very rows, or None.
        searcher: None until it is built.
    """

    info: IndexInfo
    max_memory: int | None
    min_recall: float
    placement: Placement = field(default_factory=Placement)
    centroids: Singles | None = None
    trusted: BinaryIO | None = None
    searcher: GrowingSearcher | None = None

    @classmethod
    def chosen(
        cls, requested: str, table: RowTable, max_memory: str | int | None, min_recall: float
    ) -> Self:
        """The index for a table.

        Args:
            requested: `auto`, `flat` or a faiss factory string.
            table: the rows.
            max_memory: such as `"2GB"`; None for no limit.
            min_recall: in (0, 1].

        Raises:
            ImportError: for a faiss index without faiss.
            ValueError: for a bad option, or too few rows for the index.
        """
        if not 0 < min_recall <= 1:
            raise ValueError(f"Expected `min_recall` to be in (0, 1], but got {min_recall}.")
        memory = None if max_memory is None else parse_memory(max_memory)
        return cls(choose_index(requested, *table.features.shape, memory), memory, min_recall)

    @property
    def approximate(self) -> FaissApproximate | None:
        """The index of faiss, if it is one that stands."""
        index = None if self.searcher is None else self.searcher.index
        return index if isinstance(index, FaissApproximate) else None

    def unbuilt(self) -> Self:
        """The same, to be built when needed."""
        return replace(self, searcher=None)

    def unopened(self) -> Self:
        """The same without what cannot be pickled."""
        return replace(self, searcher=None, trusted=None)

    def on(self, placement: Placement) -> Self:
        """The same, to be built where searches are to run."""
        return replace(self, searcher=None, placement=placement)

    def exact(self) -> Self:
        """An exact one at the same place, for some of the rows."""
        return replace(self.unopened(), info=IndexInfo(FLAT, FLAT), centroids=None)

    def read(self, info: IndexInfo, centroids: Singles | None, trusted: BinaryIO | None) -> Self:
        """The one that files describe, see the attributes."""
        return replace(self.unbuilt(), info=info, centroids=centroids, trusted=trusted)

    def chosen_again(self, table: RowTable) -> Self:
        """To be built anew for a table, exact where its rows have become too few."""
        requested, shape = self.info.requested, table.features.shape
        info = choose_index(requested, *shape, self.max_memory, fall_back=True)
        return replace(self, info=info, centroids=None, trusted=None, searcher=None)

    def forgotten(self, table: RowTable) -> tuple[Self, RowTable]:
        """For a table that it cannot follow; the table without the lists of its rows."""
        return self.chosen_again(table), table.with_lists(None)

    def built(self, table: RowTable, space: IndexSpace) -> tuple[Self, RowTable]:
        """With a searcher; the table with the lists of its rows, for an inverted file.

        Args:
            table: the rows.
            space: how they are compared.

        Raises:
            ValueError: for an index that cannot be built from these rows.
            DatastoreError: for a trusted file of other rows or another kind.
        """
        stored = None
        if self.centroids is not None and table.lists is not None:
            stored = StoredLists(self.centroids, table.lists)
        searcher, info, lists = build_searcher(
            table.features, table.ids.numpy(), space, self.info, stored, self.min_recall,
            self.placement, self.trusted,
        )  # fmt: skip
        index = replace(self, info=info, searcher=searcher)
        if lists is None or table.lists is not None:
            return index, table
        return replace(index, centroids=lists.centroids), table.with_lists(lists.lists)

    def after_adding(self, before: RowTable, table: RowTable) -> tuple[Self, RowTable]:
        """In step with rows that were appended.

        Args:
            before: the rows that it was in step with.
            table: these and more, without lists.
        """
        searcher = self.searcher
        follows = searcher is not None and searcher.add(table.features, table.ids.numpy())
        if not follows or self._is_outgrown(table):
            if before.lists is not None:  # which lie in the files of these rows too
                table = replace(table, shards=[Shard(shard.rows) for shard in table.shards])
            return self.forgotten(table)
        if before.lists is not None:
            lists = np.concatenate([before.lists, self._lists_of(table, len(before))])
            table = replace(table, lists=lists)
        return replace(self, trusted=None), table

    def after_removing(self, table: RowTable, kept: NDArray[np.bool_]) -> tuple[Self, RowTable]:
        """In step with a table that has lost rows.

        Args:
            table: the rows that are left.
            kept: [N] which of those before they are.
        """
        if self.searcher is None and self.centroids is None:  # there is nothing to keep in step
            return self.forgotten(table)
        if self.searcher is not None and not self.searcher.remove(
            table.features, table.ids.numpy(), kept
        ):
            return self.forgotten(table)
        return replace(self, trusted=None), table

    def ready_to_save(self) -> Self:
        """Without a searcher that still holds removed rows: none of their bytes may be written."""
        is_clean = self.searcher is None or not self.searcher.has_removed_rows
        return self if is_clean else self.unbuilt()

    def _is_outgrown(self, table: RowTable) -> bool:
        """Whether rows that were too few for the index have become enough."""
        if self.info.spec != FLAT or self.info.requested == FLAT:
            return False
        return self.chosen_again(table).info.spec != FLAT

    def _lists_of(self, table: RowTable, start: int) -> Ints:
        """The lists of the rows from `start`, which the index has just taken in."""
        assert self.searcher is not None
        assert self.approximate is not None
        added = table.features[start : len(table)]
        return self.approximate.lists_of(self.searcher.space.index_rows(added))
