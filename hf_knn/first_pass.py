"""First passes of a search: fast proposals of candidates, by inner product of float32 rows.

Exact ones say how good a row that they left out can be at most, so that the caller can tell whether
it could still belong to the answer. Approximate ones (in `faiss_index.py`) promise nothing.
"""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Singles = NDArray[np.float32]

Limits = NDArray[np.float64]

_FLOAT32_ROUNDING = 2.0**-24
_BFLOAT16_ROUNDING = 2.0**-8
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


def limits(last_scores: Singles, rounding: float) -> Limits:
    """What rows left out can score at most, from the last score that was not left out."""
    return last_scores.astype(np.float64) + rounding


class TorchFirstPass:
    """Blocked matmul and top-k in plain torch; needs no faiss.

    Args:
        rows: [N, D'] float32.
    """

    extra = 12

    def __init__(self, rows: Singles) -> None:
        self.rows = torch.from_numpy(rows)
        self.rounding = float32_rounding(rows.shape[1])

    def add(self, rows: Singles) -> None:
        """See `FirstPass.add`."""
        self.rows = torch.cat([self.rows, torch.from_numpy(rows)])

    @torch.autocast("cpu", enabled=False)
    def candidates(self, queries: Singles, count: int) -> tuple[Ints, Limits]:
        """See `FirstPass.candidates`."""
        wanted = torch.from_numpy(queries)
        scores, positions = [], []
        for start in range(0, len(self.rows), _ROW_BLOCK):
            block = wanted @ self.rows[start : start + _ROW_BLOCK].T  # [B, block]
            best = block.topk(min(count, block.shape[1]), dim=1)
            scores.append(best.values)
            positions.append(best.indices + start)
        merged = torch.cat(scores, dim=1).topk(count, dim=1)
        found = torch.cat(positions, dim=1).gather(1, merged.indices)
        return found.numpy(), limits(merged.values[:, -1].numpy(), self.rounding)


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
        scores = torch.cat(last).double()
        # both sides were rounded, and so was the score itself; a row may have length 1
        reach = lost + self.lost * (1 + lost) + scores.abs() * _BFLOAT16_ROUNDING + self.rounding
        return torch.cat(positions).numpy(), (scores + reach).numpy()

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
        return found.values[:, -1], members.gather(1, found.indices)


def has_fast_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _padded(rows: Tensor) -> Tensor:
    missing = -len(rows) % _GROUP
    return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]) if missing else rows
