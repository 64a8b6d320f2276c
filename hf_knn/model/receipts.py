"""What was changed in a model after its training: a receipt per change, with what it left alone."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.backbone import split_features
from ..core.config import Head
from ..core.plain_json import read_json
from ..core.votes import Metric, Weighting
from ..store.backend import RowStore, learned_map_of

if TYPE_CHECKING:
    from .modeling import KnnForImageClassification

logger = logging.getLogger(__name__)

CHANGES_NAME = "changes.json"
"""File of a checkpoint with its receipts, oldest first."""

PICTURES_MARK, ROWS_MARK = "pictures", "rows"
"""What `Datastore.source` says of a training: hashes of its pictures, and of the rows it left."""

_KEPT = 100
_TOLD = 3
_LARGEST_FILE = 50 * 10**6


class Change(StrEnum):
    """What can be done to a model without training."""

    TEACH = "teach"
    FORGET = "forget"
    RELABEL = "relabel"
    MERGE = "merge"
    UNDO = "undo"
    EXCHANGE = "undo of a training"
    """The version before the last training and the present one took each other's place."""


_DONE: dict[str, str] = {
    Change.TEACH: "taught", Change.MERGE: "merged", Change.FORGET: "forgotten",
    Change.RELABEL: "relabelled",
}  # fmt: skip


_DID: dict[str, str] = {
    Change.TEACH: "taught", Change.MERGE: "merged", Change.FORGET: "forgot",
    Change.RELABEL: "relabelled",
}  # fmt: skip


class Scope(StrEnum):
    """What a change reached."""

    STORE = "store"
    STORE_AND_HEAD = "store and head"
    NOTHING = "nothing"
    ALL = "the whole checkpoint"


_CHANGED = {
    Scope.STORE: "The head stays as it was.",
    Scope.STORE_AND_HEAD: "The head knows it too.",
    Scope.NOTHING: "Nothing was changed.",
    Scope.ALL: "The whole checkpoint was changed.",
}


@dataclass(frozen=True)
class Receipt:
    """What one change did.

    Attributes:
        action: what was done.
        ids: of the rows that came, went or were relabelled.
        labels: their class names after the change (before it, for rows that are gone).
        old_labels: their class names before, of those that were relabelled, which come first.
        new_classes: classes that did not exist before.
        rows_before: rows of the datastore before.
        rows_after: and after.
        hash_before: fingerprint of rows, mean and map before, whatever their order.
        hash_after: and after.
        scope: what was changed: the store, or store and head.
        at: when, ISO 8601 in UTC.
        notes: what it did not reach.
        skipped: places of the pictures, among those given, that made no row: they are stored.
    """

    action: str
    ids: list[int]
    labels: list[str]
    rows_before: int
    rows_after: int
    hash_before: str
    hash_after: str
    scope: str
    at: str
    old_labels: list[str] = field(default_factory=list)
    new_classes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)

    @classmethod
    def nothing(
        cls, action: Change, rows: int, state: str, notes: list[str], skipped: Sequence[int] = ()
    ) -> "Receipt":
        """Of what changed nothing; it is not kept in a model.

        Args:
            action: what was asked for.
            rows: of the datastore.
            state: fingerprint of the rows.
            notes: what is to be said.
            skipped: places of pictures that made no row.
        """
        return cls(
            str(action), [], [], rows, rows, state, state, str(Scope.NOTHING), time_of_day(),
            notes=notes, skipped=list(skipped),
        )  # fmt: skip

    def named(self) -> str:
        """How many pictures of which class; empty for none."""
        pairs = zip(self.old_labels, self.labels, strict=False)
        moved = [f"{old} → {new}" for old, new in pairs]
        counts = Counter(moved + self.labels[len(moved) :])
        return ", ".join(f"{count} of {label}" for label, count in counts.items())

    def __str__(self) -> str:
        named = self.named()
        new = f" New classes: {', '.join(self.new_classes)}." if self.new_classes else ""
        return (
            f"{self.action}: {named or 'nothing'}; {self.rows_before:,} → {self.rows_after:,} "
            f"stored pictures (fingerprint {self.hash_before[:12]} → {self.hash_after[:12]}). "
            f"{_CHANGED[Scope(self.scope)]}{new}"
        )


def time_of_day() -> str:
    """Now, ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def standing(changes: Sequence[Receipt]) -> list[Receipt]:
    """The changes that were not taken back, oldest first; `undo` takes back the last of them.

    Args:
        changes: all receipts, oldest first.
    """
    found: list[Receipt] = []
    for receipt in changes:
        if receipt.action != Change.UNDO:
            found.append(receipt)
        elif found:  # receipts of long ago may be missing
            found.pop()
    return found


@dataclass(frozen=True)
class Entry:
    """A change in the history of a model.

    Attributes:
        number: from 1, the oldest that is kept first.
        receipt: of the change.
        takes_back: the number of the change that this one took back; None for no undo, or if that
            receipt is kept no more.
        is_taken_back: whether a later one took it back.
    """

    number: int
    receipt: Receipt
    takes_back: int | None = None
    is_taken_back: bool = False

    def __str__(self) -> str:
        receipt = self.receipt
        count = len(receipt.ids)
        pictures = f"{count:,} picture{'' if count == 1 else 's'}"
        moved = len(receipt.old_labels)
        said = f"{_DID.get(receipt.action, receipt.action)} {pictures}"
        if receipt.action == Change.EXCHANGE:
            said = "put back the version that was kept of a training"
        elif receipt.action == Change.UNDO:
            which = "an earlier one" if self.takes_back is None else f"number {self.takes_back}"
            said = f"took back {which}, {pictures}"
        elif receipt.action == Change.TEACH and moved:
            said += f", {moved:,} of them by another label"
        if named := receipt.named():
            said += f": {named}"
        if receipt.rows_before != receipt.rows_after:
            said += f"; {receipt.rows_before:,} → {receipt.rows_after:,} rows"
        if receipt.new_classes:
            said += f"; new classes: {', '.join(receipt.new_classes)}"
        return said


def history(changes: Sequence[Receipt]) -> list[Entry]:
    """What was done to a model since its training, in order, with what took back what.

    Args:
        changes: all receipts, oldest first.
    """
    found: list[Entry] = []
    left: list[int] = []  # places of those that stand, as `standing` says
    for number, receipt in enumerate(changes, 1):
        place = left.pop() if receipt.action == Change.UNDO and left else None
        if place is not None:
            found[place] = replace(found[place], is_taken_back=True)
        if receipt.action != Change.UNDO:
            left.append(len(found))
        found.append(Entry(number, receipt, None if place is None else place + 1))
    return found


def describe_changes(changes: Sequence[Receipt]) -> str:
    """What was done to a model since its training, in words; empty if nothing stands.

    Args:
        changes: all receipts, oldest first.

    Returns:
        Such as `3 pictures were taught (2026-11-30: 3 of fox)`.
    """
    labels: dict[str, Counter[str]] = {done: Counter() for done in _DONE.values()}
    days: dict[str, str] = {}
    for receipt in standing(changes):
        for place, label in enumerate(receipt.labels):
            was_there = place < len(receipt.old_labels)  # taught under another label
            done = _DONE.get(Change.RELABEL if was_there else receipt.action, "changed")
            labels.setdefault(done, Counter())[label] += 1
            days[done] = receipt.at[:10]
    parts = []
    for done, counts in labels.items():
        total, more = counts.total(), ", …" if len(counts) > _TOLD else ""
        named = ", ".join(f"{count} of {label}" for label, count in counts.most_common(_TOLD))
        were = "picture was" if total == 1 else "pictures were"
        parts += [f"{total} {were} {done} ({days[done]}: {named}{more})"] if total else []
    return ", ".join(parts[:-1]) + (" and " if parts[1:] else "") + "".join(parts[-1:])


def write_changes(changes: Sequence[Receipt], folder: Path) -> None:
    """Writes the last receipts into a checkpoint: as many as `read_changes` would read.

    Args:
        changes: oldest first.
        folder: of the checkpoint.
    """
    kept: list[bytes] = []
    room = _LARGEST_FILE - len("[]\n")
    for receipt in reversed(changes[-_KEPT:]):
        entry = json.dumps(asdict(receipt), ensure_ascii=False).encode()
        room -= len(entry) + len(", ")
        if room < 0:
            logger.warning(
                "Only the last %d changes are written, as older ones are large.", len(kept)
            )
            break
        kept.insert(0, entry)
    (folder / CHANGES_NAME).write_bytes(b"[" + b", ".join(kept) + b"]\n")


def read_changes(path: Path | None) -> list[Receipt]:
    """The receipts of a checkpoint; none if it says nothing that can be used.

    Args:
        path: of `changes.json`; None if there is none.
    """
    try:
        return [] if path is None else load_changes(path)
    except ValueError as error:
        logger.warning("%s", error)
        return []


def load_changes(path: Path) -> list[Receipt]:
    """The receipts of a checkpoint.

    Args:
        path: of `changes.json`.

    Raises:
        ValueError: if it holds something else.
    """
    try:
        return [_checked(Receipt(**entry)) for entry in read_json(path, _LARGEST_FILE)]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"Expected {path.name} to hold receipts of changes, but: {error!r}."
        ) from error


def _checked(receipt: Receipt) -> Receipt:
    if not all(isinstance(row_id, int) for row_id in receipt.ids):
        raise ValueError(f"ids {receipt.ids[:3]} that are not whole numbers")
    if not all(isinstance(place, int) for place in receipt.skipped):
        raise ValueError(f"places {receipt.skipped[:3]} that are not whole numbers")
    for names in (receipt.labels, receipt.old_labels, receipt.new_classes, receipt.notes):
        if not all(isinstance(name, str) for name in names):
            raise ValueError("names that are not texts")
    return receipt


_ASKED_ROWS, _NAMED = 1024, 20

_FLAT_TEMPERATURE = 0.5
"""Above it, of squared distances of unit vectors, near and far rows weigh nearly the same."""

STALE_NOTE = "Measured before later changes of the datastore."

HEAD_NOTE = "the {} head keeps what it learned; train it again for it to follow"

TAUGHT_NOTE = "the neighbours speak in full for new classes until `tune` chooses the blend again"

ELSEWHERE_NOTE = (
    "the rows lie in {}, changed there for all; a checkpoint that refers to them opens when this "
    "model was saved over it"
)

_HISTORY = (
    "commits that were pushed before still hold the rows; HfApi().super_squash_history(repo_id) "
    "squashes them after the next push"
)

_UNANSWERED = (
    "{} of {} pictures are still answered as another class; teach more of theirs, or tune on "
    "pictures of all classes (`hf-knn tune`)"
)

_FLAT = ", or set `knn_temperature` from {:g} to 0.14: that flat a vote ignores distances"

_CHOICE = (
    "how many neighbours vote, what they count and how smooth the head is stay as they were chosen "
    "(k, temperatures, λ, regulariser)"
)

_NAMES = "classes without rows keep their names: {}"

_PICTURE = "the picture of neighbours for the model card was removed: it may have shown them"

_MEAN = (
    "the mean of all features, which is subtracted from each, stays as it was; recenter=True "
    "(--recenter) computes it anew"
)

_MAP = (
    "what was learned about likeness (--learn-metric) stays as it was, and holds a trace of the "
    "rows; a training makes it anew, or `hf-knn refit` with the heads ridge, kernel and lda"
)
_AXES = (
    "the kernel head looks along directions (principal axes) that the training found in all rows "
    "that it had; `hf-knn refit` finds them anew"
)

_COMPACTION = "their bytes stay in the files of the server until it compacts them"


def notes_of_forgotten(
    store: RowStore, labels: Tensor, names: Sequence[str], head: str, recenter: bool,
    had_picture: bool,
) -> list[str]:  # fmt: skip
    """What is said of mean, map, axes, names, a picture, and where else forgotten rows may be.

    Args:
        store: without the rows.
        labels: [M] int64 of the rows.
        names: of all classes.
        head: which kind it is.
        recenter: whether the mean was made anew.
        had_picture: whether there was a picture of neighbours.
    """
    empty = [n for n in labels.unique().tolist() if not len(store.ids_labelled(n))]
    shown = ", ".join(names[number] for number in empty[:_NAMED])
    notes = [] if recenter else [_MEAN]
    notes += [] if learned_map_of(store) is None else [_MAP]
    if head == Head.KERNEL:
        notes.append(_AXES)
    if empty:
        notes.append(_NAMES.format(shown + (", …" if len(empty) > _NAMED else "")))
    if had_picture:
        notes.append(_PICTURE)
    return [*notes, _CHOICE, _HISTORY if store.location is None else _COMPACTION]


def note_of_unanswered(
    model: "KnnForImageClassification", features: Tensor, receipt: Receipt
) -> str:
    """Says so if taught rows, asked for themselves, get another class than they were taught.

    Args:
        model: which was taught them.
        features: [M, D] of the pictures that were given, as in `pooler_output`.
        receipt: of the change.

    Returns:
        Empty if there is nothing to say.
    """
    config, asked = model.config, receipt.labels[len(receipt.old_labels) :][:_ASKED_ROWS]
    came = torch.ones(len(features), dtype=torch.bool)
    came[receipt.skipped] = False
    features = features[came]
    blended = config.blended_classes
    if blended == len(config.id2label or ()):  # the neighbours speak in full for no class
        return ""
    names, store = config.class_names, model.datastore
    if store is None or set(names[blended:]).isdisjoint(asked):
        return ""
    head_part, store_part = split_features(features[:_ASKED_ROWS], config)
    with torch.inference_mode():
        neighbors = store.search(store_part.float(), config.k)
        log_probs, *_ = model.weigh(head_part.to(model.device), neighbors)
    answers = [names[number] for number in log_probs.argmax(1).tolist()]
    missed = sum(answer != label for answer, label in zip(answers, asked, strict=True))
    if not missed:
        return ""
    is_softmax = config.knn_weighting == Weighting.SOFTMAX and config.metric == Metric.COSINE
    is_flat = is_softmax and config.knn_temperature > _FLAT_TEMPERATURE
    note = _UNANSWERED.format(missed, len(asked))
    return note + (_FLAT.format(config.knn_temperature) if is_flat else "")
