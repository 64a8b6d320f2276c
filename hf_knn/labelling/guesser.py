"""What the model says of pictures while they are labelled: each answer is taught at once."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..core.backbone import split_features
from ..core.config import Head
from ..fit.choice import FIXED_CELL
from ..milvus.datastore import MilvusDatastore
from ..model.classes import Classes
from ..model.closed_form import center_head
from ..model.memory import Memory
from ..model.modeling import KnnForImageClassification
from ..model.stored import find_copies
from ..store.backend import as_row_store
from ..store.datastore import Datastore
from .pool import Pool
from .questions import Guess, Neighbour

DEFAULT_BACKBONE = "facebook/dinov2-small"

_NOBODY = "?"
_ASKED_AT_ONCE = 1024


class Known(NamedTuple):
    """What a guesser knows, as one value; taking an answer back is going back to an earlier one.

    Attributes:
        memory: of the model.
        names: of pictures of the pool, by the id of their row.
    """

    memory: Memory
    names: Mapping[int, str]


class Guesser:
    """A model that is taught one answer after the other.

    Without a checkpoint it is the ridge head that `hf-knn train` takes with very few labels,
    about the mean of all pictures, which are known before any of their labels. It follows each
    row exactly; the neighbours only explain (λ = 0).

    Args:
        model: from `begin`, or a checkpoint.
        pool: the pictures.
        is_new: whether the model knows nothing yet.
    """

    def __init__(self, model: KnnForImageClassification, pool: Pool, is_new: bool) -> None:
        self._model, self._pool, self._is_new = model.eval(), pool, is_new
        self._number = {name: number for number, name in enumerate(pool.names)}
        store = model.datastore
        if is_new:
            rows = self._store_part(pool.features)
            nothing = torch.empty(0, dtype=torch.int64)
            store = Datastore(rows[:0], nothing, nothing, rows.double().mean(dim=0).float())
            model.datastore = store
            center_head(model.head, store.mean, model.config)
        elif isinstance(store, MilvusDatastore):  # which others ask: it is not to change here
            model.datastore = store.to_datastore()
        elif store is None:
            raise ValueError(
                "Expected a checkpoint with a datastore, which answers are taught to, but it has "
                "none; train it with `hf-knn train`, or label without --model."
            )
        self.known = Known(model.memory, {})

    @classmethod
    def begin(
        cls, backbone: str | PreTrainedModel | None, labels: Sequence[str]
    ) -> KnnForImageClassification:
        """A model that knows nothing.

        Args:
            backbone: as for `hf-knn train`; None is dinov2-small.
            labels: of classes that are known to come.
        """
        return KnnForImageClassification.from_backbone(
            backbone or DEFAULT_BACKBONE, list(labels) or [_NOBODY],
            head=Head.RIDGE, knn_weight=0.0, head_regularizer=FIXED_CELL.regularizer,
            head_temperature=FIXED_CELL.temperature,
        )  # fmt: skip

    @property
    def labels(self) -> list[str]:
        """The classes that the model has."""
        names = self._model.config.class_names
        return [] if names == [_NOBODY] and not self.rows else names

    @property
    def rows(self) -> int:
        """How many labelled pictures it knows."""
        return len(as_row_store(self._model.datastore))

    @property
    def mean(self) -> Tensor:
        """[D] about which features are compared."""
        return as_row_store(self._model.datastore).mean

    def stored(self) -> dict[str, str]:
        """Pictures that a checkpoint knows already, with their labels; as of when it was opened."""
        if self._is_new:
            return {}
        store, memory = as_row_store(self._model.datastore), self._model.memory
        rows = self._store_part(self._pool.features)
        copies = find_copies(store, memory.contents, rows, self._pool.contents)
        found, names = {}, dict(self.known.names)
        for name, ids in zip(self._pool.names, copies, strict=True):
            for row_id, label in ids.items():
                found[name] = self._model.config.class_names[label]
                names.setdefault(row_id, name)
        self.known = self.known._replace(names=names)
        return found

    def teach(self, named: Sequence[tuple[str, str]]) -> None:
        """Teaches pictures.

        Args:
            named: name and label of each.
        """
        if not named:
            return
        model, labels = self._model, [label for _, label in named]
        names = [name for name, _ in named]
        if self._is_new and not self.rows and model.config.class_names == [_NOBODY]:
            model.memory = replace(model.memory, classes=Classes((labels[0],), 1), tally=None)
        receipt = model.teach(features=self._features(names), labels=labels, paths=names)
        if self._is_new:  # its head knows all classes, new ones too
            model.memory = replace(model.memory, classes=replace(model.memory.classes, tuned=None))
        added = dict(zip(receipt.ids, names, strict=True))
        self.known = Known(model.memory, {**self.known.names, **added})

    def go_back(self, known: Known) -> None:
        """Knows again what was known before, and nothing else.

        Args:
            known: a value of `known`.
        """
        self._model.memory = known.memory
        self.known = known

    def probabilities(self, names: Sequence[str]) -> Tensor:
        """[M, C] of pictures, in the order of `labels`.

        Args:
            names: M pictures.
        """
        features = self._features(names)
        with torch.inference_mode():
            parts = [
                self._model(features=part.to(self._model.device)).logits.float().softmax(-1).cpu()
                for part in features.split(_ASKED_AT_ONCE)
            ]
        return torch.cat(parts).clone()

    def guesses(self, names: Sequence[str]) -> list[Guess]:
        """The classes that pictures may be, the likeliest first; of several, on average.

        Args:
            names: of one picture or more.

        Returns:
            All classes; none before two of them have pictures: there was nothing to choose from.
        """
        if len(as_row_store(self._model.datastore).labels.unique()) < 2:
            return []
        shares = self.probabilities(names).mean(dim=0)
        order = shares.argsort(descending=True, stable=True).tolist()
        return [Guess(self.labels[number], float(shares[number])) for number in order]

    def neighbours(self, name: str, most: int) -> list[Neighbour]:
        """The labelled pictures next to one, nearest first.

        Args:
            name: of the picture.
            most: how many.
        """
        store = as_row_store(self._model.datastore)
        if not len(store):
            return []
        found = store.search(self._store_part(self._features([name])), min(most, len(store)))
        rows = zip(*(part[0].tolist() for part in (found.ids, found.labels, found.similarities)),
                   strict=True)  # fmt: skip
        return [
            Neighbour(self._place(row_id), self.labels[label], similarity, self._small(row_id))
            for row_id, label, similarity in rows
            if row_id >= 0
        ]

    def nearest_features(self, names: Sequence[str]) -> Tensor | None:
        """[M, D] features of the labelled picture next to each; None while there is none.

        Args:
            names: M pictures.
        """
        store = as_row_store(self._model.datastore)
        if not len(store):
            return None
        ids = store.search(self.store_features(names), 1).ids.flatten()
        rows, places = ids.unique(return_inverse=True)
        return torch.from_numpy(store.rows_of(rows).features).float()[places]

    def store_features(self, names: Sequence[str]) -> Tensor:
        """[M, D] of pictures, as the datastore compares them."""
        return self._store_part(self._features(names))

    def _place(self, row_id: int) -> Path:
        name = self.known.names.get(row_id)
        if name is not None:
            return self._pool.path(name)
        path = as_row_store(self._model.datastore).path_of(row_id)
        return Path(path or f"row {row_id}")

    def _small(self, row_id: int) -> bytes | None:
        kept = self._model.memory.thumbnails
        return None if kept is None or row_id in self.known.names else kept.get(row_id)

    def _features(self, names: Sequence[str]) -> Tensor:
        return self._pool.features[[self._number[name] for name in names]]

    def _store_part(self, features: Tensor) -> Tensor:
        return split_features(features, self._model.config)[1]
