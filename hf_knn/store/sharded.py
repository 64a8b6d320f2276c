"""Exact search over rows that are divided over ranks: queries and answers travel, rows never do."""

from typing import Self, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ..core.manifest import DatastoreError
from ..core.rows import Values
from ..core.search import Neighbors, Request, check_request
from .backend import Hits
from .casting import Centers, fits_float16, sums_of, widened
from .changes import checked_rows
from .datastore import Datastore

QUERY_BLOCK = 1024
"""Queries of one rank per exchange, which bounds the memory."""

_ID_BLOCK = 2**20
_SUM_BLOCK = 65_536

Group = dist.ProcessGroup | None
"""None is the default group."""

Fact = TypeVar("Fact")


class ShardedDatastore:
    """The rows of all ranks as one datastore; each rank keeps its own.

    Answers are those of one `Datastore` with all rows and the same mean, bit for bit. Every method
    that says *collective* must be called by all ranks of the group, and so must the constructor; a
    bad argument of one rank is an error on all. Bring rows with `from_features`; the constructor
    takes ready shards.

    Args:
        shard: this rank's rows, searched exactly (`index="flat"`); it may be empty.
        group: the process group; None is the default one.

    Attributes:
        shard: this rank's rows.

    Raises:
        RuntimeError: before `torch.distributed.init_process_group`.
        ValueError: for shards of another width, metric, normalisation, mean or learned map, an
            approximate index, or an id that two ranks have; on all ranks.
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

    @classmethod
    def from_features(
        cls,
        features: Tensor | NDArray,
        labels: Values,
        ids: Values | None = None,
        metric: str = "cosine",
        normalization: str = "l2_centered",
        group: Group = None,
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

        Raises:
            ValueError: for bad rows of any rank; on all ranks.
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
        shard = Datastore(
            stored, row_labels, numbers, mean, metric=metric, normalization=normalization
        )
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
        most = max(fact[1] for fact in facts)
        blocks = (self._search_block(request, i, width) for i in range(0, most, QUERY_BLOCK))
        parts = [Hits.none(0, width), *blocks]
        found = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
        return Neighbors(*(torch.from_numpy(values) for values in found)).rounded(queries)

    def _search_block(self, request: Request, start: int, width: int) -> Hits:
        """The answers to some queries of each rank, of which this rank keeps its own."""
        mine = request.queries[start : start + QUERY_BLOCK].astype(np.float64)
        everyone = _gather_rows(torch.from_numpy(mine), self.group)
        # one more than wanted, since the excluded row may lie here or elsewhere
        hits = self.shard.nearest(torch.cat(everyone), request.k + 1)
        columns = [_gather_columns(part, self.group) for part in hits]
        before = sum(len(part) for part in everyone[: dist.get_rank(self.group)])
        own = slice(before, before + len(mine))
        similarities, labels, ids = (column[own].numpy() for column in columns)
        found = Hits(similarities.copy(), labels, ids)
        if request.excluded is not None:
            excluded = request.excluded[start : start + QUERY_BLOCK, None]
            found.similarities[(found.ids == excluded) & (excluded >= 0)] = -np.inf
        return found.best_with(Hits.none(len(mine), 0), width)

    def _verify_shards(self) -> None:
        problem = ""
        try:
            self.shard.verify()
        except DatastoreError as error:
            problem = str(error)
        _raise_any(_exchange(problem, self.group))

    def _check_shards(self) -> None:
        shard = self.shard
        names = ("width", "metric", "normalization", "mean", "learned map", "index")
        learned = shard.learned_map
        mine = (
            shard.dim, shard.metric, shard.normalization, shard.mean.numpy().tobytes(),
            learned and learned.sha256, shard.index.spec,
        )  # fmt: skip
        facts = _exchange(mine, self.group)
        other = [name for i, name in enumerate(names) if len({fact[i] for fact in facts}) > 1]
        if other:
            raise ValueError(f"Expected shards of one {', '.join(other)}, but the ranks differ.")
        if shard.index.spec != "flat":
            raise ValueError(
                f"Expected shards with index='flat', which search exactly, but got {shard.index}."
            )

    def _refuse_shared_ids(self) -> None:
        """Compares the ids of all ranks, block by block, so that nobody holds all of them."""
        ids, shared = self.shard.ids, torch.empty(0, dtype=torch.int64)
        rank = dist.get_rank(self.group)
        counts = _exchange(len(ids), self.group)
        for start in range(0, max(counts), _ID_BLOCK):
            blocks = _gather_rows(ids[start : start + _ID_BLOCK], self.group)
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


def _gather_rows(mine: Tensor, group: Group) -> list[Tensor]:
    """Tensors [n, …] of all ranks, whose lengths may differ."""
    counts = _exchange(len(mine), group)
    padded = mine.new_zeros(max(counts), *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = _gather(padded, group)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def _gather_columns(mine: Tensor, group: Group) -> Tensor:
    """[B, K] of all ranks side by side; -inf or -1 where a rank has fewer columns."""
    widths = _exchange(mine.shape[1], group)
    missing: float = -torch.inf if mine.is_floating_point() else -1
    padded = mine.new_full((len(mine), max(widths)), missing)
    padded[:, : mine.shape[1]] = mine
    return torch.cat(_gather(padded, group), dim=1)


def _gather(mine: Tensor, group: Group) -> list[Tensor]:
    """Tensors of one shape of all ranks, on the CPU."""
    is_nccl = dist.get_backend(group) == "nccl"
    sent = mine.to(torch.device("cuda", torch.cuda.current_device())) if is_nccl else mine
    parts = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    if mine.numel():
        dist.all_gather(parts, sent, group=group)
    return [part.cpu() for part in parts]
