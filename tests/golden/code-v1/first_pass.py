"""First passes of a search: fast proposals of candidates, by inner product of float32 rows.

Exact ones say how good a row that they left out can be at most, so that the caller can tell whether
it could still belong to the answer. Approximate ones (in `faiss_index.py`) promise nothing.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Singles = NDArray[np.float32]

Limits = NDArray[np.float64]

_FLOAT32_ROUNDING = 2.0**-24
_ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""How far a score may be off, as a part of it, by being stored in a dtype."""

_FLOAT16_SUMS = 2.0**-8
"""What a device may lose by adding up parts of a float16 product in float16."""

_SHORTCUTS = {"highest": 0.0, "high": 2.0**-9, "medium": 2.0**-6}
"""What `torch.set_float32_matmul_precision` lets a float32 product of unit vectors be off."""
_ROW_BLOCK = 65_536
_QUERY_BLOCK = 256
_GROUP = 32


class FirstPass(Protocol):
    """A search by inner product over rows that all have length at most 1.

    Attributes:
        extra: how many candidates beyond k are usually enough.
    """

    extra: int

    def add(self, rows: Singles) -> None:
        """Appends rows [M, D'] float32."""
        ...

    def candidates(self, queries: Singles, count: int) -> tuple[Ints, Limits]:
        """The best rows per query.

        Args:
            queries: [B, D'] float32 of length 1.
            count: how many, at most the number of rows.

        Returns:
            Row positions [B, count] int64 (-1 where an approximate pass found fewer), and [B]
            float64: no row that was left out has an exact inner product above that; -inf where
            nothing is promised.
        """
        ...


def float32_rounding(width: int) -> float:
    """How far an inner product of float32 vectors of length 1 may be off, whatever the order."""
    return 4 * (width + 4) * _FLOAT32_ROUNDING


def reach(scores: Tensor, lost_queries: Tensor, lost_rows: float, rounding: float) -> Limits:
    """What rows left out can score at most, where both sides were rounded to a shorter dtype.

    Args:
        scores: [B] the last score that was not left out, in the dtype of the product.
        lost_queries: [B] float64, length of what each query lost; it had length 1.
        lost_rows: the largest length of what a row lost; a row has length at most 1.
        rounding: of the float32 sums.
    """
    exact = scores.double()
    own = exact.abs() * _ROUNDING[scores.dtype]
    limit: Limits = (exact + lost_queries + lost_rows * (1 + lost_queries) + own + rounding).numpy()
    return limit


def limits(last_scores: Singles, rounding: float) -> Limits:
    """What rows left out can score at most, from the last score that was not left out."""
    return last_scores.astype(np.float64) + rounding


class TorchFirstPass:
    """Blocked matmul and top-k in plain torch; needs no faiss.

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
        """See `FirstPass.add`."""
        added = torch.from_numpy(rows)
        if self.blocks and len(self.blocks[-1]) < _ROW_BLOCK:
            last = self.blocks[-1]
            fitting = added[: _ROW_BLOCK - len(last)]
            self.blocks[-1] = torch.cat([last, self._rounded(fitting).to(last.device)])
            added = added[len(fitting) :]
        for block in added.split(_ROW_BLOCK) if len(added) else ():
            device = self.devices[len(self.blocks) % len(self.devices)]
            self.blocks.append(self._rounded(block).to(device))

    def candidates(self, queries: Singles, count: int) -> tuple[Ints, Limits]:
        """See `FirstPass.candidates`."""
        exact = torch.from_numpy(queries)
        rounded = exact.to(self.dtype)
        scores, positions, start = [], [], 0
        for block in self.blocks:  # nothing waits for a device before all of them are at work
            with torch.autocast(block.device.type, enabled=False):
                products = rounded.to(block.device) @ block.T  # [B, block]
            best = products.topk(min(count, len(block)), dim=1)
            scores.append(best.values)
            positions.append(best.indices + start)
            start += len(block)
        merged = torch.cat([values.cpu() for values in scores], dim=1).topk(count, dim=1)
        found = torch.cat([rows.cpu() for rows in positions], dim=1).gather(1, merged.indices)
        lost = (exact - rounded.float()).norm(dim=1).double()  # [B]
        rounding = self.rounding + _SHORTCUTS[torch.get_float32_matmul_precision()]
        return found.numpy(), reach(merged.values[:, -1], lost, self.lost, rounding)

    def _rounded(self, rows: Tensor) -> Tensor:
        rounded = rows.to(self.dtype)
        for block, kept in zip(rows.split(_ROW_BLOCK), rounded.split(_ROW_BLOCK), strict=True):
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
        """See `FirstPass.add`."""
        if not len(rows):
            return
        added = torch.from_numpy(rows)
        rounded = added.bfloat16()
        for block, kept in zip(added.split(_ROW_BLOCK), rounded.split(_ROW_BLOCK), strict=True):
            self.lost = max(self.lost, float((block - kept.float()).norm(dim=1).max()))
        merged = torch.cat([self.rows[: self.count], rounded])
        self.count, self.rows = len(merged), _padded(merged)

    @torch.autocast("cpu", enabled=False)
    def candidates(self, queries: Singles, count: int) -> tuple[Ints, Limits]:
        """See `FirstPass.candidates`."""
        exact = torch.from_numpy(queries)
        rounded = exact.bfloat16()
        lost = (exact - rounded.float()).norm(dim=1).double()  # [B]
        parts = [self._candidates(block, count) for block in rounded.split(_QUERY_BLOCK)]
        last, positions = zip(*parts, strict=True)
        return torch.cat(positions).numpy(), reach(torch.cat(last), lost, self.lost, self.rounding)

    def _candidates(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        scores = torch.empty(len(queries), len(self.rows), dtype=torch.bfloat16)  # [B, N]
        for start in range(0, len(self.rows), _ROW_BLOCK):
            rows = self.rows[start : start + _ROW_BLOCK]
            scores[:, start : start + _ROW_BLOCK] = queries @ rows.T
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
