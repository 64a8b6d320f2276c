"""What one visitor taught, over a model that stays as it was published."""

import copy
import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hf_knn import KnnForImageClassification

from .journal import Example, Journal, Taught
from .uploads import SpaceError

MAX_EXAMPLES = 200
"""Pictures that a visitor can teach."""

MAX_NEW_CLASSES = 50
"""Classes that a visitor can make."""

MAX_REQUESTS = 1000
"""Requests whose keys are remembered; after that a visitor starts anew."""


class Overlay:
    """A copy of the model that shares the backbone and the published rows.

    Callers hold `lock` around every method and around every use of `model`.

    Args:
        published: the model; it is never changed.
        journal: where changes are kept; None keeps them in memory only.

    Attributes:
        model: what answers this visitor.
        examples: row id to what was taught, in the order of the ids.
        lock: one change or answer at a time.
        seen: when it was last used, in seconds of the monotonic clock.
        is_closed: True once the registry has let go of it.
    """

    def __init__(self, published: KnnForImageClassification, journal: Journal | None) -> None:
        self.model = copy.deepcopy(published, {id(published.backbone): published.backbone})
        self.model.changes = []  # what the publisher changed is not the visitor's to undo
        self.examples: dict[int, Example] = {}
        self.lock = threading.RLock()
        self.seen = time.monotonic()
        self.is_closed = False
        self._published_classes = len(self.model.config.class_names)
        self._journal = journal
        self._done: dict[str, Taught] = {}
        self._forgotten: list[Example] = []
        ids = self.model.datastore.ids if self.model.datastore is not None else torch.empty(0)
        self._next_id = int(ids.max()) + 1 if len(ids) else 0
        if journal is not None:
            self._replay(journal)

    def find(self, key: str, digest: str) -> Taught | None:
        """The request with this key, if it was acknowledged before.

        Raises:
            SpaceError: if the key was another request's.
        """
        known = self._done.get(key)
        if known is not None and known.digest != digest:
            raise SpaceError(
                "Expected a new idempotency key for another request, but got one that was used "
                "with other pictures or another label."
            )
        return known

    def teach(
        self, features: Tensor, label: str, thumbnails: Sequence[bytes], key: str, digest: str,
        contents: Sequence[bytes] | None = None,
    ) -> Taught:  # fmt: skip
        """Adds pictures under one label, all or none; kept on disk before this returns.

        Those that are known with this label already, published or taught, are left out.

        Args:
            features: [M, D].
            label: checked before.
            thumbnails: M small pictures.
            key: a new one.
            digest: of the request.
            contents: M prints, see `hf_knn.data.content_of`; None adds all pictures.

        Raises:
            SpaceError: beyond what a visitor may teach, for pictures that are known with another
                label, or if it cannot be kept; then nothing was taught.
        """
        self._check_room(len(features), label)
        count = len(features)
        ids = list(range(self._next_id, self._next_id + count))
        try:
            receipt = self.model.teach(
                features=features, labels=[label] * count, ids=ids,
                contents=None if contents is None else _as_tensor(contents),
            )  # fmt: skip
        except ValueError as error:  # the label was checked, and nothing else can be wrong
            problem = str(error).partition(" Nothing was changed")[0]
            raise SpaceError(f"{problem} Nothing was taught; leave them out.") from error
        taught = Taught(key, digest, receipt.ids, label, receipt.skipped)
        came = [place for place in range(count) if place not in set(receipt.skipped)]
        rows = [
            Example(row_id, label, _as_bytes(features[place]), thumbnails[place])
            for row_id, place in zip(receipt.ids, came, strict=True)
        ]
        next_id = max([self._next_id, *(row_id + 1 for row_id in receipt.ids)])
        if self._journal is not None:
            with self._closing_on_failure():
                self._journal.append(taught, rows, next_id)
        self._done[taught.key] = taught
        self.examples |= {row.row_id: row for row in rows}
        self._next_id = next_id
        if rows:
            self._forgotten = []
        return taught

    def forget(self, ids: Sequence[int]) -> list[int]:
        """Removes pictures that the visitor taught, all or none; no byte of them stays on disk.

        Returns:
            Their ids.

        Raises:
            SpaceError: for ids that are not the visitor's.
        """
        wanted = self._own(ids)
        self.model.forget(wanted)
        self._forgotten = [self.examples.pop(row_id) for row_id in wanted]
        self._save()
        return wanted

    def relabel(self, ids: Sequence[int], label: str) -> list[int]:
        """Gives pictures that the visitor taught another label.

        Raises:
            SpaceError: for ids that are not the visitor's, or a class too many.
        """
        wanted = self._own(ids)
        self._check_room(0, label)
        self.model.relabel(wanted, [label] * len(wanted))
        for row_id in wanted:
            self.examples[row_id] = _with_label(self.examples[row_id], label)
        self._save()
        return wanted

    def undo(self) -> str:
        """Takes the last change back.

        Returns:
            What it was: `teach`, `forget` or `relabel`.

        Raises:
            SpaceError: if there is nothing to take back.
        """
        changes = self.model.changes
        if not changes or changes[-1].action == "undo":
            raise SpaceError("Nothing to undo: nothing was changed since the last undo.")
        last = changes[-1]
        self.model.undo()
        if last.action == "teach":
            for row_id in last.ids:
                del self.examples[row_id]
        elif last.action == "forget":
            self.examples |= {row.row_id: row for row in self._forgotten}
            self.examples = dict(sorted(self.examples.items()))
        else:
            for row_id, label in zip(last.ids, last.old_labels, strict=True):
                self.examples[row_id] = _with_label(self.examples[row_id], label)
        self._save()
        return last.action

    def _own(self, ids: Sequence[int]) -> list[int]:
        wanted = sorted(set(ids))
        unknown = [row_id for row_id in wanted if row_id not in self.examples]
        if not wanted or unknown:
            raise SpaceError(
                "Expected ids of pictures that you taught, but got "
                f"{unknown[:5] if wanted else 'none'}; published pictures stay."
            )
        return wanted

    def _check_room(self, count: int, label: str) -> None:
        if len(self.examples) + count > MAX_EXAMPLES:
            raise SpaceError(
                f"Expected at most {MAX_EXAMPLES} taught pictures, but got "
                f"{len(self.examples) + count}; remove some first."
            )
        names = self.model.config.class_names
        if label not in names and len(names) - self._published_classes >= MAX_NEW_CLASSES:
            raise SpaceError(f"Expected at most {MAX_NEW_CLASSES} new classes; use one of them.")
        if count and len(self._done) >= MAX_REQUESTS:
            raise SpaceError(f"Expected at most {MAX_REQUESTS} changes; start with a new visitor.")

    def _save(self) -> None:
        if self._journal is not None:
            rows = list(self.examples.values())
            with self._closing_on_failure():
                self._journal.replace(self._done.values(), rows, self._next_id)

    @contextmanager
    def _closing_on_failure(self) -> Iterator[None]:
        """What could not be kept did not happen: the next request opens the journal again."""
        try:
            yield
        except OSError as error:
            self.is_closed = True
            raise SpaceError(
                "The server could not keep this change, and nothing was changed; try again later."
            ) from error

    def _replay(self, journal: Journal) -> None:
        rows: list[Example] = []
        for taught, added, next_id in journal.read():
            if taught is not None:
                self._done[taught.key] = taught
            rows += added
            self._next_id = max(self._next_id, next_id)
        if rows:
            parts = [np.frombuffer(row.features, "<f4") for row in rows]
            features = torch.from_numpy(np.stack(parts))
            labels, ids = [row.label for row in rows], [row.row_id for row in rows]
            self.model.teach(features=features, labels=labels, ids=ids)
            self.model.changes = []  # one teaching of everything is not what was done last
            self.examples = {row.row_id: row for row in rows}


def request_digest(label: str, digests: Sequence[str]) -> str:
    """What a request asks for, as one hash.

    Args:
        label: of the pictures.
        digests: sha256 of each file.
    """
    return hashlib.sha256("\n".join([label, *digests]).encode()).hexdigest()


def _with_label(row: Example, label: str) -> Example:
    return replace(row, label=label)


def _as_bytes(features: Tensor) -> bytes:
    return features.numpy().astype("<f4").tobytes()


def _as_tensor(contents: Sequence[bytes]) -> Tensor:
    prints = np.frombuffer(b"".join(contents), np.uint8).reshape(len(contents), -1)
    return torch.tensor(prints)


def fingerprint(model: KnnForImageClassification) -> str:
    """Of everything that decides what a taught picture means: weights and published rows.

    Args:
        model: the published one.
    """
    total = hashlib.sha256(repr(model.config.class_names).encode())
    tensors = dict(model.state_dict())
    if model.datastore is not None:
        store = model.datastore
        tensors |= {"rows": store.features, "labels": store.labels, "ids": store.ids}
    for name, value in sorted(tensors.items()):
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
