"""An exact first pass by products on the CPU, in a number format that the processor is fast at.

Each format says how far a product may be off, so that every row has an upper bound. Rows lie in
groups, and of most groups only the largest product is ever looked at.
"""

import functools
from collections.abc import Iterator
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

_MARGIN = 2.0**-20  # more than a few roundings in float32

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
        turned = _turned(vectors.flatten(0, 1)).view(*vectors.shape[:2], -1)
        scale = turned.abs().amax((1, 2), keepdim=True).clamp(min=_SMALLEST) / 127
        codes = (turned / scale).round().to(torch.int8)
        lost = torch.linalg.vector_norm(turned - codes * scale, dim=2).amax(1)
        return Coded(codes.flatten(0, 1), scale.flatten(), lost)

    def multiply(self, queries: Tensor, rows: Tensor, out: Tensor) -> None:
        """See `NumberFormat.multiply`."""
        torch._int_mm(queries, rows.T, out=out)

    def off(self, width: int) -> float:
        """See `NumberFormat.off`."""
        return float32_rounding(width) + _TURNING


@functools.cache
def _turn() -> Tensor:
    """[64, 64] float64, orthogonal, as good as any other."""
    normal = np.random.default_rng(0).standard_normal((_TURN, _TURN))
    return torch.from_numpy(np.linalg.qr(normal)[0])


def _turned(vectors: Tensor) -> Tensor:
    """[n, D'] to [n, D''], the next multiple of 64: values that lie far apart are mixed."""
    count, width = vectors.shape
    # by torch: threads of numpy would be in the way of those that come next; to ask costs more
    dtype = torch.float64 if count == 1 or shortcut() else torch.float32
    padded = torch.zeros(count, -(-width // _TURN) * _TURN, dtype=dtype)
    padded[:, :width] = vectors
    mixed = padded.view(count, _TURN, -1).transpose(1, 2).reshape(-1, _TURN) @ _turn().to(dtype)
    return mixed.view(count, -1).float()


class Slab(NamedTuple):
    """Rows that lie together in memory, group by group.

    Attributes:
        coded: of the rows, those of each group together.
        first: [groups] the first row of each.
        step: from a row to the next of its group: neighbours in the store, which are often of one
            class, are of many groups. What the last step falls short of are copies.
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
        self._collect()

    def repeat(self, times: int) -> None:
        """Holds all rows so many times, each time in other memory; they fill whole blocks."""
        starts = self.count * np.arange(times)[:, None]
        self.whole = [
            Slab(
                Coded(codes.repeat(times, 1), scale.repeat(times), lost.repeat(times)),
                (starts + first).ravel(),
                step,
            )
            for (codes, scale, lost), first, step in self.whole
        ]
        self.count *= times
        self._collect()

    def _collect(self) -> None:
        """What the slabs say of their groups, for all groups."""
        slabs, none = self.whole + self.last, np.empty((0, _GROUP), np.int64)
        self.members = np.concatenate([none, *(slab.members() for slab in slabs)])
        self.scale = torch.cat([torch.empty(0), *(slab.coded.scale for slab in slabs)])
        self.lost = torch.cat([torch.empty(0), *(slab.coded.lost for slab in slabs)])

    @torch.autocast("cpu", enabled=False)
    def candidates(self, queries: Singles, count: int) -> tuple[Ints, Floats]:
        """See `FirstPass.candidates`."""
        parts = range(0, len(queries), _QUERIES)
        found = [self._best(queries[start : start + _QUERIES], count) for start in parts]
        if len(found) == 1:
            return found[0]
        positions, reach = zip(*found, strict=True)
        return np.concatenate(positions), np.concatenate(reach)

    def _slab(self, rows: Singles, start: int) -> Slab:
        step = -(-len(rows) // _GROUP)
        padded = np.empty((_GROUP, step, rows.shape[1]), np.float32)
        flat = padded.reshape(_GROUP * step, rows.shape[1])
        flat[: len(rows)] = rows
        flat[len(rows) :] = rows[np.arange(len(rows), len(flat)) % step]
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
        survivors = Survivors(self, coded, count)
        for products in self._products(coded.codes):
            survivors.look_at(products)
        rows, bounds = survivors.best()
        own, more = (part.double().numpy()[:, None] for part in coded[1:])
        return rows, bounds * own + more + self.format.off(queries.shape[1])

    def _products(self, queries: Tensor) -> Iterator[Tensor]:
        """[B, n] products with the rows of the next groups, as many as stay in the cache."""
        count, filled = len(queries), 0
        at_once = max(_PRODUCTS // count, _BLOCK_ROWS) // _GROUP * _GROUP  # rows
        room = torch.empty(
            count * min(at_once, _GROUP * len(self.members)), dtype=self.format.products
        )
        for slab in self.whole + self.last:
            for codes in slab.coded.codes.split(at_once):
                # what lies one after the other are the products of one query only
                if filled and (count > 1 or filled + len(codes) > at_once):
                    yield room[: count * filled].view(count, filled)
                    filled = 0
                place = room[count * filled : count * (filled + len(codes))]
                self.format.multiply(queries, codes, place.view(count, len(codes)))
                filled += len(codes)
        yield room[: count * filled].view(count, filled)


class Survivors:
    """The rows with the best bounds of each query, among those that come one after the other.

    Bounds are in units of the scale of each query: what a row lost weighs that much more.

    Args:
        rows: that will come, group by group.
        queries: B of them.
        count: rows wanted of each.
    """

    def __init__(self, rows: Products, queries: Coded, count: int) -> None:
        self.all, self.count, self.seen, self.due = rows, count, 0, count
        self.weight = ((1 + queries.lost) / queries.scale)[:, None]
        self.upper = torch.empty(len(self.weight), len(rows.members))
        self.least = np.full((len(self.weight), 1), -np.inf, np.float32)
        self.found: list[tuple[Ints, Ints, Ints, Singles]] = []

    def look_at(self, products: Tensor) -> None:
        """Keeps those of the next rows that may be among the best.

        Args:
            products: [B, G * 32] of the members of the next groups.
        """
        grouped = products.view(len(products), -1, _GROUP)
        start, width = self.seen, grouped.shape[1]
        self.seen += width
        part = slice(start, self.seen)
        best = grouped.amax(2)  # [B, G]
        upper = self._rounded_up(best).mul_(self.all.scale[part])
        torch.addcmul(upper, self.weight, self.all.lost[part], out=self.upper[:, part])
        if self.seen >= self.due:
            place = self.seen - self.count
            seen = self.upper[:, : self.seen].numpy()
            self.least = np.partition(seen, place, axis=1)[:, place, None].copy()
            self.due = 2 * self.seen
        of, group = np.nonzero(self.upper[:, part].numpy() >= self.least)
        hits = torch.from_numpy(of * width + group)
        members = products.view(-1, _GROUP).index_select(0, hits).float().numpy()
        group += start
        near = np.flatnonzero(members >= self._lowest(of, group)[:, None])
        hit, member = near // _GROUP, near % _GROUP
        self.found.append((of[hit], group[hit], member, members.ravel()[near]))

    def best(self) -> tuple[Ints, Singles]:
        """[B, count] rows and their bounds, the best first."""
        of, group, member, products = (
            np.concatenate(part) for part in zip(*self.found, strict=True)
        )
        rows = self.all.members[group, member]
        # each query has so many groups with a row above the least, or all rows are here
        wanted = rows < self.all.count
        if len(self.found) > 1:
            wanted &= products >= self._lowest(of, group)
        kept = np.flatnonzero(wanted)
        of, group, rows = of[kept], group[kept], rows[kept]
        upper = self._rounded_up(torch.from_numpy(products[kept])).numpy()
        bounds = upper * self.all.scale.numpy()[group] + self._lost(of, group)
        order = np.argsort(-bounds)
        order = order[np.argsort(of[order].astype(np.uint16), kind="stable")]
        starts = np.searchsorted(of[order], np.arange(len(self.least)))
        chosen = order[starts[:, None] + np.arange(self.count)]
        return rows[chosen], bounds[chosen]

    def _rounded_up(self, products: Tensor) -> Tensor:
        upper = products.float()
        return upper + self.all.format.rounding * upper.abs() if self.all.format.rounding else upper

    def _lost(self, of: Ints, group: Ints) -> Singles:
        lost: Singles = self.weight.numpy()[of, 0] * self.all.lost.numpy()[group]
        return lost

    def _lowest(self, of: Ints, group: Ints) -> Singles:
        """The products that reach the least of their queries, and what rounding may take away."""
        least, lost = self.least[of, 0], self._lost(of, group)
        margin = (2 * self.all.format.rounding + _MARGIN) * (np.abs(least) + lost)
        lowest: Singles = (least - lost - margin) / self.all.scale.numpy()[group]
        return lowest
