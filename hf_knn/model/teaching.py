"""Changes of a model without training: rows come, go or get other labels, and a ridge head follows.

Each function takes a memory whose rows were counted and returns the one after the change, which
ends with its receipt.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.backbone import split_features
from ..core.config import KnnConfig
from ..core.rows import Values, as_whole_numbers
from ..store.backend import RowStore, SearchBackend, as_row_store, check_alike
from ..store.table import StoredRows
from .classes import Classes, Label
from .memory import Gone, Memory, Tally
from .pictures import Thumbnails
from .receipts import (
    ELSEWHERE_NOTE,
    HEAD_NOTE,
    STALE_NOTE,
    TAUGHT_NOTE,
    Change,
    Receipt,
    Scope,
    notes_of_forgotten,
    standing,
)
from .ridge import center_head, solve_head


def teach(
    memory: Memory,
    config: KnnConfig,
    features: Tensor,
    labels: Sequence[Label],
    ids: Values | None = None,
    paths: Sequence[str] | None = None,
    pictures: Sequence[bytes] = (),
) -> Memory:
    """Adds rows; see `KnnForImageClassification.teach`.

    Args:
        memory: before the change.
        config: of the model.
        features: [M, D] raw features, as in `pooler_output`.
        labels: M class names, new ones too, or numbers of classes.
        ids: [M] unused ids, or None.
        paths: where each picture lies, or None.
        pictures: M small WEBP files, for a memory that keeps thumbnails; or none.
    """
    width = config.feature_dim + config.extra_dim
    if features.ndim != 2 or features.shape[1] != width:
        raise ValueError(
            f"Expected `features` to be [M, {width}], but got shape {tuple(features.shape)}."
        )
    _, rows = split_features(features, config)
    after = _add(memory, config, Change.TEACH, rows, labels, ids, paths)
    if not pictures or memory.thumbnails is None:
        return after
    added = Thumbnails(dict(zip(after.receipts[-1].ids, pictures, strict=True)))
    return replace(after, thumbnails=memory.thumbnails.joined(added))


def merge(
    memory: Memory,
    config: KnnConfig,
    other: SearchBackend,
    class_names: Sequence[str] | None = None,
) -> Memory:
    """Adds the rows of another datastore of the same backbone; ids that exist are numbered anew.

    Args:
        memory: before the change.
        config: of the model.
        other: its rows come in; their raw features are compared about the mean of the model's.
        class_names: what its label numbers mean; None is what they mean here.

    Raises:
        ValueError: for another backbone, width, metric or normalisation.
    """
    store, more = _rows_of(memory), as_row_store(other)
    check_alike(store, more)
    blocks = list(more.blocks())  # read once: those of a server may change meanwhile
    numbers = [int(number) for block in blocks for number in block.labels]
    labels = numbers if class_names is None else [class_names[number] for number in numbers]
    ids = torch.tensor([int(row) for block in blocks for row in block.ids], dtype=torch.int64)
    paths = [path for block in blocks for path in block.paths]
    features = [torch.from_numpy(block.features) for block in blocks]
    rows = torch.cat(features) if features else more.features
    is_taken = bool(torch.isin(ids, store.ids).any())
    return _add(
        memory, config, Change.MERGE, rows, labels, None if is_taken else ids,
        paths if any(paths) else None,
    )  # fmt: skip


def forget(
    memory: Memory,
    config: KnnConfig,
    ids: Values | None = None,
    *,
    label: Label | None = None,
    recenter: bool = False,
) -> Memory:
    """Removes rows; see `KnnForImageClassification.forget`."""
    store = _rows_of(memory)
    if (ids is None) == (label is None):
        raise ValueError("Expected exactly one of `ids` and `label`.")
    if recenter and store.location is not None:
        raise ValueError(
            f"Expected `recenter` to be False for rows in {store.location}, of which every one "
            "would be written again; bring them home (model.datastore.to_datastore()) and load a "
            "new collection."
        )
    if label is not None:
        ids = store.ids_labelled(memory.classes.number_of(label))
    assert ids is not None
    return _remove(memory, config, Change.FORGET, as_whole_numbers(ids, "ids"), recenter)


def relabel(memory: Memory, config: KnnConfig, ids: Values, labels: Sequence[Label]) -> Memory:
    """Gives rows other labels; see `KnnForImageClassification.relabel`."""
    return _relabel(memory, config, Change.RELABEL, as_whole_numbers(ids, "ids"), labels)


def undo(memory: Memory, config: KnnConfig) -> Memory:
    """Takes the last change back; see `KnnForImageClassification.undo`."""
    left = standing(memory.receipts)
    if not left or left[-1].action == Change.EXCHANGE:
        raise ValueError("Expected a change to undo, but nothing was changed since the last undo.")
    last = left[-1]
    ids = torch.tensor(last.ids, dtype=torch.int64)
    if last.action == Change.FORGET:
        return _bring_back(memory, config, last)
    if last.action == Change.RELABEL:
        return _relabel(memory, config, Change.UNDO, ids, last.old_labels, last.new_classes)
    return _remove(memory, config, Change.UNDO, ids, dropped=last.new_classes)


def _bring_back(memory: Memory, config: KnnConfig, last: Receipt) -> Memory:
    """Forgotten rows, about the mean that there was with them, and their small pictures."""
    if not memory.gone or memory.gone[-1].rows.ids.tolist() != last.ids:
        raise ValueError(
            "Expected rows to bring back, but no byte of them was saved; teach them again, "
            "merge a backup, or go back to before the training (hf-knn undo --training)."
        )
    rows, mean, thumbnails, picture = memory.gone[-1]
    classes, numbers = memory.classes.with_labels(last.labels, len(rows.ids))
    with _rows_of(memory).changed() as store:
        ids = store.put_back(rows._replace(labels=numbers.numpy()))
        moves = not torch.equal(mean, store.mean)
        if moves:
            store.recenter(mean)
        done = _Done(Change.UNDO, ids, classes, last.labels)
        come = store.rows_of(ids)
        after = _after(memory, config, store, done, come=come, is_recentered=moves)
    if thumbnails is not None and after.thumbnails is not None:
        after = replace(after, thumbnails=after.thumbnails.joined(thumbnails))
    return replace(after, picture=picture, gone=memory.gone[:-1])


def _add(
    memory: Memory,
    config: KnnConfig,
    action: Change,
    features: Tensor,
    labels: Sequence[Label],
    ids: Values | None,
    paths: Sequence[str] | None,
) -> Memory:
    classes, numbers = memory.classes.with_labels(labels, len(features))
    with _rows_of(memory).changed() as store:
        added = store.add(features, numbers, ids, paths)
        done = _Done(action, added, classes, classes.names_of(numbers))
        come = store.rows_of(added)  # as they were cast
        return _after(memory, config, store, done, come=come)


def _remove(
    memory: Memory,
    config: KnnConfig,
    action: Change,
    ids: Tensor,
    recenter: bool = False,
    dropped: Sequence[str] = (),
) -> Memory:
    before = _rows_of(memory)
    gone, mean = before.rows_of(ids), before.mean
    labels, said = torch.from_numpy(gone.labels), []
    with before.changed() as store:
        store.remove(ids)
        if recenter:
            store.recenter()
        if action == Change.FORGET:
            had = memory.picture is not None
            said = notes_of_forgotten(store, labels, memory.classes.names, recenter, had)
        classes = _without_unused(memory.classes, store, dropped)
        done = _Done(action, ids, classes, memory.classes.names_of(labels), said=said)
        after = _after(memory, config, store, done, gone=gone, is_recentered=recenter)
    thumbnails, rows = memory.thumbnails, ids.tolist()
    if thumbnails is not None:
        after = replace(after, thumbnails=thumbnails.without(rows))
    if action != Change.FORGET:
        return after
    theirs = Gone(gone, mean, thumbnails and thumbnails.only(rows), memory.picture)
    return replace(after, picture=None, gone=(*memory.gone, theirs))


def _relabel(
    memory: Memory,
    config: KnnConfig,
    action: Change,
    ids: Tensor,
    labels: Sequence[Label],
    dropped: Sequence[str] = (),
) -> Memory:
    before = _rows_of(memory)
    named, numbers = memory.classes.with_labels(labels, len(ids))
    old = before.rows_of(ids)
    come = old._replace(labels=numbers.numpy())
    old_names = memory.classes.names_of(torch.from_numpy(old.labels))
    with before.changed() as store:
        store.relabel(ids, numbers)
        classes = _without_unused(named, store, dropped)
        done = _Done(action, ids, classes, classes.names_of(numbers), old_names)
        return _after(memory, config, store, done, gone=old, come=come)


def _rows_of(memory: Memory) -> RowStore:
    assert memory.rows is not None  # they were counted
    return memory.rows


def _without_unused(classes: Classes, store: RowStore, names: Sequence[str]) -> Classes:
    """Without classes that the undone change had made, the newest first, if no row is left."""
    count = len(classes.names)
    for name in reversed(names):
        if classes.names[count - 1] == name and not len(store.ids_labelled(count - 1)):
            count -= 1
    return classes.first(count) if names else classes


class _Done(NamedTuple):
    """What was done to rows, and what the receipt says of it, see `Receipt`."""

    action: Change
    ids: Tensor
    classes: Classes
    labels: list[str]
    old_labels: Sequence[str] = ()
    said: Sequence[str] = ()


def _after(
    memory: Memory,
    config: KnnConfig,
    store: RowStore,
    done: _Done,
    *,
    gone: StoredRows | None = None,
    come: StoredRows | None = None,
    is_recentered: bool = False,
) -> Memory:
    """The memory with changed rows: with the head that a fit of them gives, and a receipt."""
    before, head, classes = memory.tally, memory.head, done.classes
    assert before is not None  # it was counted
    if before.ridge is not None:
        head = copy.deepcopy(head)
        if is_recentered:
            center_head(head, store.mean, config)
    tally = before.follow(store, head, config, gone, come, is_recentered)
    if tally.ridge is not None:
        if len(tally.ridge.counts) > len(classes.names):
            tally.ridge.truncate(len(classes.names))
        head.classifier = solve_head(tally.ridge, config, head)
        classes = replace(classes, in_head=len(tally.ridge.counts))
    new = list(classes.names[len(memory.classes.names) :])
    receipt = _receipt(done, new, before, tally, config, store.location)
    measured = memory.measured
    if measured is not None and STALE_NOTE not in measured.get("note", ""):
        measured = measured | {"note": f"{measured.get('note', '')} {STALE_NOTE}".strip()}
    return replace(
        memory, head=head, classes=classes, rows=store, tally=tally, measured=measured,
        receipts=(*memory.receipts, receipt),
    )  # fmt: skip


def _receipt(
    done: _Done,
    new: list[str],
    before: Tally,
    after: Tally,
    config: KnnConfig,
    location: str | None,
) -> Receipt:
    remarks = [*done.said, *([TAUGHT_NOTE] if new else [])]
    if after.ridge is None:
        remarks.insert(0, HEAD_NOTE.format(config.head))
    if location is not None:
        remarks.append(ELSEWHERE_NOTE.format(location))
    return Receipt(
        action=str(done.action),
        ids=done.ids.tolist(),
        labels=done.labels,
        rows_before=before.count,
        rows_after=after.count,
        hash_before=before.fingerprint,
        hash_after=after.fingerprint,
        scope=str(Scope.STORE if after.ridge is None else Scope.STORE_AND_HEAD),
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        old_labels=list(done.old_labels),
        new_classes=new,
        notes=remarks,
    )
