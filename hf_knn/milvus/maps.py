"""A learned map in the record of a collection: in pieces, since a text of Milvus has an end."""

import base64
from typing import Any

import numpy as np
import torch

from ..core.learned import LearnedMap
from ..core.manifest import DatastoreError
from .about import ABOUT_FIELDS, VECTOR, About
from .collection import MilvusCollection

_VALUES = 12_000
"""Of float32, whose base64 is short enough for one field."""


def write_map(collection: MilvusCollection, learned: LearnedMap) -> None:
    """Writes a map, before the record that names it; can be repeated.

    Args:
        collection: whose record has its own collection already.
        learned: the map.
    """
    values = learned.weight.numpy().astype("<f4").reshape(-1)
    pieces = [values[start : start + _VALUES] for start in range(0, len(values), _VALUES)]
    rows: list[dict[str, Any]] = [
        {
            "key": _key(number), "facts": "{}", VECTOR: [0.0, 0.0],
            "mean": base64.b64encode(piece.tobytes()).decode(),
        }
        for number, piece in enumerate(pieces)
    ]  # fmt: skip
    for row in rows:
        collection.server.call("upsert", collection.about_name, [row])
    collection.known_map = learned


def map_of(collection: MilvusCollection, about: About) -> LearnedMap | None:
    """The map that a record names, read once; None if it names none.

    Args:
        collection: where it lies.
        about: the record.

    Raises:
        DatastoreError: if it is not there, or not the one that is named.
    """
    if not about.learned_map:
        return None
    known = collection.known_map
    if known is None or known.sha256 != about.learned_map:
        known = collection.known_map = _read(collection, about)
    return known


def _read(collection: MilvusCollection, about: About) -> LearnedMap:
    count = -(-about.map_width * about.dim // _VALUES)
    keys = [_key(number) for number in range(count)]
    found = collection.server.call(
        "get", collection.about_name, ids=keys, output_fields=ABOUT_FIELDS
    )
    by_key = {row["key"]: row["mean"] for row in found}
    try:
        data = b"".join(base64.b64decode(by_key[key], validate=True) for key in keys)
        values = np.frombuffer(data, "<f4").astype(np.float32)
        learned = LearnedMap(torch.from_numpy(values.reshape(about.map_width, about.dim)))
    except (KeyError, ValueError, TypeError) as error:
        raise DatastoreError(
            f"Expected {collection} to hold the learned map of its rows, but: {error!r}; drop it "
            "and load again."
        ) from None
    if learned.sha256 != about.learned_map:
        raise DatastoreError(
            f"Expected {collection} to hold a learned map with sha256 {about.learned_map[:12]}…, "
            f"but it holds {learned.sha256[:12]}…; drop it and load again."
        )
    return learned


def _key(number: int) -> str:
    return f"map {number}"
