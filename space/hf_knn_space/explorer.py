"""What the published rows look like as a whole: a map, classes, likely errors, copies."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_knn import Datastore, KnnForImageClassification
from hf_knn.checkup import inspect_datastore, map_svg, place_features

from .service import Near

MAX_ROWS = 5_000
"""Rows that are looked through; of more, so many are drawn at random."""

MAX_TILES = 48
_ERROR = "label_error"
_COPIES = ("exact_duplicate", "near_duplicate", "label_conflict")


class Doubt(NamedTuple):
    """A row whose label may be wrong.

    Attributes:
        row: of the datastore.
        suggested: the label that both voices give it.
    """

    row: Near
    suggested: str


class Exploration(NamedTuple):
    """What was found.

    Attributes:
        svg: the map; empty for fewer than four rows.
        doubts: the surest first.
        copies: groups of rows that show the same.
        looked_at: how many rows were looked through.
    """

    svg: str
    doubts: list[Doubt]
    copies: list[list[Near]]
    looked_at: int


class Explorer:
    """Looks through the published rows once, when somebody asks.

    Args:
        model: the published model.
        seed: of folds, samples and the map.
    """

    def __init__(self, model: KnnForImageClassification, seed: int = 0) -> None:
        store = model.datastore
        self._store = store if isinstance(store, Datastore) else None  # rows of its own
        self._names: list[str] = model.config.class_names
        self._seed = seed
        self._lock = threading.Lock()
        self._found: Exploration | None = None

    def look(self) -> Exploration | None:
        """Everything; None if the model holds no rows of its own."""
        if not self._store:
            return None
        with self._lock:  # two visitors wait for one look
            if self._found is None:
                self._found = self._look_through(self._store)
            return self._found

    def classes(self) -> list[tuple[str, int]]:
        """The classes that have rows and how many, the largest first."""
        if self._store is None:
            return []
        counts = np.bincount(self._store.labels.numpy(), minlength=len(self._names))
        order = np.argsort(-counts, kind="stable")
        return [(self._names[label], int(counts[label])) for label in order if counts[label]]

    def rows_of(self, name: str) -> list[Near]:
        """The first rows of a class, in the order of the datastore.

        Args:
            name: of the class; an unknown one has no rows.
        """
        if self._store is None or name not in self._names:
            return []
        store, label = self._store, self._names.index(name)
        chosen = (store.labels == label).nonzero().flatten()
        return [self._stored(store, row) for row in chosen[:MAX_TILES].tolist()]

    def _look_through(self, store: Datastore) -> Exploration:
        if len(store) > MAX_ROWS:
            chosen = np.random.default_rng(self._seed).choice(len(store), MAX_ROWS, replace=False)
            store = store.subset(store.ids[np.sort(chosen)])
        checkup = inspect_datastore(store, self._names, seed=self._seed, with_curve=False)
        ids = store.ids.numpy()
        kinds: dict[str, list[Any]] = {}
        for finding in sorted(checkup.findings, key=lambda one: -one.score):
            kinds.setdefault(str(finding.kind), []).append(finding)
        doubts = [
            Doubt(self._stored(store, one.picture), self._names[one.suggested])
            for one in kinds.get(_ERROR, [])[:MAX_TILES]
        ]
        groups = _grouped(one for kind in _COPIES for one in kinds.get(kind, []))
        copies = [[self._stored(store, row) for row in group] for group in groups[:MAX_TILES]]
        marked = {one.picture for some in kinds.values() for one in some}
        return Exploration(self._map(checkup, ids, marked), doubts, copies, len(store))

    def _map(self, checkup: Any, ids: NDArray[np.int64], marked: set[int]) -> str:
        if len(checkup.features) < 4:
            return ""
        rows, places = place_features(checkup.features, self._seed)
        rings = np.array([row in marked for row in rows.tolist()], bool)
        labels = checkup.pictures.labels[rows]
        return map_svg(places, labels, self._names, rings, ids[rows])

    def _stored(self, store: Datastore, row: int) -> Near:
        return Near(int(store.ids[row]), self._names[int(store.labels[row])], None, None)


def _grouped(findings: Iterator[Any]) -> Sequence[list[int]]:
    """Rows that are copies of one another, each group once."""
    groups: list[list[int]] = []
    place: dict[int, int] = {}
    for finding in findings:
        members = [finding.picture, *finding.others]
        known = next((place[row] for row in members if row in place), None)
        if known is None:
            known = len(groups)
            groups.append([])
        for row in members:
            if row not in place:
                place[row] = known
                groups[known].append(row)
    return groups
