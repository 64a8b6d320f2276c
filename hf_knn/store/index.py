"""Which index a datastore gets, how it is built, and how often it misses."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ..core.learned import LearnedMap
from ..core.manifest import DatastoreError, IndexInfo
from ..core.search import Floats, Ints, Rows, Singles
from .approximate import FaissApproximate, new_lists
from .choice import (
    choose_index,
    parse_memory,
    pays,
    was_refused,
    with_codes,
)
from .effort import set_effort
from .faiss import (
    has_faiss,
    how_to_get_faiss,
    made_by,
    read_flat,
)
from .kept import MOMENT, KeptIndex, TrustedIndex
from .kinds import AUTO, CODES, FLAT, FLOAT16, is_rebuildable
from .mapped import files_behind
from .quickest import build_quickest
from .searcher import (
    ApproximateSearcher,
    GrowingFirstPass,
    GrowingSearcher,
    IndexRows,
    IndexSpace,
    PlacedFirstPass,
)
from .table import RowTable, Shard

logger = logging.getLogger(__name__)

MIN_RECALL = 0.99

CPU = (torch.device("cpu"),)


class StoredLists(NamedTuple):
    """What an inverted-file index is rebuilt from.

    Attributes:
        centroids: [n, D'] float32.
        lists: [N] int64, the list of each row.
    """

    centroids: Singles
    lists: Ints


@dataclass(frozen=True)
class Placement:
    """Where the first pass of a search runs.

    Attributes:
        devices: at least one; several share the rows.
        float16: halve the memory of an exact first pass on a device.
    """

    devices: tuple[torch.device, ...] = CPU
    float16: bool = False

    @classmethod
    def of(
        cls, device: str | torch.device | Sequence[str | torch.device], float16: bool
    ) -> "Placement":
        """Checks that the devices are there.

        Args:
            device: one, or several of one kind.
            float16: see the class.

        Raises:
            ValueError: for a device that torch does not know or see, or several kinds.
        """
        named = [device] if isinstance(device, str | torch.device) else list(device)
        devices = []
        for name in named:
            try:
                devices.append(torch.empty(0, device=name).device)
            except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
                raise ValueError(
                    f"Expected `device` to be one that is here, but got {name!r}: "
                    f"{str(error).splitlines()[0]}"
                ) from error
        if len({found.type for found in devices}) != 1 or devices[0].type == "meta":
            raise ValueError(f"Expected `device` to be one kind that holds data, but got {device}.")
        return cls(tuple(devices), float16)


def build_searcher(
    features: Rows,
    ids: Ints,
    space: IndexSpace,
    info: IndexInfo,
    stored: StoredLists | None,
    min_recall: float,
    placement: Placement,
    trusted: TrustedIndex | None,
    kept: KeptIndex | None,
) -> tuple[GrowingSearcher, IndexInfo, StoredLists | None]:
    """Builds the index, and measures it where it is approximate.

    Args:
        features: [N, D] stored raw features.
        ids: [N] int64.
        space: how rows are compared.
        info: which index; with parameters if it was measured before.
        stored: centroids and lists to rebuild from, if there are any.
        min_recall: nprobe or efSearch is raised until this recall at 20 is measured.
        placement: where the first pass runs.
        trusted: an open file with the serialized index, to be read instead of building one; None
            builds it.
        kept: where the index of these rows is kept, or to be kept; None for nowhere.

    Returns:
        The searcher, what was measured, and the lists to store (None for other kinds).

    Raises:
        DatastoreError: for a serialized index of other rows or another kind.
    """
    if info.spec == FLAT or not has_faiss():
        if info.spec != FLAT:
            logger.warning(
                "faiss is not installed: %s is searched exactly instead; %s.",
                info.spec,
                how_to_get_faiss(),
            )
        if trusted is not None and placement.devices == CPU and not space.is_l2:
            flat = read_flat(trusted, ids, space.width)
            return GrowingSearcher(features, ids, space, flat), info, stored
        first_pass: GrowingFirstPass
        if placement == Placement():
            first_pass = build_quickest(features, space)
        else:
            dtype = torch.float16 if placement.float16 else torch.float32
            rows = space.first_pass_rows(features)
            first_pass = PlacedFirstPass(rows, placement.devices, dtype)
        return GrowingSearcher(features, ids, space, first_pass), info, stored
    started = time.perf_counter()
    index, info = _read(info, space, len(ids), trusted, kept)
    is_built = index is None
    if index is None:
        index, stored = _approximate(space.read_for_index(features), info, stored, space.is_l2)
    done, seconds = "built" if is_built else "read", time.perf_counter() - started
    logger.info("index %s: %s in %.1f s for %d rows", info.spec, done, seconds, len(ids))
    index.set_parameters(info.parameters)
    searcher = ApproximateSearcher(features, ids, space, index)
    # a graph is another one each time that it is built; lists are rebuilt as they were
    is_new = is_built and not is_rebuildable(info.spec)
    if info.recall is None or info.measured_on is None or is_new:
        info = set_effort(searcher, index, info, min_recall)
    if is_built and kept is not None and time.perf_counter() - started >= MOMENT:
        kept.write(index.write, info, space.largest, made_by(), files_behind(features))
    gpus = [device.index for device in placement.devices if device.type == "cuda"]
    if gpus and not index.to_gpus(gpus, placement.float16):
        logger.warning("index %s cannot be searched on a GPU here; the CPU searches it.", info.spec)
    return searcher, info, stored


def _read(
    info: IndexInfo,
    space: IndexSpace,
    count: int,
    trusted: TrustedIndex | None,
    kept: KeptIndex | None,
) -> tuple[FaissApproximate | None, IndexInfo]:
    """The index of a file that was built from these rows, and what it is; None if there is none."""
    facts = info.spec, space.width, count, space.is_l2
    if trusted is not None:
        return FaissApproximate.from_file(trusted, *facts), info
    if kept is not None and (known := kept.known()) is not None:
        try:
            file = kept.open(made_by())
            if file is not None:
                return FaissApproximate.from_file(file, *facts), known.info
        except DatastoreError as error:
            kept.discard(error)
    return None, info


def _approximate(
    rows: IndexRows, info: IndexInfo, stored: StoredLists | None, is_l2: bool
) -> tuple[FaissApproximate, StoredLists | None]:
    if stored is not None:
        index = FaissApproximate.from_lists(info.spec, rows, *stored, is_l2)
        return index, stored
    if not is_rebuildable(info.spec):
        return FaissApproximate.from_rows(info.spec, rows, is_l2), None
    stored = StoredLists(*new_lists(info.spec, rows, is_l2))
    return FaissApproximate.from_lists(info.spec, rows, *stored, is_l2), stored


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
        width: of the rows as they are compared.
        centroids: [n, D'] float32 of an inverted file; None for other kinds.
        trusted: an open, hashed file with the index of these very rows, or None.
        kept: where the index of these very rows is kept for other processes, or None.
        searcher: None until it is built.
    """

    info: IndexInfo
    max_memory: int | None
    min_recall: float
    width: int
    placement: Placement = field(default_factory=Placement)
    centroids: Singles | None = None
    trusted: TrustedIndex | None = None
    kept: KeptIndex | None = None
    searcher: GrowingSearcher | None = None

    @classmethod
    def chosen(
        cls,
        requested: str,
        count: int,
        width: int,
        max_memory: str | int | None,
        min_recall: float,
    ) -> Self:
        """The index for some rows.

        Args:
            requested: `auto`, `auto:latency`, `flat` or a faiss factory string.
            count: of the rows.
            width: of the rows as they are compared.
            max_memory: such as `"2GB"`; None for no limit.
            min_recall: in (0, 1].

        Raises:
            ImportError: for a faiss index without faiss.
            ValueError: for a bad option, or too few rows for the index.
        """
        if not 0 < min_recall <= 1:
            raise ValueError(f"Expected `min_recall` to be in (0, 1], but got {min_recall}.")
        memory = None if max_memory is None else parse_memory(max_memory)
        return cls(choose_index(requested, count, width, memory), memory, min_recall, width)

    def listed(
        self, table: RowTable, compared: tuple[Floats, str, str, LearnedMap | None]
    ) -> tuple[Self, RowTable]:
        """With the lists of a table, which then lies in their order; kinds without lists as it was.

        Args:
            table: the rows.
            compared: see `built`.
        """
        if not is_rebuildable(self.info.spec):
            return self, table
        space = IndexSpace(*compared, table.features)
        rows = space.read_for_index(table.features)
        centroids, lists = new_lists(self.info.spec, rows, space.is_l2)
        return replace(self, centroids=centroids), table.with_lists(lists).in_list_order()

    @property
    def approximate(self) -> FaissApproximate | None:
        """The index of faiss, if it is one that stands."""
        index = None if self.searcher is None else self.searcher.index
        return index if isinstance(index, FaissApproximate) else None

    def is_known(self, table: RowTable) -> bool:
        """Whether what is stored of an inverted file is known, also while it does not stand."""
        return is_rebuildable(self.info.spec) and table.lists is not None and bool(self.info.recall)

    def of_width(self, width: int) -> Self:
        """The same for rows of another width, as they are compared; to be built anew."""
        return replace(self._apart(), width=width, centroids=None)

    def _apart(self) -> Self:
        """The same for other rows than those that files hold an index of; to be built anew."""
        return replace(self, trusted=None, kept=None, searcher=None)

    def unbuilt(self) -> Self:
        """The same, to be built when needed."""
        return replace(self, searcher=None)

    def unopened(self) -> Self:
        """The same without what cannot be pickled."""
        return replace(self, searcher=None, trusted=None)

    def on(self, placement: Placement) -> Self:
        """The same, to be built where searches are to run."""
        info, is_gpu = self.info, any(device.type == "cuda" for device in placement.devices)
        if is_gpu and info.requested == AUTO and info.spec.endswith(CODES):
            # faiss has no such codes there; the lists are the same
            info = IndexInfo(AUTO, info.spec.removesuffix(CODES) + FLOAT16)
        return replace(self, info=info, searcher=None, placement=placement)

    def exact(self) -> Self:
        """An exact one at the same place, for some of the rows."""
        return replace(self._apart(), info=IndexInfo(FLAT, FLAT), centroids=None)

    def read(
        self, info: IndexInfo, centroids: Singles | None, trusted: TrustedIndex | None,
        kept: KeptIndex | None,
    ) -> Self:  # fmt: skip
        """The one that files describe, see the attributes."""
        return replace(self.unbuilt(), info=info, centroids=centroids, trusted=trusted, kept=kept)

    def chosen_again(self, table: RowTable) -> Self:
        """To be built anew for a table, exact where its rows have become too few."""
        requested, count = self.info.requested, len(table)
        info = choose_index(requested, count, self.width, self.max_memory, fall_back=True)
        return replace(self._apart(), info=info, centroids=None)

    def forgotten(self, table: RowTable) -> tuple[Self, RowTable]:
        """For a table that it cannot follow; the table without the lists of its rows."""
        return self.chosen_again(table), table.with_lists(None)

    def built(
        self, table: RowTable, compared: tuple[Floats, str, str, LearnedMap | None]
    ) -> tuple[Self, RowTable]:
        """With a searcher; the table with the lists of its rows, for an inverted file.

        Where `auto` chose, and now knows how its index searches, that may be another one.

        Args:
            table: the rows.
            compared: how they are: mean [D], metric, normalisation, learned map.

        Raises:
            ValueError: for an index that cannot be built from these rows.
            DatastoreError: for a trusted file of other rows or another kind.
        """
        is_chosen = self.info.recall is not None or (self.kept and self.kept.known()) is not None
        if is_chosen:
            return self._build(table, compared)
        started = time.perf_counter()
        index, table = replace(self, kept=None)._chosen_by_trial(table, compared)
        index = replace(index, kept=self.kept)
        if time.perf_counter() - started >= MOMENT:
            index.keep(table)
        return index, table

    def keep(self, table: RowTable) -> None:
        """Keeps the index of these rows for other processes, if it is one that is kept."""
        index, searcher = self.approximate, self.searcher
        if self.kept is not None and index is not None and searcher is not None:
            files = files_behind(table.features)
            self.kept.write(index.write, self.info, searcher.space.largest, made_by(), files)

    def _chosen_by_trial(
        self, table: RowTable, compared: tuple[Floats, str, str, LearnedMap | None]
    ) -> tuple[Self, RowTable]:
        """The index that was asked for; of `auto` the one that pays, of those that are tried."""
        index, listed = self._build(table, compared)
        info, count = index.info, len(table)
        coded = with_codes(info, count, self.width, self.max_memory)
        if coded is not None and self.placement.devices == CPU:
            logger.info("index %s: %s reads many rows, codes are tried", AUTO, info)
            other, _ = replace(index, info=coded, searcher=None)._build(listed, compared)
            if pays(other.info, self.min_recall):
                return other, listed
        is_small = self.max_memory is None or 4 * self.width * count <= self.max_memory
        if pays(info, self.min_recall) or not is_small:
            return index, listed
        logger.info(
            "index %s: %s would take as long as an exact search, which is taken instead",
            info.requested, info,
        )  # fmt: skip
        exact = replace(index, info=IndexInfo(info.requested, FLAT), centroids=None)
        return exact._build(listed.with_lists(None), compared)

    def _build(
        self, table: RowTable, compared: tuple[Floats, str, str, LearnedMap | None]
    ) -> tuple[Self, RowTable]:
        stored = None
        if self.centroids is not None and table.lists is not None:
            stored = StoredLists(self.centroids, table.lists)
        known = None if self.kept is None else self.kept.known()
        space = IndexSpace(*compared, table.features, known.largest if known else None)
        searcher, info, lists = build_searcher(
            table.features, table.ids.numpy(), space, self.info, stored, self.min_recall,
            self.placement, self.trusted, self.kept,
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
        if not follows or self._is_outgrown(len(before), table):
            if before.lists is not None:  # which lie in the files of these rows too
                table = replace(table, shards=[Shard(shard.rows) for shard in table.shards])
            return self.forgotten(table)
        if before.lists is not None:
            lists = np.concatenate([before.lists, self._lists_of(table, len(before))])
            table = replace(table, lists=lists)
        return replace(self, trusted=None, kept=None), table

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
        return replace(self, trusted=None, kept=None), table

    def ready_to_save(self) -> Self:
        """Without a searcher that still holds removed rows: none of their bytes may be written."""
        is_clean = self.searcher is None or not self.searcher.has_removed_rows
        return self if is_clean else self.unbuilt()

    def _is_outgrown(self, before: int, table: RowTable) -> bool:
        """Whether rows that are searched exactly, for now, may be too many for that."""
        if self.info.spec != FLAT or self.info.requested == FLAT:
            return False
        is_known = was_refused(self.info, before, len(table))
        return not is_known and self.chosen_again(table).info.spec != FLAT

    def _lists_of(self, table: RowTable, start: int) -> Ints:
        """The lists of the rows from `start`, which the index has just taken in."""
        assert self.searcher is not None
        assert self.approximate is not None
        added = table.features[start : len(table)]
        return self.approximate.lists_of(self.searcher.space.read_for_index(added))
