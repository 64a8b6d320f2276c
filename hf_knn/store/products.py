"""An exact first pass by products on the CPU, in a number format that the processor is fast at.

Each format says how far a product may be off, so that every row has an upper bound. Rows lie in
groups, and of most groups only the largest product is ever looked at.
"""

import functools
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..core.search import Floats, Ints, Singles, float32_rounding, shortcut

_GROUP = 32
_BLOCK_ROWS, _QUERIES, _PRODUCTS = 4096, 256, 2**20
"""Rows, queries and products that are in work at once: they stay in the cache."""

_SLAB_BLOCKS = 16
"""Blocks that lie together in memory; what is added copies no more than these."""

_TURN = 64
_TURNING = 2.0**-13
"""What turning a row and a query in float32 can change of their product, and more."""

_SMALLEST = 1e-12  # of a scale: nothing is divided by 0


class Coded(NamedTuple):
    """Vectors of length at most 1 in a number format, about `scale * codes`, in groups.

    Attributes:
        codes: [n, D''].
        scale: float32, one for each group.
        lost: float32, the length of what a vector of each group lost at most.
    """

    codes: Tensor
    scale: Tensor
    lost: Tensor


class NumberFormat(Protocol):
    """How vectors are shortened and multiplied.

    Attributes:
        extra: how many candidates beyond k are usually enough.
        products: dtype of them.
        rounding: how far off a product may be by rounding, as a part of it.
    """

    extra: int
    products: torch.dtype
    rounding: float

    def code(self, vectors: Tensor) -> Coded:
        """Shortens [groups, members, D'] float32; the codes are [groups * members, D'']."""
        ...

    def multiply(self, queries: Tensor, rows: Tensor, out: Tensor) -> None:
        """Writes the products of codes [B, D''] and [N, D''] into [B, N]."""
        ...

    def off(self, width: int) -> float:
        """How far off a product of vectors of that width may be besides."""
        ...


class FloatFormat:
    """Products of float32, or of bfloat16 where the processor has it.

    Args:
        dtype: of the rows and the products.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.products = dtype
        self.rounding = 0.0 if dtype == torch.float32 else 2.0**-8
        self.extra = 12 if dtype == torch.float32 else 44

    def code(self, vectors: Tensor) -> Coded:
        """See `NumberFormat.code`."""
        codes = vectors.to(self.products)
        lost = (vectors - codes.float()).norm(dim=2).amax(1)
        return Coded(codes.flatten(0, 1), torch.ones(len(lost)), lost)

    def multiply(self, queries: Tensor, rows: Tensor, out: Tensor) -> None:
        """See `NumberFormat.multiply`."""
        torch.mm(queries, rows.T, out=out)

    def off(self, width: int) -> float:
        """See `NumberFormat.off`."""
        return float32_rounding(width) + shortcut()


def has_fast_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def has_exact_int8() -> bool:
    """Whether the processor adds products of int8 up in int32 in hardware: others may cut off."""
    return bool(torch.cpu._is_vnni_supported())


class Int8Format:
    """Products of whole numbers up to 127, exact in int32: a quarter of the memory of float32.

    Vectors are turned first, so that no value of them is much larger than the others.
    """

    products, rounding, extra = torch.int32, 0.0, 44

    def code(self, vectors: Tensor) -> Coded:
        """See `NumberFormat.code`."""
        turned = torch.from_numpy(_turned(vectors.flatten(0, 1).numpy()))
        turned = turned.view(*vectors.shape[:2], -1)
        scale = turned.abs().amax((1, 2), keepdim=True).clamp(min=_SMALLEST) / 127
        codes = (turned / scale).round().to(torch.int8)
        lost = (turned - codes * scale).norm(dim=2).amax(1)
        return Coded(codes.flatten(0, 1), scale.flatten(), lost)

    def multiply(self, queries: Tensor, rows: Tensor, out: Tensor) -> None:
        """See `NumberFormat.multiply`."""
        torch._int_mm(queries, rows.T, out=out)

    def off(self, width: int) -> float:
        """See `NumberFormat.off`."""
        return float32_rounding(width) + _TURNING


@functools.cache
def _turn() -> Singles:
    """[64, 64] orthogonal, as good as any other."""
    return np.linalg.qr(np.random.default_rng(0).standard_normal((_TURN, _TURN)))[0].astype("f4")


def _turned(vectors: Singles) -> Singles:
    """[n, D'] to [n, D''], the next multiple of 64: values that lie far apart are mixed."""
    count, width = vectors.shape
    padded = np.zeros((count, -(-width // _TURN) * _TURN), np.float32)
    padded[:, :width] = vectors
    mixed = padded.reshape(count, _TURN, -1).transpose(0, 2, 1).reshape(-1, _TURN) @ _turn()
    return mixed.reshape(count, -1)


class Slab(NamedTuple):
    """Rows that lie together in memory, group by group.

    Attributes:
        coded: of the rows, those of each group together.
        first: [groups] the first row of each.
        step: from a row to the next of its group: neighbours in the store, which are often of one
            class, are of many groups. What the last step falls short of is filled up with zeros.
    """

    coded: Coded
    first: Ints
    step: int

    def members(self) -> Ints:
        """[groups, 32] rows; beyond the last for what is none."""
        return self.first[:, None] + self.step * np.arange(_GROUP)


class Products:
    """A first pass by products, block by block.

    Args:
        rows: [N, D'] float32 of length at most 1.
        number_format: what the products are made of.
    """

    def __init__(self, rows: Singles, number_format: NumberFormat) -> None:
        self.format, self.extra = number_format, number_format.extra
        self.whole: list[Slab] = []  # of whole blocks
        self.last: list[Slab] = []  # of what is left, at most one
        self.rest = rows[:0]  # the rows of it
        self.count = 0
        self.add(rows)

    def add(self, rows: Singles) -> None:
        """See `GrowingFirstPass.add`."""
        rows = np.concatenate([self.rest, rows])
        start = self.count - len(self.rest)
        end = start + len(rows) // _BLOCK_ROWS * _BLOCK_ROWS
        for row in range(start, end, _BLOCK_ROWS):
            self._append(self._slab(rows[row - start :][:_BLOCK_ROWS], row))
        self.rest = rows[end - start :].copy()
        self.last = [self._slab(self.rest, end)] if len(self.rest) else []
        self.count = end + len(self.rest)
        # of all groups, as their slabs say of each
        slabs, none = self.whole + self.last, np.empty((0, _GROUP), np.int64)
        self.members = np.concatenate([none, *(slab.members() for slab in slabs)])
        self.scale = torch.cat([torch.empty(0), *(slab.coded.scale for slab in slabs)])
        self.lost = torch.cat([torch.empty(0), *(slab.coded.lost for slab in slabs)])

    @torch.autocast("cpu", enabled=False)
    def candidates(self, queries: Singles, count: int) -> tuple[Ints, Floats]:
        """See `FirstPass.candidates`."""
        parts = range(0, len(queries), _QUERIES)
        found = [self._best(queries[start : start + _QUERIES], count) for start in parts]
        positions, reach = zip(*found, strict=True)
        return np.concatenate(positions), np.concatenate(reach)

    def _slab(self, rows: Singles, start: int) -> Slab:
        step = -(-len(rows) // _GROUP)
        padded = np.zeros((_GROUP, step, rows.shape[1]), np.float32)
        padded.reshape(-1, rows.shape[1])[: len(rows)] = rows
        grouped = torch.from_numpy(np.ascontiguousarray(padded.swapaxes(0, 1)))
        return Slab(self.format.code(grouped), start + np.arange(step), step)

    def _append(self, block: Slab) -> None:
        """Adds a whole block to the last slab of them, if there is room."""
        if not self.whole or len(self.whole[-1].first) >= _SLAB_BLOCKS * block.step:
            self.whole.append(block)
            return
        coded, first, step = self.whole[-1]
        joined = Coded(*(torch.cat(pair) for pair in zip(coded, block.coded, strict=True)))
        self.whole[-1] = Slab(joined, np.concatenate([first, block.first]), step)

    def _best(self, queries: Singles, count: int) -> tuple[Ints, Floats]:
        """The best of a few queries; see `FirstPass.candidates`."""
        coded = self.format.code(torch.from_numpy(queries)[:, None])
        # bounds are in units of the scale of each query: what a row lost weighs that much more
        weight = ((1 + coded.lost) / coded.scale)[:, None]
        longest = max(len(slab.coded.codes) for slab in self.whole + self.last)
        at_once = min(longest, max(_PRODUCTS // len(queries), _BLOCK_ROWS))  # rows
        room = torch.empty(len(queries) * at_once, dtype=self.format.products)
        last = self.last[0] if self.last else None
        survivors = Survivors(len(queries), count, len(self.members))
        for slab in self.whole + self.last:
            step = max(1, _PRODUCTS // (len(queries) * _GROUP * slab.step)) * slab.step  # groups
            for start in range(0, len(slab.first), step):
                part = slice(start, start + step)
                codes = slab.coded.codes[_GROUP * part.start : _GROUP * part.stop]
                products = room[: len(queries) * len(codes)].view(len(queries), len(codes))
                self.format.multiply(coded.codes, codes, products)
                grouped = products.view(len(queries), -1, _GROUP)
                if slab is last:
                    missing = torch.from_numpy(slab.members()[part] >= self.count)
                    grouped.masked_fill_(missing, _lowest(products.dtype))
                best = grouped.amax(2)  # [B, groups]
                scale, lost = slab.coded.scale[part], slab.coded.lost[part]
                survivors.look_at(self._bounds(best, scale, lost, weight), products)
        of, group, products = survivors.groups()
        scale, lost = self.scale[group, None], self.lost[group, None]
        inside = self._bounds(products, scale, lost, weight[of]).numpy()
        rows = self.members[group]
        positions, bounds = survivors.rows(of, rows, np.where(rows < self.count, inside, -np.inf))
        own, more = (part.double().numpy()[:, None] for part in coded[1:])
        return positions, bounds * own + more + self.format.off(queries.shape[1])

    def _bounds(self, products: Tensor, scale: Tensor, lost: Tensor, weight: Tensor) -> Tensor:
        """What rows can score at most, less what is the same for all rows."""
        upper = products.float()
        if self.format.rounding:
            upper = upper + self.format.rounding * upper.abs()
        return (upper * scale).addcmul_(weight, lost)


class Survivors:
    """The groups with the best bounds of each query, among those that come one after the other.

    Args:
        queries: B.
        count: rows wanted of each.
        groups: that will come.
    """

    def __init__(self, queries: int, count: int, groups: int) -> None:
        self.count, self.seen, self.due = count, 0, count
        self.upper = np.empty((queries, groups), np.float32)
        self.least = np.full((queries, 1), -np.inf, np.float32)
        self.found: list[tuple[Ints, Ints, Singles, Tensor]] = []

    def look_at(self, upper: Tensor, products: Tensor) -> None:
        """Keeps those of the next groups that may be among the best.

        Args:
            upper: [B, G] their bounds.
            products: [B, G * 32] of their members.
        """
        width, start = upper.shape[1], self.seen
        self.upper[:, start : start + width] = bounds = upper.numpy()
        self.seen += width
        if self.seen >= self.due:
            self._raise_least()
        hits = np.flatnonzero(bounds >= self.least)
        members = products.view(-1, _GROUP)[torch.from_numpy(hits)]
        of, group = np.divmod(hits, width)
        self.found.append((of, group + start, bounds.ravel()[hits], members))

    def groups(self) -> tuple[Ints, Ints, Tensor]:
        """The best groups of all: [P] of which query, [P] which group, [P, 32] products."""
        if self.seen >= self.count:
            self._raise_least()
        of, group, upper, members = zip(*self.found, strict=True)
        whose = np.concatenate(of)
        kept = np.flatnonzero(np.concatenate(upper) >= self.least[whose, 0])
        return whose[kept], np.concatenate(group)[kept], torch.cat(members)[torch.from_numpy(kept)]

    def rows(self, of: Ints, rows: Ints, bounds: Singles) -> tuple[Ints, Singles]:
        """The best rows of those groups.

        Args:
            of: [P] of which query.
            rows: [P, 32].
            bounds: [P, 32], -inf for what is no row.

        Returns:
            [B, count] rows and their bounds, the best first.
        """
        # each query has so many groups with a row above the least, or all rows are here
        kept = np.flatnonzero((bounds >= self.least[of]) & (bounds > -np.inf))
        whose = of[kept // _GROUP].astype(np.uint16)
        rows, bounds = rows.ravel()[kept], bounds.ravel()[kept]
        order = np.argsort(-bounds)
        order = order[np.argsort(whose[order], kind="stable")]
        starts = np.searchsorted(whose[order], np.arange(len(self.least)))
        chosen = order[starts[:, None] + np.arange(self.count)]
        return rows[chosen], bounds[chosen]

    def _raise_least(self) -> None:
        seen = self.upper[:, : self.seen]
        place = self.seen - self.count
        self.least = np.partition(seen, place, axis=1)[:, place, None]
        self.due = 2 * self.seen


def _lowest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min if dtype.is_floating_point else torch.iinfo(dtype).min
