"""What tells pictures apart: a key of their content for the cache, a print for copies."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..store.folders import written_whole
from .batches import IMAGE, cell_source, content_of
from .decode import BadImageError, decoding

logger = logging.getLogger(__name__)

KEY_BYTES = 16
SIDE = 48
"""Side of the tiny copies that pictures are compared by, in pixels."""

_BATCH = 64
_NOTHING = b"no picture"


def picture_keys(rows: Any, memo: Path | None = None) -> NDArray[np.uint8]:
    """[N, 16] uint8: equal for rows that hold the same picture.

    A picture held in memory is named by its bytes, one in a file as `name_of_file` says, which
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
            content = data.as_buffer() if data.is_valid else name_of_file(path.as_py())
            yield hashlib.sha256(content).digest()[:KEY_BYTES]


def name_of_file(path: str | None) -> bytes:
    """What a file is told by without reading it: another one, or another content, has another name.

    Size and time of the last change of the content can be kept by whoever puts another picture in
    place; the number of the file, or else the time of its last change of any kind, cannot. What was
    not changed may get another name (it was copied, moved or given other rights); a content that
    is read while it is replaced never gets the name of the next one.

    Args:
        path: of the file; None for a picture that is not there.
    """
    if path is None:
        return _NOTHING
    if not os.path.isfile(path):
        return f"no file {path}".encode()
    now = os.stat(path)
    facts = (now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino)
    return " ".join([os.path.abspath(path), *map(str, facts)]).encode()


def _recall(place: Path) -> NDArray[np.uint8] | None:
    """What was remembered; None if nothing was, or it is damaged."""
    try:
        known = np.load(place, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    is_whole = isinstance(known, np.ndarray) and known.dtype == np.uint8
    return known if is_whole else None


def _remember(place: Path, keys: NDArray[np.uint8]) -> None:
    try:
        with written_whole(place) as temporary, temporary.open("wb") as file:
            np.save(file, keys, allow_pickle=False)
    except OSError as error:  # what is not remembered is computed again
        logger.debug("%s: %s", place, error)


def hash_of_pictures(splits: Mapping[str, Any]) -> str:
    """A hash of what labelled pictures hold, whatever they are called and wherever they lie.

    Every byte is read once, also of files, so that one that was replaced is seen.

    Args:
        splits: prepared datasets, see `hf_knn.data.loading.load_splits`.

    Returns:
        64 hexadecimal digits; equal for the same pictures with the same labels.
    """
    found: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for rows in splits.values():
            names = [*rows.features["label"].names, ""]  # the last one for a missing label
            labels = (names[-1 if label is None else label] for label in rows["label"])
            contents = rows.select_columns([IMAGE]).with_format("arrow")
            for batch in contents.iter(_BATCH):
                column = batch.column(IMAGE).combine_chunks()
                hashes = threads.map(_hash_of_content, column.field("bytes"), column.field("path"))
                found += [f"{content} {next(labels)}" for content in hashes]
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()


def _hash_of_content(data: Any, path: Any) -> str:
    if data.is_valid:
        return hashlib.sha256(data.as_buffer()).hexdigest()
    if not path.is_valid or not os.path.isfile(path.as_py()):
        return name_of_file(path.as_py()).hex()
    with open(path.as_py(), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Print(NamedTuple):
    """What is kept of one picture.

    Attributes:
        digest: see `content_of`, in hexadecimal digits: equal for files saved again without loss.
        tiny: [SIDE, SIDE, 3] uint8, the picture squeezed into a square.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
    """

    digest: str
    tiny: NDArray[np.uint8]
    width: int
    height: int


class Broken(NamedTuple):
    """A picture that cannot be decoded.

    Attributes:
        reason: why.
        is_unread: whether it may be whole, of a format or size that is not read.
    """

    reason: str
    is_unread: bool


def print_of(image: Image.Image) -> Print:
    """The print of a decoded RGB picture."""
    tiny = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return Print(content_of(image).hex(), np.asarray(tiny), image.width, image.height)


def prints_of(
    dataset: Any, on_progress: Callable[[int], object] = lambda done: None
) -> list[Print | Broken]:
    """The prints of all pictures of a prepared dataset, in row order, several threads at once.

    Args:
        dataset: see `hf_knn.data.loading.prepare`.
        on_progress: called with how many pictures more are done.
    """
    found: list[Print | Broken] = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for start in range(0, len(dataset), _BATCH):
            rows = range(start, min(start + _BATCH, len(dataset)))
            found += threads.map(partial(_print_row, dataset), rows)
            on_progress(len(rows))
    return found


def _print_row(dataset: Any, row: int) -> Print | Broken:
    try:
        with decoding(cell_source(dataset[row][IMAGE])) as image:
            return print_of(image)
    except (BadImageError, OSError) as error:
        return Broken(str(error), getattr(error, "is_unread", False))
