"""A name for the content of each picture of a dataset, so that a picture is encoded only once."""

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .reading import IMAGE

logger = logging.getLogger(__name__)

KEY_BYTES = 16

_NOTHING = b"no picture"


def picture_keys(rows: Any, memo: Path | None = None) -> NDArray[np.uint8]:
    """[N, 16] uint8: equal for rows that hold the same picture.

    A picture held in memory is named by its bytes, one in a file by its place, size and time, which
    costs no reading.

    Args:
        rows: a prepared dataset.
        memo: a folder where names of bytes are remembered by the dataset's own fingerprint, so that
            a second run reads none of them; None remembers nothing.
    """
    chunks = rows.data.column(IMAGE).chunks  # not combined: that would copy every picture
    # a file may be replaced, the bytes that a dataset holds may not
    in_memory = not any(chunk.field("bytes").null_count for chunk in chunks)
    place = None
    if memo is not None and in_memory and getattr(rows, "_fingerprint", None):
        place = memo / f"{hashlib.sha256(rows._fingerprint.encode()).hexdigest()[:24]}.npy"
        known = _recall(place)
        if known is not None and known.shape == (len(rows), KEY_BYTES):
            return known
    keys = np.frombuffer(b"".join(_keys_of(chunks)), np.uint8).reshape(-1, KEY_BYTES)
    if rows._indices is not None:
        keys = keys[rows._indices.column(0).to_numpy()]
    if place is not None:
        _remember(place, keys)
    return keys


def _keys_of(chunks: list[Any]) -> Iterator[bytes]:
    for chunk in chunks:
        for data, path in zip(chunk.field("bytes"), chunk.field("path"), strict=True):
            if data.is_valid:
                name = hashlib.sha256(data.as_buffer())
            else:
                name = hashlib.sha256(_name_of_file(path.as_py()))
            yield name.digest()[:KEY_BYTES]


def _name_of_file(path: str | None) -> bytes:
    if path is None:
        return _NOTHING
    if not os.path.isfile(path):
        return f"no file {path}".encode()
    status = os.stat(path)
    return f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}".encode()


def _recall(place: Path) -> NDArray[np.uint8] | None:
    """What was remembered; None if nothing was, or it is damaged."""
    try:
        known = np.load(place, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    is_whole = isinstance(known, np.ndarray) and known.dtype == np.uint8
    return known if is_whole else None


def _remember(place: Path, keys: NDArray[np.uint8]) -> None:
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.save(file, keys, allow_pickle=False)
        temporary.replace(place)
    except OSError as error:  # what is not remembered is computed again
        logger.debug("%s: %s", place, error)
        if temporary.exists():
            temporary.unlink()
