"""A fingerprint of rows that does not depend on their order and follows every change of them."""

import hashlib
import json
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .first_pass import Ints

_MODULUS = 2**256


class StoredRows(NamedTuple):
    """Rows as they are stored.

    Attributes:
        ids: [N] int64, unique.
        labels: [N] int64.
        features: [N, D] float16 or float32.
        paths: N strings; empty where unknown.
        splits: N strings; empty where unknown.
    """

    ids: Ints
    labels: Ints
    features: NDArray
    paths: list[str]
    splits: list[str]

    def part(self, rows: slice) -> "StoredRows":
        """Some of them, by position."""
        ids, labels, features, paths, splits = self
        return StoredRows(ids[rows], labels[rows], features[rows], paths[rows], splits[rows])


def sum_of(rows: StoredRows) -> int:
    """The sum of the rows' hashes: add what of new rows, subtract that of removed ones.

    It finds accidents: a row lost, doubled or changed. It does not stop somebody who looks for
    other rows with the same sum.

    Args:
        rows: in any order.

    Returns:
        In [0, 2 ** 256).
    """
    total = 0
    values = np.ascontiguousarray(rows.features)
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    for i, (row_id, label) in enumerate(zip(rows.ids.tolist(), rows.labels.tolist(), strict=True)):
        facts = json.dumps([row_id, label, rows.splits[i], rows.paths[i]]).encode()
        digest = hashlib.sha256(len(facts).to_bytes(8, "little") + facts + little[i].tobytes())
        total += int.from_bytes(digest.digest(), "little")
    return total % _MODULUS


def combine(total: int, count: int, mean: Tensor, *facts: str) -> str:
    """The fingerprint of a datastore.

    Args:
        total: the sum of its rows, taken modulo 2 ** 256.
        count: how many rows.
        mean: [D] float32.
        facts: metric, normalisation and whatever else must agree.

    Returns:
        64 hexadecimal digits.
    """
    parts = [f"{total % _MODULUS:064x}", str(count), *facts]
    parts.append(hashlib.sha256(mean.numpy().astype("<f4").tobytes()).hexdigest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
