"""What is kept in step with a datastore while rows come and go: all of it changes, or nothing."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .class_names import name_classes
from .datastore import Datastore
from .milvus_store import MilvusDatastore
from .ridge_head import center_head, follows_rows, solve_head, sum_rows
from .row_fingerprint import combine

_KEPT = (
    "measured", "forgotten", "forgotten_mean", "forgotten_thumbnails", "forgotten_picture",
    "thumbnails", "neighbor_picture",
)  # fmt: skip


class Follower:
    """What is kept in step with a datastore while rows come and go: its hash, and a ridge head.

    Attributes:
        total: sum of the rows' hashes.
        ridge: sums behind the head; None if it does not follow.
    """

    def __init__(self, model: Any) -> None:
        self.total = model.datastore.hash_sum()
        self.ridge = sum_rows(model) if follows_rows(model.config) else None
        self._seen = _marks(model.datastore)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # pickles of a model count again when they need to

    def __deepcopy__(self, memo: dict[int, Any]) -> "Follower":
        copied = object.__new__(Follower)
        copied.total, copied.ridge = self.total, self.ridge and self.ridge.copy()
        store, *rows = self._seen  # the copy of a datastore shares its rows until it changes
        copied._seen = (copy.deepcopy(store, memo), *rows)
        return copied

    def is_of(self, model: Any) -> bool:
        """Whether datastore and head are the ones this was made from."""
        same = all(a is b for a, b in zip(self._seen, _marks(model.datastore), strict=True))
        return same and (self.ridge is not None) == follows_rows(model.config)

    def fingerprint(self, store: Any) -> str:
        """Of all rows and the mean, whatever the order of the rows."""
        return combine(self.total, len(store), store.mean, store.metric, store.normalization)

    def follow(self, model: Any) -> None:
        """Says that everything was changed alike; a ridge head is solved again."""
        self._seen = _marks(model.datastore)
        if self.ridge is not None:
            model.head.classifier = solve_head(self.ridge, model.config, model.head)
            model.config.num_head_labels = self.ridge.num_labels


def rows_of(model: Any) -> Datastore | MilvusDatastore:
    """The datastore of a model, to be changed.

    Args:
        model: a `KnnForImageClassification`.

    Raises:
        ValueError: without one.
    """
    store: Datastore | MilvusDatastore | None = model.datastore
    if store is None:
        raise ValueError(
            "Expected a model with a datastore to change, but it has none; train it first."
        )
    return store


def follower_of(model: Any) -> Follower:
    """What follows a model's datastore; rows that were changed behind its back are counted again.

    Args:
        model: a `KnnForImageClassification` with a datastore.
    """
    if model.follower is None or not model.follower.is_of(model):
        model.follower = Follower(model)
    return model.follower


def _marks(store: Any) -> tuple[Any, ...]:
    """The datastore, and objects that are replaced when rows, labels or mean change."""
    return store, *store.marks


@contextmanager
def whole_change(model: Any) -> Iterator[None]:
    """What fails in the middle leaves rows, mean, head, names and receipts as they were.

    Args:
        model: a `KnnForImageClassification`.

    Raises:
        ValueError: see `rows_of`.
        DatastoreConnectionError: if rows in Milvus changed and the server then went away.
    """
    store: Any = rows_of(model)
    head, config, marks = model.head, model.config, store.marks
    rows, names, changes = copy.copy(store), config.class_names, list(model.changes)
    counts = config.num_head_labels, config.num_tuned_labels
    classifier, mean, scale = head.classifier, head.mean.clone(), head.scale.clone()
    kept = {name: getattr(model, name) for name in _KEPT}
    try:
        yield
    except BaseException:
        head.classifier = classifier
        head.mean.copy_(mean)
        head.scale.copy_(scale)
        name_classes(config, names)
        config.num_head_labels, config.num_tuned_labels = counts
        model.changes[:] = changes
        for name, value in kept.items():
            setattr(model, name, value)
        if any(one is not other for one, other in zip(store.marks, marks, strict=True)):
            model.follower = None
            store.restore(rows)
        raise


def recenter_rows(model: Any, follower: Follower, mean: Tensor | None = None) -> None:
    """Moves the mean, with which all that a ridge head has summed up changes.

    Args:
        model: a `KnnForImageClassification`.
        follower: of the model.
        mean: [D] to go back to; None takes that of the rows.
    """
    model.datastore.recenter(mean)
    if follower.ridge is not None:
        center_head(model.head, model.datastore.mean, model.config)
        follower.ridge = sum_rows(model)
