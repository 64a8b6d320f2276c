"""Features on disk, by picture: what was computed once is read, whatever dataset it comes in."""

import json
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.manifest import hash_blocks
from ..core.plain_json import parse_json
from ..data.batches import CONTENT_BYTES
from ..data.keys import KEY_BYTES
from .encoders import Encoded

logger = logging.getLogger(__name__)

ABOUT_NAME, KEYS_FOLDER = "about.json", "keys"
SHARD_ROWS = 256
"""Rows per cache file: what a kill can cost, beside the batches under way."""

_UNKNOWN, _GOOD, _BAD = 0, 1, 2
Part = tuple[NDArray[np.int64], Tensor, NDArray[np.uint8], dict[int, str]]
"""What one rank knows: rows [n], their features [n, D], their prints [n, 16], and of bad rows the
reason."""


class Shard(NamedTuple):
    """Some pictures and what became of them.

    Attributes:
        keys: [n, 16] uint8, see `picture_keys`; first those with features, in their order.
        features: [m, D] float32 of the first m keys.
        contents: [m, 16] uint8 likewise, see `content_of`.
        reasons: why each of the other n - m pictures cannot be decoded.
    """

    keys: NDArray[np.uint8]
    features: Tensor
    contents: NDArray[np.uint8]
    reasons: list[str]


class FeatureCache:
    """A folder of shards.

    Args:
        folder: where they lie, made at the first write; None keeps nothing.
        about: what `hf-knn cache` says of it.
    """

    def __init__(self, folder: Path | None, about: dict[str, Any] | None = None) -> None:
        self.folder, self.about = folder, about or {}

    def shards_with(self, wanted: set[bytes]) -> Iterable[Shard]:
        """The shards that hold some of the wanted pictures; a damaged file is removed, and said.

        Args:
            wanted: keys, as bytes.
        """
        if self.folder is None or not self.folder.is_dir():
            return
        found = False
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            shard = self._read(path, wanted)
            if shard is not None:
                found = True
                yield shard
        if found:
            self._say_used()

    def count(self, wanted: set[bytes]) -> int:
        """How many of the wanted pictures are here, by what the files say.

        Args:
            wanted: keys, as bytes.
        """
        found: set[bytes] = set()
        for path in self.folder.glob("shard-*.safetensors") if self.folder is not None else ():
            try:
                with safe_open(path, framework="pt") as file:
                    found.update(wanted.intersection(key_list(file.get_tensor("keys").numpy())))
            except (SafetensorError, FileNotFoundError):  # damaged, or cleared just now
                continue
        return len(found)

    def write(self, shard: Shard) -> None:
        """Adds a shard; a disk that is full or read-only is a warning, and nothing more is kept."""
        if self.folder is None:
            return
        text = bytearray(json.dumps(shard.reasons).encode())
        tensors = {
            "keys": torch.tensor(shard.keys),
            "features": shard.features,
            "contents": torch.tensor(shard.contents),
            "reasons": torch.frombuffer(text, dtype=torch.uint8),
        }
        writer = f"{os.getpid()}.{threading.get_ident()}"
        temporary = self.folder / f".shard.{writer}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary)
            sha256, _ = hash_blocks(temporary)
            temporary.replace(self.folder / f"shard-{sha256[:24]}.safetensors")
            self._say_used()
        except (OSError, SafetensorError) as error:
            logger.warning("Features are not cached, %s cannot be written: %s", self.folder, error)
            self.folder = None
        finally:
            if temporary.exists():
                temporary.unlink()

    def _read(self, path: Path, wanted: set[bytes]) -> Shard | None:
        try:
            with safe_open(path, framework="pt") as file:
                keys = file.get_tensor("keys").numpy()
                if wanted.isdisjoint(key_list(keys)):
                    return None
                sha256, _ = hash_blocks(path)
                if path.stem.removeprefix("shard-") == sha256[:24]:
                    reasons = parse_json(file.get_tensor("reasons").numpy().tobytes(), path.name)
                    contents = file.get_tensor("contents").numpy()
                    return Shard(keys, file.get_tensor("features"), contents, reasons)
        except SafetensorError as error:
            logger.debug("%s: %s", path, error)
        except FileNotFoundError:  # another process cleared it just now
            return None
        logger.warning("Computing %s again: the cached file is damaged.", path.name)
        path.unlink(missing_ok=True)
        return None

    def _say_used(self) -> None:
        """Its time is when the folder was last of use."""
        assert self.folder is not None
        place = self.folder / ABOUT_NAME
        try:
            if place.is_file():
                os.utime(place)
            else:
                place.write_text(json.dumps(self.about, indent=2) + "\n", encoding="utf-8")
        except OSError as error:  # a cache that can only be read is still of use
            logger.debug("%s: %s", place, error)


def key_list(keys: NDArray[np.uint8]) -> list[bytes]:
    """[n, 16] uint8 as a list of bytes, to look up."""
    data = keys.tobytes()
    return [data[start : start + KEY_BYTES] for start in range(0, len(data), KEY_BYTES)]


class FeatureTable:
    """N rows to be filled in; rows that hold the same picture are computed once.

    Args:
        rows: N.
        width: D.
        keys: [N, 16] uint8, see `picture_keys`; None takes each row for another picture and keeps
            nothing.
        cache: where to look, and where to keep what is computed.
    """

    def __init__(
        self, rows: int, width: int, keys: NDArray[np.uint8] | None, cache: FeatureCache
    ) -> None:
        self.features = torch.empty(rows, width)
        self.contents = np.zeros((rows, CONTENT_BYTES), np.uint8)
        self._state = np.zeros(rows, np.uint8)
        self._mine = np.ones(rows, bool)
        self._reasons: dict[int, str] = {}
        self._keys = None if keys is None else key_list(keys)
        self._rows_of: dict[bytes, list[int]] = {}
        for row, key in enumerate(self._keys or []):
            self._rows_of.setdefault(key, []).append(row)
        self._unwritten: list[int] = []
        self._cache = cache

    def share(self, rank: int, ranks: int) -> None:
        """Leaves this rank its share of the rows, in blocks of a shard."""
        self._mine = (np.arange(len(self._state)) // SHARD_ROWS) % ranks == rank

    def take(self, with_bad: bool) -> None:
        """Fills in what was computed before.

        Args:
            with_bad: whether pictures that could not be decoded are known to be bad; else they are
                tried again.
        """
        if self._keys is None:
            return
        wanted = {key for key, is_mine in zip(self._keys, self._mine, strict=True) if is_mine}
        for shard in self._cache.shards_with(wanted):
            places, sources = [], []
            for place, key in enumerate(key_list(shard.keys)):
                rows = [row for row in self._rows_of.get(key, ()) if self._mine[row]]
                if place < len(shard.features):
                    places += rows
                    sources += [place] * len(rows)
                elif with_bad:
                    self._set_bad(rows, shard.reasons[place - len(shard.features)])
            self._set_good(places, shard.features[sources], shard.contents[sources])

    def missing(self) -> list[int]:
        """This rank's rows that are not known, one per picture."""
        rows = np.flatnonzero(self._mine & (self._state == _UNKNOWN)).tolist()
        if self._keys is None:
            return rows
        first = {self._keys[row]: row for row in reversed(rows)}
        return sorted(first.values())

    def put(self, part: Encoded) -> None:
        """Fills in what was just computed, and writes each shard that is full."""
        for place, row in enumerate(part.rows):
            assert part.features is not None
            self._set_good(self._same(row), part.features[place], part.contents[place])
        for bad in part.bad:
            self._set_bad(self._same(bad.row), bad.reason)
        # what is merely not read may be read with other limits, or when an extra is installed
        broken = [bad.row for bad in part.bad if not bad.is_unread]
        self._unwritten += sorted([*part.rows, *broken])
        while len(self._unwritten) >= SHARD_ROWS:
            self._write(SHARD_ROWS)

    def flush(self) -> None:
        """Writes the last shard."""
        if self._unwritten:
            self._write(len(self._unwritten))

    def own(self) -> Part:
        """What this rank knows, for the others."""
        rows = np.flatnonzero(self._mine & (self._state == _GOOD))
        return rows, self.features[rows], self.contents[rows], self._reasons

    def merge(self, parts: Iterable[Part]) -> None:
        """Fills in what the ranks know."""
        for rows, features, contents, reasons in parts:
            self._set_good(rows, features, contents)
            for row, reason in reasons.items():
                self._set_bad([row], reason)

    def good(self) -> Tensor:
        """[n] int64: the rows with features, ascending."""
        return torch.from_numpy(np.flatnonzero(self._state == _GOOD))

    def bad(self) -> list[tuple[int, str]]:
        """The rows without, and why, ascending."""
        return sorted(self._reasons.items())

    def _same(self, row: int) -> list[int]:
        if self._keys is None:
            return [row]
        return [other for other in self._rows_of[self._keys[row]] if self._mine[other]]

    def _set_good(
        self, rows: Sequence[int] | NDArray[np.int64], features: Tensor,
        contents: NDArray[np.uint8],
    ) -> None:  # fmt: skip
        self.features[rows] = features
        self.contents[rows] = contents
        self._state[rows] = _GOOD

    def _set_bad(self, rows: Iterable[int], reason: str) -> None:
        for row in rows:
            self._state[row] = _BAD
            self._reasons[row] = reason

    def _write(self, count: int) -> None:
        """The oldest rows that are in no file yet, as one shard."""
        rows, self._unwritten = self._unwritten[:count], self._unwritten[count:]
        if self._keys is None:
            return
        good = [row for row in rows if self._state[row] == _GOOD]
        bad = [row for row in rows if self._state[row] == _BAD]
        keys = b"".join(self._keys[row] for row in good + bad)
        shard = np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES)
        reasons = [self._reasons[row] for row in bad]
        self._cache.write(Shard(shard, self.features[good], self.contents[good], reasons))
