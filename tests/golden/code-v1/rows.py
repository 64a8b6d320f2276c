"""Checks and casts of what goes into a datastore: features, labels, ids."""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

logger = logging.getLogger(__name__)

Values = Tensor | NDArray | Sequence[int]

_FLOAT16_LIMIT = 6e4
_FLOAT16_COSINE = 0.9999
_BLOCK_ROWS = 65_536


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
    bad = ~rows.float().isfinite().all(dim=1)
    if bad.any():
        raise ValueError(
            f"Expected `{name}` to be finite numbers within float32's range, "
            f"but rows {shown(bad.nonzero().flatten())} are not; drop or repair them."
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


def check_paths(paths: Sequence[str] | None, count: int) -> list[str] | None:
    """Checks that there is one path per row, if there are paths.

    Raises:
        ValueError: with both numbers.
    """
    if paths is not None and len(paths) != count:
        raise ValueError(f"Expected one path per row ({count}), but got {len(paths)}.")
    return None if paths is None else list(paths)


def to_storage(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts features once to the storage dtype; to float32 where float16 would lose too much.

    Args:
        features: [N, D] float32 or float64.
        dtype: the storage dtype so far.
    """
    if dtype == torch.float16 and not _fits_float16(features):
        logger.warning(
            "Some features do not fit float16 (a value above %g, or a row turned by the cast); "
            "the datastore stores float32, twice the size.", _FLOAT16_LIMIT,
        )  # fmt: skip
        dtype = torch.float32
    return features.to(dtype, copy=True)


def _fits_float16(features: Tensor) -> bool:
    for block in features.split(_BLOCK_ROWS):
        if not len(block):
            continue
        if block.abs().max() > _FLOAT16_LIMIT:
            return False
        exact, cast = block.double(), block.half().double()
        products = (exact * cast).sum(1)
        lengths = exact.norm(dim=1) * cast.norm(dim=1)
        if not bool(((products >= _FLOAT16_COSINE * lengths) & _same_zero(exact, cast)).all()):
            return False
    return True


def _same_zero(exact: Tensor, cast: Tensor) -> Tensor:
    return (exact != 0).any(1) == (cast != 0).any(1)


def shown(numbers: Tensor) -> str:
    """The first ten numbers of a list, for a message."""
    listed = ", ".join(str(number) for number in numbers[:10].tolist())
    return f"[{listed}{', …' if len(numbers) > 10 else ''}]"
