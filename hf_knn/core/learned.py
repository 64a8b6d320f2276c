"""A learned metric: a linear map that rows and queries go through before they are compared."""

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Doubles = NDArray[np.float64]

LARGEST_WEIGHT = 1e6
_EXACT_BITS, _ROW_BITS = 53, 24
"""Whole numbers that float64 adds without an error, and those of a row."""


class LearnedMap:
    """A linear map A; `z = A (x - mean)`, and then the normalisation scales z to length 1.

    A and each row are rounded to whole numbers whose sums of products float64 holds exactly (at
    1,280 values 18 and 24 bits, of the largest of them). So what a row becomes depends neither on
    the rows beside it nor on threads or library: a row is as near to a query in a batch as alone.

    Args:
        weight: [E, D] finite float32 with E <= D, not all 0, none above 1e6 in size.

    Attributes:
        weight: A, as given.
        sha256: of its shape and values.

    Raises:
        ValueError: for another one, saying what is wrong.
    """

    def __init__(self, weight: Tensor) -> None:
        largest = float(weight.abs().max()) if weight.numel() else 0.0
        is_sound = weight.ndim == 2 and weight.dtype == torch.float32
        if not (is_sound and len(weight) <= weight.shape[1] and 0 < largest <= LARGEST_WEIGHT):
            raise ValueError(
                "Expected a learned map to be [E, D] float32, E <= D, with finite values, not all "
                f"0 and up to {LARGEST_WEIGHT:g}, but got {tuple(weight.shape)} {weight.dtype} up "
                f"to {largest:g}."
            )
        self.weight = weight.detach().cpu().clone(memory_format=torch.contiguous_format)
        values = self.weight.numpy().astype("<f4")
        self.sha256 = hashlib.sha256(repr(values.shape).encode() + values.tobytes()).hexdigest()
        bits = _EXACT_BITS - _ROW_BITS - (self.dim - 1).bit_length()
        self._shift = bits - int(np.frexp(largest)[1])
        self._table = np.rint(np.ldexp(values.T.astype(np.float64), self._shift))  # [D, E]

    def __repr__(self) -> str:
        return f"{self.dim} → {self.width}"

    def __deepcopy__(self, memo: dict[int, object]) -> "LearnedMap":
        return self  # it is never changed

    @property
    def dim(self) -> int:
        """D, the width of what goes in."""
        return self.weight.shape[1]

    @property
    def width(self) -> int:
        """E, the width of what comes out."""
        return len(self.weight)

    def apply(self, rows: Doubles) -> Doubles:
        """[N, D] centred rows to [N, E]; a zero vector stays zero."""
        _, exponents = np.frexp(np.abs(rows).max(axis=1, initial=0.0)[:, None])
        whole = np.rint(np.ldexp(rows, _ROW_BITS - exponents))
        mapped: Doubles = np.ldexp(whole @ self._table, exponents - _ROW_BITS - self._shift)
        return mapped


def width_of(learned: LearnedMap | None, dim: int) -> int:
    """How wide rows of width `dim` are when they are compared."""
    return dim if learned is None else learned.width
