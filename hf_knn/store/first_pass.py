"""First passes of a search: fast proposals of candidates, by inner product of float32 rows.

Exact ones say how good a row that they left out can be at most, so that the caller can tell whether
it could still belong to the answer. Approximate ones (in `faiss.py`) promise nothing.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..core.search import (
    ROW_BLOCK,
    FirstPass,
    Floats,
    Ints,
    Singles,
    best_of_blocks,
    float32_rounding,
    shortcut,
)

_ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""How far a score may be off, as a part of it, by being stored in a dtype."""

_FLOAT16_SUMS = 2.0**-8
"""What a device may lose by adding up parts of a float16 product in float16."""

_QUERY_BLOCK = 256
_GROUP = 32


class GrowingFirstPass(FirstPass, Protocol):
    """A first pass that rows can be appended to."""

    def add(self, rows: Singles) -> None:
        """Appends rows [M, D'] float32."""
        ...


class PlacedFirstPass:
    """Blocked matmul and top-k in torch, on any devices.

    Args:
        rows: [N, D'] float32.
        devices: where the blocks of rows lie, in turn: several devices share the work.
        dtype: of the rows there, `float32` or `float16`; half of the memory, and more candidates.
    """

    def __init__(
        self,
        rows: Singles,
        devices: Sequence[torch.device] = (torch.device("cpu"),),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.devices, self.dtype = devices, dtype
        self.extra = 12 if dtype == torch.float32 else 44
        self.rounding = float32_rounding(rows.shape[1])
        self.rounding += _FLOAT16_SUMS if dtype == torch.float16 else 0.0
        self.blocks: list[Tensor] = []
        self.lost = 0.0
        self.add(rows)

    def add(self, rows: Singles) -> None:
        """See `GrowingFirstPass.add`."""
        added = torch.from_numpy(rows)
        if self.blocks and len(self.blocks[-1]) < ROW_BLOCK:
            last = self.blocks[-1]
            fitting = added[: ROW_BLOCK - len(last)]
            self.blocks[-1] = torch.cat([last, self._rounded(fitting).to(last.device)])
            added = added[len(fitting) :]
        for block in added.split(ROW_BLOCK) if len(added) else ():
            device = self.devices[len(self.blocks) % len(self.devices)]
            self.blocks.append(self._rounded(block).to(device))

    def candidates(self, queries: Singles, count: int) -> tuple[Ints, Floats]:
        """See `FirstPass.candidates`."""
        exact = torch.from_numpy(queries)
        rounded = exact.to(self.dtype)
        scores, positions = best_of_blocks(self.blocks, rounded, count)
        lost = (exact - rounded.float()).norm(dim=1).double()  # [B]
        rounding = self.rounding + shortcut()
        return positions.numpy(), _reach(scores[:, -1], lost, self.lost, rounding)

    def _rounded(self, rows: Tensor) -> Tensor:
        rounded = rows.to(self.dtype)
        for block, kept in zip(rows.split(ROW_BLOCK), rounded.split(ROW_BLOCK), strict=True):
            lost = (block - kept.float()).norm(dim=1)
            self.lost = max(self.lost, float(lost.max()) if len(lost) else 0.0)
        return rounded


class BFloat16FirstPass:
    """Matmul in bfloat16, for processors that have it: half the memory of float32.

    A row among the best `count` lies in one of the `count` groups with the best maxima, so only
    the group maxima are sorted.

    Args:
        rows: [N, D'] float32.
    """

    extra = 44

    def __init__(self, rows: Singles) -> None:
        self.count, self.lost = 0, 0.0
        self.rows = torch.empty(0, rows.shape[1], dtype=torch.bfloat16)
        self.rounding = float32_rounding(rows.shape[1])
        self.add(rows)

    def add(self, rows: Singles) -> None:
        """See `GrowingFirstPass.add`."""
        if not len(rows):
            return
        added = torch.from_numpy(rows)
        rounded = added.bfloat16()
        for block, kept in zip(added.split(ROW_BLOCK), rounded.split(ROW_BLOCK), strict=True):
            self.lost = max(self.lost, float((block - kept.float()).norm(dim=1).max()))
        merged = torch.cat([self.rows[: self.count], rounded])
        self.count, self.rows = len(merged), _padded(merged)

    @torch.autocast("cpu", enabled=False)
    def candidates(self, queries: Singles, count: int) -> tuple[Ints, Floats]:
        """See `FirstPass.candidates`."""
        exact = torch.from_numpy(queries)
        rounded = exact.bfloat16()
        lost = (exact - rounded.float()).norm(dim=1).double()  # [B]
        parts = [self._candidates(block, count) for block in rounded.split(_QUERY_BLOCK)]
        last, positions = zip(*parts, strict=True)
        return torch.cat(positions).numpy(), _reach(torch.cat(last), lost, self.lost, self.rounding)

    def _candidates(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        scores = torch.empty(len(queries), len(self.rows), dtype=torch.bfloat16)  # [B, N]
        for start in range(0, len(self.rows), ROW_BLOCK):
            rows = self.rows[start : start + ROW_BLOCK]
            scores[:, start : start + ROW_BLOCK] = queries @ rows.T
        scores[:, self.count :] = -torch.inf
        groups = scores.view(len(queries), -1, _GROUP).amax(dim=-1).float()  # [B, N / 32]
        best = groups.topk(min(count, groups.shape[1]), dim=1).indices
        members = (best.unsqueeze(-1) * _GROUP + torch.arange(_GROUP)).flatten(1)
        found = scores.gather(1, members).float().topk(count, dim=1)
        # a float32 of what was bfloat16 is bfloat16 again without loss
        return found.values[:, -1].bfloat16(), members.gather(1, found.indices)


def has_fast_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _padded(rows: Tensor) -> Tensor:
    missing = -len(rows) % _GROUP
    return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]) if missing else rows


def _reach(scores: Tensor, lost_queries: Tensor, lost_rows: float, rounding: float) -> Floats:
    """What rows left out can score at most, where both sides were rounded to a shorter dtype.

    Args:
        scores: [B] the last score that was not left out, in the dtype of the product.
        lost_queries: [B] float64, length of what each query lost; it had length 1.
        lost_rows: the largest length of what a row lost; a row has length at most 1.
        rounding: of the float32 sums.
    """
    exact = scores.double()
    own = exact.abs() * _ROUNDING[scores.dtype]
    limit: Floats = (exact + lost_queries + lost_rows * (1 + lost_queries) + own + rounding).numpy()
    return limit
