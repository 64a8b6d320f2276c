"""Which test pictures have a near-duplicate among the training pictures."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from catalog.cache import cache_root
from catalog.loaded_task import LoadedTask
from hf_knn.checkup import find_pairs
from hf_knn.data import print_of
from study.cells import write_whole

LARGEST = 20_000
"""Pictures up to which copies are looked for that were resized or recompressed; above it, and in a
stream, equal pixels alone."""


class Twins:
    """Pairs of pictures of a task that are (nearly) the same, found once and kept.

    Args:
        loaded: the task.
        cache_dir: where pairs are kept.
    """

    def __init__(self, loaded: LoadedTask, cache_dir: Path | None) -> None:
        self.loaded = loaded
        self.exact_only = loaded.is_streamed or len(loaded.rows) > LARGEST
        count = "stream" if loaded.is_streamed else f"{len(loaded.rows)} {loaded.rows._fingerprint}"
        key = f"{loaded.entry.location} {loaded.revision} {loaded.entry.config} {count}"
        name = hashlib.sha256(key.encode()).hexdigest()[:20]
        self.path = cache_root(cache_dir) / "twins" / f"{name}.txt"
        self.prints: list[Any] = []

    def see(self, rows: Dataset) -> None:
        """Takes the prints of some pictures of a stream, which go through once."""
        if not self.loaded.is_streamed or self.path.exists():
            return
        self.prints += [print_of(row["image"].convert("RGB")).digest for row in rows]

    def pairs(self) -> NDArray[np.int64]:
        """[P, 2] numbers of pictures in the pool."""
        if self.path.exists():
            return np.array(self.path.read_text().split(), np.int64).reshape(-1, 2)
        if not self.loaded.is_streamed:
            self.prints = [print_of(image.convert("RGB")) for image in self.loaded.rows["image"]]
        if self.exact_only:
            digests = [getattr(one, "digest", one) for one in self.prints]
            found = _equal(digests)
        else:
            pairs = find_pairs(self.prints, None)
            found = np.stack([pairs.first, pairs.second], axis=1)
        lines = "".join(f"{first} {second}\n" for first, second in found.tolist())
        write_whole(self.path, lines.encode())
        return found


def near_duplicates(
    pairs: NDArray[np.int64], train: NDArray[np.int64], test: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """[len(test)] whether each test picture is in a pair with a training picture."""
    both = np.concatenate([pairs, pairs[:, ::-1]])
    return np.isin(test, both[np.isin(both[:, 1], train), 0])


def _equal(digests: list[str]) -> NDArray[np.int64]:
    """All pairs of equal pictures."""
    _, places = np.unique(np.array(digests), return_inverse=True)
    order = np.argsort(places, kind="stable")
    runs = np.split(order, np.flatnonzero(np.diff(places[order])) + 1)
    found = [(int(a), int(b)) for run in runs if len(run) > 1 for a in run for b in run if a < b]
    return np.array(found, np.int64).reshape(-1, 2)
