"""Rows in one or more arrays, and the checks of what goes into them: features, labels, ids."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Values = Tensor | NDArray | Sequence[int]

_AT_ONCE = 8192  # rows that stay in the processor's cache


def as_features(values: Tensor | NDArray, name: str, dim: int | None = None) -> Tensor:
    """Brings features of any float dtype, device and layout to the CPU.

    Args:
        values: [N, D].
        name: of the argument, for the message.
        dim: the width they must have, if it is fixed.

    Returns:
        [N, D] finite, contiguous float32 (float64 for float64).

    Raises:
        ValueError: for another shape, width or kind of numbers, NaN or infinities.
    """
    rows = values.detach().cpu() if isinstance(values, Tensor) else _as_tensor(values, name)
    if rows.ndim != 2 or rows.shape[1] == 0 or not rows.dtype.is_floating_point:
        raise ValueError(
            f"Expected `{name}` to be [N, D] of a float dtype with D >= 1, "
            f"but got shape {tuple(rows.shape)} {rows.dtype}."
        )
    if dim is not None and rows.shape[1] != dim:
        raise ValueError(
            f"Expected `{name}` to have width {dim} as the datastore has, but got {rows.shape[1]}."
        )
    rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    refuse_non_finite(rows, name)
    return rows.contiguous()


def _as_tensor(values: NDArray, name: str) -> Tensor:
    """An array of any float kind, byte order and layout."""
    array = np.asarray(values)
    if array.dtype.kind != "f":
        raise ValueError(
            f"Expected `{name}` to be [N, D] of a float dtype with D >= 1, "
            f"but got shape {array.shape} {array.dtype}."
        )
    kind = array.dtype if array.dtype.itemsize <= 8 else np.dtype(np.float64)
    # torch knows one byte order and no negative strides; numpy's own check skips rows of one
    is_turned = any(stride < 0 for stride in array.strides)
    native = array.astype(kind.newbyteorder("="), order="C", copy=is_turned)
    return torch.from_numpy(np.ascontiguousarray(native))


def refuse_non_finite(rows: Tensor, name: str) -> None:
    """Refuses NaN, infinities and what float32 cannot hold.

    Args:
        rows: [N, D] of any float dtype.
        name: of the argument, for the message.

    Raises:
        ValueError: with the row numbers.
    """
    parts = rows.split(_AT_ONCE)
    bad = ~np.concatenate([np.isfinite(part.float().numpy()).all(axis=1) for part in parts])
    if bad.any():
        raise ValueError(
            f"Expected `{name}` to be finite numbers within float32's range, "
            f"but rows {shown(bad.nonzero()[0])} are not; drop or repair them."
        )


def as_whole_numbers(values: Values, name: str, lowest: int = 0) -> Tensor:
    """Brings labels or ids of any integer dtype to the CPU.

    Args:
        values: [N] whole numbers; copied.
        name: of the argument, for the message.
        lowest: the smallest value allowed.

    Returns:
        [N] int64.

    Raises:
        ValueError: for floats, booleans, another shape or values below `lowest`.
    """
    if isinstance(values, Tensor) and (values.is_floating_point() or values.is_complex()):
        raise ValueError(f"Expected `{name}` to be whole numbers, but got {values.dtype}.")
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.size == 0:
        return torch.empty(0, dtype=torch.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"Expected `{name}` to be a list of whole numbers, "
            f"but got shape {array.shape} {array.dtype}."
        )
    numbers = torch.from_numpy(array.astype(np.int64))  # a copy: the caller may change theirs
    if int(numbers.min()) < lowest:
        raise ValueError(f"Expected `{name}` to be >= {lowest}, but got {int(numbers.min())}.")
    return numbers


def check_row_numbers(labels: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Checks that there is one label and one id per row and no id twice.

    Args:
        labels: [count] whole numbers >= 0.
        ids: [count] unique whole numbers >= 0.
        count: the number of rows.

    Raises:
        ValueError: with the numbers that disagree.
    """
    labels, ids = as_whole_numbers(labels, "labels"), as_whole_numbers(ids, "ids")
    if not len(labels) == len(ids) == count:
        raise ValueError(
            f"Expected one label and one id per row ({count}), "
            f"but got {len(labels)} labels and {len(ids)} ids."
        )
    values, counts = ids.unique(return_counts=True)
    if len(values) != count:
        raise ValueError(f"Expected unique `ids`, but got some twice: {shown(values[counts > 1])}.")
    return labels, ids


def shown(numbers: Tensor | NDArray) -> str:
    """The first ten numbers of a list, for a message."""
    listed = ", ".join(str(number) for number in numbers[:10].tolist())
    return f"[{listed}{', …' if len(numbers) > 10 else ''}]"


class RowParts:
    """[N, D] features in one or more arrays, such as the mapped files of a large datastore.

    Indexed like one array, so that nobody has to join what would not fit into memory. A value: a
    change makes another one.

    Args:
        parts: tensors [n, D] of one dtype, at least one.

    Attributes:
        parts: those that have rows, or one without.
        shape: (N, D).
        dtype: of every part.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        filled = [part.contiguous() for part in parts if len(part)]
        self.parts = filled or [parts[0]]
        self._ends = np.cumsum([len(part) for part in self.parts])
        self.shape = (int(self._ends[-1]), self.parts[0].shape[1])
        self.dtype = self.parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray:
        """Rows by slice (without a copy inside one part) or by positions, in their order."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step != 1:
                raise ValueError(f"Expected a slice of step 1, but got {step}.")
            return self._between(start, stop)
        if len(self.parts) == 1:
            return self.parts[0].numpy()[rows]
        taken = np.empty((len(rows), self.shape[1]), self.parts[0].numpy().dtype)
        owner = np.searchsorted(self._ends, rows, side="right")
        for number, part in enumerate(self.parts):
            mine = owner == number
            taken[mine] = part.numpy()[rows[mine] - (self._ends[number] - len(part))]
        return taken

    def joined(self) -> Tensor:
        """[N, D] all rows as one tensor; a copy if there are several parts."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)

    def _between(self, start: int, stop: int) -> NDArray:
        pieces, begin = [], 0
        for part, end in zip(self.parts, self._ends.tolist(), strict=True):
            if start < end and stop > begin:
                pieces.append(part.numpy()[max(0, start - begin) : stop - begin])
            begin = end
        if not pieces:
            return self.parts[0].numpy()[:0]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
