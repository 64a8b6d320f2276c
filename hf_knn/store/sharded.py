"""Search over rows that are divided over ranks: queries and answers travel, rows never do.

Each rank has an index of its own rows, as large and of the kind that pays for these: a rank waits
for its own rows alone. How often they miss together is measured over all ranks, and said once.
"""

import logging
from collections.abc import Callable
from typing import Self, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ..core.manifest import MEASURED_ON, DatastoreError, say_recalls
from ..core.rows import Values
from ..core.search import Floats, Ints, Neighbors, Request, TorchFirstPass, check_request
from .backend import NOBODY, Hits, even_parts
from .casting import Centers, fits_float16, sums_of, widened
from .changes import checked_rows
from .datastore import Datastore
from .index import MIN_RECALL
from .kinds import FLAT
from .recall import RECALL_K, ROWS, Queries, Recalls, queries_for, worst
from .searcher import nearest_in_blocks, recall_of

logger = logging.getLogger(__name__)

QUERY_BLOCK = 1024
"""Queries of one rank per exchange, which bounds the memory."""

_ID_BLOCK = 2**20
_SUM_BLOCK = 65_536

Group = dist.ProcessGroup | None
"""None is the default group."""

Fact = TypeVar("Fact")

Nearest = Callable[[Floats, int], Hits]
"""From queries [B, D] and k to the nearest of this rank's rows."""


class ShardedDatastore:
    """The rows of all ranks as one datastore; each rank keeps its own.

    With exact shards (`index="flat"`) answers are those of one `Datastore` with all rows and the
    same mean, bit for bit; with others some rows may be missed, see `recall`. Every method that
    says *collective* must be called by all ranks of the group, and so must the constructor; a bad
    argument of one rank is an error on all. Bring rows with `from_features`; the constructor takes
    ready shards, and builds and measures their indexes where they are approximate.

    Args:
        shard: this rank's rows; it may be empty.
        group: the process group; None is the default one.

    Attributes:
        shard: this rank's rows.
        recall: share of the 20 nearest of all rows that was found when the datastore was made, the
            worst of `recalls`; None where all shards are exact.
        measured_on: which of them that was, see `IndexInfo`.
        recalls: by what it was measured on; empty where all shards are exact.

    Raises:
        RuntimeError: before `torch.distributed.init_process_group`.
        ValueError: for shards of another width, metric, normalisation, mean, learned map or index
            asked for, an index that cannot be built, or an id that two ranks have; on all ranks.
    """

    def __init__(self, shard: Datastore, group: Group = None) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "Expected torch.distributed to be initialised; call "
                "torch.distributed.init_process_group first, under torchrun or accelerate launch."
            )
        self.shard, self.group = shard, group
        self.metric, self.normalization, self.mean = shard.metric, shard.normalization, shard.mean
        self.learned_map = shard.learned_map
        self._verify_shards()
        self._check_shards()
        self._refuse_shared_ids()
        self.recall: float | None = None
        self.measured_on: str | None = None
        self.recalls: Recalls = {}
        if self._is_approximate():
            self._build()  # after which one may know that an exact search is no slower
        if self._is_approximate():
            self.recalls = self._measure()
            self.recall, self.measured_on = worst(self.recalls)

    @classmethod
    def from_features(
        cls,
        features: Tensor | NDArray,
        labels: Values,
        ids: Values | None = None,
        metric: str = "cosine",
        normalization: str = "l2_centered",
        group: Group = None,
        *,
        index: str = FLAT,
        min_recall: float = MIN_RECALL,
    ) -> Self:
        """Makes a datastore of the rows that each rank brings. Collective.

        The mean is that of all rows, whatever rank they are on: sums in float64 are exchanged, not
        rows. For rows stored as float16 these sums are exact for all usual features, so that the
        mean is bit for bit that of one datastore with all rows; for float32 it may differ in its
        last bit.

        Args:
            features: [N, D] raw features of this rank; N may be 0, D is the same on all ranks.
            labels: [N] whole numbers >= 0.
            ids: [N] whole numbers >= 0 that no other rank has; None numbers the rows through all
                ranks.
            metric: see `Datastore.from_features`; the same on all ranks.
            normalization: see `Datastore.from_features`; the same on all ranks.
            group: the process group; None is the default one.
            index: see `Datastore.from_features`; the same on all ranks. `auto` chooses for the rows
                of each rank, so that a small shard may be exact beside a large one that is not.
            min_recall: recall at 20 that each rank's index is set to reach among its own rows.

        Raises:
            ValueError: for bad rows of any rank, or an index that its rows are too few for; on all
                ranks.
        """
        problem, nothing = "", torch.empty(0, dtype=torch.int64)
        rows, row_labels, numbers = torch.empty(0, 1), nothing, nothing
        try:
            rows, row_labels, numbers = checked_rows(features, labels, ids)
        except ValueError as error:
            problem = str(error)
        facts = _exchange((problem, len(rows), rows.shape[1], ids is None), group)
        _raise_any([fact[0] for fact in facts])
        if len({fact[2] for fact in facts}) > 1 or len({fact[3] for fact in facts}) > 1:
            raise ValueError(
                "Expected all ranks to bring rows of one width, and ids all or none, but they "
                f"bring widths {[fact[2] for fact in facts]}, ids {[not f[3] for f in facts]}."
            )
        if ids is None:
            numbers = numbers + sum(fact[1] for fact in facts[: dist.get_rank(group)])
        fits = fits_float16(rows, _common_centers(rows, group))
        all_fit = all(_exchange(fits, group))  # one datastore has one dtype
        stored = rows.to(torch.float16 if all_fit else widened(), copy=True)
        mean = _common_mean(stored, group)
        parts, shard = (stored, row_labels, numbers, mean), None
        try:
            shard = Datastore(
                *parts, metric=metric, normalization=normalization, index=index,
                min_recall=min_recall,
            )  # fmt: skip
        except (ValueError, ImportError) as error:
            problem = str(error)
        _raise_any(_exchange(problem, group))
        assert shard is not None
        return cls(shard, group)

    def count(self) -> int:
        """How many rows all ranks have. Collective."""
        return sum(_exchange(len(self.shard), self.group))

    def search(
        self, queries: Tensor | NDArray, k: int = 20, exclude_ids: Values | None = None
    ) -> Neighbors:
        """Finds the k nearest rows of all ranks, for each rank's own queries. Collective.

        Ranks may bring different numbers of queries, also none, with or without `exclude_ids`.

        Args:
            queries: [B, D] finite raw features of any float dtype and device.
            k: how many, >= 1, the same on all ranks.
            exclude_ids: [B] int64; the row with that id, on whatever rank, is no neighbour of that
                query (-1 = none).

        Returns:
            Neighbors [B, min(k, N)], or [B, min(k, N - 1)] with `exclude_ids`, N counted over all
            ranks, as `Datastore.search` returns them.

        Raises:
            ValueError: see `Datastore.search`; also where another rank was given a bad argument.
        """
        request, problem = Request(np.empty((0, self.shard.dim)), 1, None), ""
        try:
            request = check_request(queries, k, exclude_ids, self.shard.dim)
        except ValueError as error:
            problem = str(error)
        facts = _exchange((problem, len(request.queries), len(self.shard), request.k), self.group)
        _raise_any([fact[0] for fact in facts])
        if len({fact[3] for fact in facts}) > 1:
            raise ValueError(f"Expected one `k`, but got {[fact[3] for fact in facts]} by rank.")
        width = request.width(sum(fact[2] for fact in facts))
        found = self._answer(request, width, [fact[1] for fact in facts], self._nearest)
        return Neighbors(*(torch.from_numpy(values) for values in found)).rounded(queries)

    def _answer(self, request: Request, width: int, counts: list[int], nearest: Nearest) -> Hits:
        """The answers to this rank's queries.

        Args:
            request: of this rank; k is that of all ranks.
            width: how many neighbours each query gets.
            counts: queries of each rank; they are cut evenly, so that a call has many or all.
            nearest: asks this rank's rows about the queries of all ranks, in one call per block.
        """
        rank, blocks = dist.get_rank(self.group), [Hits.none(0, width)]
        cuts = [even_parts(count, -(-max(counts) // QUERY_BLOCK)) for count in counts]
        for parts in zip(*cuts, strict=True):
            mine = torch.from_numpy(request.queries[parts[rank]].astype(np.float64))
            everyone = _gather_rows(mine, [part.stop - part.start for part in parts], self.group)
            # one more than wanted, since the excluded row may lie here or elsewhere
            hits = nearest(torch.cat(everyone).numpy(), request.k + 1)
            found = _gather_hits(hits, [len(rows) for rows in everyone], self.group)
            if request.excluded is not None:
                excluded = request.excluded[parts[rank], None]
                found.similarities[(found.ids == excluded) & (excluded >= 0)] = -np.inf
            blocks.append(found.best_with(Hits.none(len(mine), 0), width))
        columns = zip(*blocks, strict=True)
        return Hits(*(np.concatenate(column) for column in columns))

    def _nearest(self, queries: Floats, k: int) -> Hits:
        """By the index of the shard."""
        return Hits(*(part.numpy() for part in self.shard.nearest(queries, k)))

    def _truly_nearest(self, queries: Floats, k: int) -> Hits:
        """Exact, also where the index of the shard is not."""
        if self.shard.index.spec == FLAT:
            return self._nearest(queries, k)
        searcher, width = self.shard.build_index(), min(k, len(self.shard) - 1)
        features, ids, space = searcher.features, searcher.ids, searcher.space
        nobody = np.full(len(queries), -1)
        places = nearest_in_blocks(features, ids, space, TorchFirstPass, queries, width, nobody)
        similarities = np.empty(places.shape)
        for i, query in enumerate(space.normalize(queries)):
            similarities[i] = space.compare(space.normalize(features[places[i]]), query)
        return Hits(similarities, self.shard.labels.numpy()[places], ids[places])

    def _is_approximate(self) -> bool:
        return any(spec != FLAT for spec in _exchange(self.shard.index.spec, self.group))

    def _build(self) -> None:
        problem = ""
        try:
            self.shard.build_index()
        except ValueError as error:
            problem = str(error)
        _raise_any(_exchange(problem, self.group))

    def _measure(self) -> Recalls:
        """The recalls over all ranks, by kind of queries, of which each rank brings some."""
        shard, total = self.shard, self.count()
        recalls = dict.fromkeys(MEASURED_ON, 1.0)
        if total < 2:  # nothing is missed
            return recalls
        nothing = Queries(ROWS, np.empty((0, shard.dim)), np.empty(0, np.int64))
        mine = [nothing]
        if len(shard):
            mine = queries_for(shard.build_index().features, shard.ids.numpy(), self._own_nearest)
        kinds = max(_exchange([queries.kind for queries in mine], self.group), key=len)
        k = min(RECALL_K, total - 1)
        for i, kind in enumerate(kinds):
            asked = mine[i] if i < len(mine) else nothing
            request = Request(asked.features, k, asked.own)
            counts = _exchange(len(asked.own), self.group)
            found = self._answer(request, k, counts, self._nearest).ids
            wanted = self._answer(request, k, counts, self._truly_nearest).ids
            share = recall_of(found, wanted) if len(found) else 0.0
            recall = sum(_exchange(share * len(found), self.group)) / sum(counts)
            recalls[kind] = min(recalls[kind], recall)
        if dist.get_rank(self.group) == 0:
            said = say_recalls(recalls)
            logger.info("%d rows on all ranks: recall@%d %s", total, k, said)
        return recalls

    def _own_nearest(self, queries: Queries, k: int) -> Ints:
        """The ids of the nearest of this rank's rows, whatever its index."""
        ids = self._truly_nearest(np.asarray(queries.features, np.float64), k + 1).ids
        # a row among its own neighbours goes behind them; of others the last does
        order = np.argsort(ids == queries.own[:, None], axis=1, kind="stable")
        return np.take_along_axis(ids, order, axis=1)[:, :k]

    def _verify_shards(self) -> None:
        problem = ""
        try:
            self.shard.verify()
        except DatastoreError as error:
            problem = str(error)
        _raise_any(_exchange(problem, self.group))

    def _check_shards(self) -> None:
        shard = self.shard
        names = ("width", "metric", "normalization", "mean", "learned map", "index asked for")
        learned = shard.learned_map
        mine = (
            shard.dim, shard.metric, shard.normalization, shard.mean.numpy().tobytes(),
            learned and learned.sha256, shard.index.requested,
        )  # fmt: skip
        facts = _exchange(mine, self.group)
        other = [name for i, name in enumerate(names) if len({fact[i] for fact in facts}) > 1]
        if other:
            raise ValueError(f"Expected shards of one {', '.join(other)}, but the ranks differ.")

    def _refuse_shared_ids(self) -> None:
        """Compares the ids of all ranks, block by block, so that nobody holds all of them."""
        ids, shared = self.shard.ids, torch.empty(0, dtype=torch.int64)
        rank = dist.get_rank(self.group)
        counts = _exchange(len(ids), self.group)
        for start in range(0, max(counts), _ID_BLOCK):
            parts = [max(0, min(_ID_BLOCK, count - start)) for count in counts]
            blocks = _gather_rows(ids[start : start + _ID_BLOCK], parts, self.group)
            others = [block for i, block in enumerate(blocks) if i != rank]
            shared = torch.cat([shared, *(block[torch.isin(block, ids)] for block in others)])
        by_rank = _exchange(shared[:10].tolist(), self.group)
        found = sorted({row_id for part in by_rank for row_id in part})
        if found:
            raise ValueError(f"Expected ids that one rank has, but several have {found[:10]}.")


def _common_centers(rows: Tensor, group: Group) -> Centers:
    """The means of all ranks' rows and of their casts; the same on all."""
    count = max(1, sum(_exchange(len(rows), group)))
    exact, cast = (np.sum(_exchange(sums, group), axis=0) / count for sums in sums_of(rows))
    return Centers(exact, cast)


def _common_mean(stored: Tensor, group: Group) -> Tensor:
    """[D] float32 mean of all ranks' rows; the same on all, whatever the order of arrival."""
    total = np.zeros(stored.shape[1])
    for block in stored.split(_SUM_BLOCK):
        total += block.numpy().sum(axis=0, dtype=np.float64)
    facts = _exchange((len(stored), total), group)
    count = sum(fact[0] for fact in facts)
    if count == 0:
        return torch.zeros(stored.shape[1])
    mean = np.sum([fact[1] for fact in facts], axis=0, dtype=np.float64) / count
    return torch.from_numpy(mean).float()


def _exchange(value: Fact, group: Group) -> list[Fact]:
    """Small facts of all ranks, in their order."""
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _raise_any(problems: list[str]) -> None:
    found = [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text]
    if found:
        raise ValueError(" ".join(found))


def _gather_rows(mine: Tensor, counts: list[int], group: Group) -> list[Tensor]:
    """Tensors [n, …] of all ranks, whose lengths are given."""
    padded = mine.new_zeros(max(counts), *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = _gather(padded, group)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def _gather_hits(mine: Hits, counts: list[int], group: Group) -> Hits:
    """What all ranks found for the queries of this one, side by side.

    Args:
        mine: what this rank found for the queries of all ranks, in their order.
        counts: queries of each rank.
        group: the ranks.
    """
    width, missing = max(_exchange(mine.ids.shape[1], group)), (-np.inf, NOBODY, NOBODY)
    packed = torch.empty(3, sum(counts), width, dtype=torch.int64)
    for place, values, nothing in zip(packed, mine, missing, strict=True):
        padded = np.full(place.shape, nothing, values.dtype)
        padded[:, : values.shape[1]] = values
        place.copy_(torch.from_numpy(padded.view(np.int64)))  # the bits of float64, in one message
    before = sum(counts[: dist.get_rank(group)])
    own = slice(before, before + counts[dist.get_rank(group)])
    found = torch.cat([part[:, own] for part in _gather(packed, group)], dim=2).numpy()
    return Hits(found[0].view(np.float64), found[1], found[2])


def _gather(mine: Tensor, group: Group) -> list[Tensor]:
    """Tensors of one shape of all ranks, on the CPU."""
    is_nccl = dist.get_backend(group) == "nccl"
    sent = mine.to(torch.device("cuda", torch.cuda.current_device())) if is_nccl else mine
    parts = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    if mine.numel():
        dist.all_gather(parts, sent, group=group)
    return [part.cpu() for part in parts]
