"""Changes of a model without training: rows come, go or get other labels.

A head in closed form follows.

Each function takes a memory whose rows were counted and returns the one after the change, which
ends with its receipt.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.backbone import split_features
from ..core.config import KnnConfig
from ..core.rows import Values, as_whole_numbers
from ..store.backend import RowStore, SearchBackend, as_row_store, check_alike
from ..store.table import StoredRows
from .classes import Classes, Label
from .closed_form import center_head, solve_head
from .contents import Contents
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
    time_of_day,
)
from .stored import Lesson, Sorted, sort_out

_SHOWN = 20


def teach(
    memory: Memory,
    config: KnnConfig,
    lesson: Lesson,
    names: Sequence[str] | None = None,
    again: bool = False,
    relabel: bool = False,
) -> tuple[Memory, Receipt]:
    """Adds rows; see `KnnForImageClassification.teach`.

    Args:
        memory: before the change.
        config: of the model.
        lesson: pictures, or rows of features.
        names: of pictures, of which those that are stored are known again; None adds all rows.
        again: pictures that are stored with their label are added once more.
        relabel: rows of pictures that are stored with another label get theirs.

    Returns:
        The memory after the change, and the receipt. Where all pictures are stored already it is
        the memory of before, and a receipt that it does not keep.
    """
    width = config.feature_dim + config.extra_dim
    if lesson.features.ndim != 2 or lesson.features.shape[1] != width:
        raise ValueError(
            f"Expected `features` to be [M, {width}], but got shape {tuple(lesson.features.shape)}."
        )
    found = Sorted([], [], {}, [])
    if names is not None:
        found = sort_out(memory, config, lesson, names, again, relabel)
    if found.skipped:
        lesson = lesson.part(found.taken)
    if found.skipped and not found.taken and not found.moves:
        assert memory.tally is not None  # it was counted
        rows, state = memory.tally.count, memory.tally.fingerprint
        return memory, Receipt.nothing(Change.TEACH, rows, state, found.notes, found.skipped)
    after = _add(
        memory, config, Change.TEACH, split_features(lesson.features, config)[1], lesson,
        found.moves,
    )  # fmt: skip
    last = after.receipts[-1]
    last = replace(last, skipped=found.skipped, notes=[*found.notes, *last.notes])
    after = replace(after, receipts=(*after.receipts[:-1], last))
    if lesson.thumbnails and memory.thumbnails is not None:
        ids = last.ids[len(last.old_labels) :]
        added = Thumbnails(dict(zip(ids, lesson.thumbnails, strict=True)))
        after = replace(after, thumbnails=memory.thumbnails.joined(added))
    return after, last


def merge(
    memory: Memory,
    config: KnnConfig,
    other: SearchBackend,
    class_names: Sequence[str] | None = None,
    contents: Contents | None = None,
) -> Memory:
    """Adds the rows of another datastore of the same backbone; ids that exist are numbered anew.

    Args:
        memory: before the change.
        config: of the model.
        other: its rows come in; their raw features are compared about the mean of the model's.
        class_names: what its label numbers mean; None is what they mean here.
        contents: prints of its pictures, or None.

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
    lesson = Lesson(rows, labels, None if is_taken else ids, paths if any(paths) else None)
    after = _add(memory, config, Change.MERGE, rows, lesson)
    if contents is None:
        return after
    prints = {i: one for block in blocks for i, one in contents.prints_of(block).items()}
    if not prints:
        return after
    new_ids = dict(zip(ids.tolist(), after.receipts[-1].ids, strict=True))
    came = torch.tensor([new_ids[row_id] for row_id in prints], dtype=torch.int64)
    known = torch.from_numpy(np.stack(list(prints.values())))
    return after.with_contents(Contents.of([_rows_of(after).rows_of(came)], came, known))


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
    moved = len(last.old_labels)
    if moved and moved == len(ids):
        return _relabel(memory, config, Change.UNDO, ids, last.old_labels, last.new_classes)
    old = dict(zip(last.ids, last.old_labels, strict=False))
    return _remove(memory, config, Change.UNDO, ids[moved:], dropped=last.new_classes, moves=old)


def _bring_back(memory: Memory, config: KnnConfig, last: Receipt) -> Memory:
    """Forgotten rows, about the mean that there was with them, and their small pictures."""
    if not memory.gone or memory.gone[-1].rows.ids.tolist() != last.ids:
        raise ValueError(
            "Expected rows to bring back, but no byte of them was saved; teach them again, merge a "
            "backup, or go back to before the training (`hf-knn undo CHECKPOINT --training`)."
        )
    rows, mean, thumbnails, contents, picture = memory.gone[-1]
    classes, numbers = memory.classes.with_labels(last.labels, len(rows.ids))
    with _rows_of(memory).changed() as store:
        ids = store.put_back(rows._replace(labels=numbers.numpy()))
        moves = not torch.equal(mean, store.mean)
        if moves:
            store.recenter(mean)
        done = _Done(Change.UNDO, ids, classes, last.labels)
        steps: list[_Step] = [(None, store.rows_of(ids))]
        after = _after(memory, config, store, done, steps, is_recentered=moves)
    after = after.with_contents(contents)
    if thumbnails is not None and after.thumbnails is not None:
        after = replace(after, thumbnails=after.thumbnails.joined(thumbnails))
    return replace(after, picture=picture, gone=memory.gone[:-1])


_Step = tuple[StoredRows | None, StoredRows | None]
"""Rows that went and rows that came; with both, the same rows, before and after a new label."""


def _add(
    memory: Memory,
    config: KnnConfig,
    action: Change,
    rows: Tensor,
    lesson: Lesson,
    moves: Mapping[int, str] | None = None,
) -> Memory:
    """With more rows, and with other labels for some that there are."""
    moved = _Moved.of(memory, moves or {}, len(rows))
    classes, numbers = moved.classes.with_labels(lesson.labels, len(rows))
    steps, added = [*moved.steps], moved.ids[:0]
    with _rows_of(memory).changed() as store:
        moved.make(store)
        if len(rows) or not len(moved.ids):
            added = store.add(rows, numbers, lesson.ids, lesson.paths)
            steps.append((None, store.rows_of(added)))  # as they were cast
        done = _Done(
            action, torch.cat([moved.ids, added]), classes,
            [*moved.labels, *classes.names_of(numbers)], moved.old_labels,
        )  # fmt: skip
        after = _after(memory, config, store, done, steps)
    come = [rows for _, rows in steps if rows is not None]
    return after.with_contents(Contents.of(come, added, lesson.contents))


def _remove(
    memory: Memory,
    config: KnnConfig,
    action: Change,
    ids: Tensor,
    recenter: bool = False,
    dropped: Sequence[str] = (),
    moves: Mapping[int, str] | None = None,
) -> Memory:
    """Without some rows, and with other labels for some that stay."""
    before, moved = _rows_of(memory), _Moved.of(memory, moves or {}, len(ids))
    gone, mean = before.rows_of(ids), before.mean
    labels, said = torch.from_numpy(gone.labels), []
    with before.changed() as store:
        moved.make(store)
        store.remove(ids)
        if recenter:
            store.recenter()
        if action == Change.FORGET:
            had = memory.picture is not None
            said = notes_of_forgotten(
                store, labels, memory.classes.names, config.head, recenter, had
            )
        classes = _without_unused(memory.classes, store, dropped)
        done = _Done(
            action, torch.cat([moved.ids, ids]), classes,
            [*moved.labels, *memory.classes.names_of(labels)], moved.old_labels, said,
        )  # fmt: skip
        steps: list[_Step] = [*moved.steps, (gone, None)]
        after = _after(memory, config, store, done, steps, is_recentered=recenter)
    rows = ids.tolist()
    after = after.without_pictures(rows)
    if action != Change.FORGET:
        return after
    small, contents = memory.thumbnails, memory.contents
    theirs = Gone(
        gone, mean, small and small.only(rows), contents and contents.only(rows), memory.picture
    )
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
        return _after(memory, config, store, done, [(old, come)])


class _Moved(NamedTuple):
    """Rows that get other labels while others come or go.

    Attributes:
        ids: [M] int64 of the rows.
        labels: their new ones.
        old_labels: and those that they have.
        classes: with the new labels among them.
        steps: from the rows as they are to the rows as they will be; empty without rows.
    """

    ids: Tensor
    labels: list[str]
    old_labels: list[str]
    classes: Classes
    steps: list[_Step]

    @classmethod
    def of(cls, memory: Memory, moves: Mapping[int, str], others: int) -> "_Moved":
        """Checks them.

        Args:
            memory: with the rows.
            moves: the new label of each row, by its id.
            others: how many rows come or go.
        """
        ids = torch.tensor(list(moves), dtype=torch.int64)
        if not moves:
            return cls(ids, [], [], memory.classes, [])
        store, labels = _rows_of(memory), list(moves.values())
        if store.location is not None and others:  # a journal takes one kind of change back
            raise ValueError(
                f"Expected rows beside the model, to relabel {len(ids)} of them and to add or "
                f"remove {others} at once, but they lie in {store.location}; relabel first, then "
                "do the rest."
            )
        classes, numbers = memory.classes.with_labels(labels, len(ids))
        old = store.rows_of(ids)
        old_labels = memory.classes.names_of(torch.from_numpy(old.labels))
        return cls(ids, labels, old_labels, classes, [(old, old._replace(labels=numbers.numpy()))])

    def make(self, store: RowStore) -> None:
        """Gives rows of a datastore their new labels."""
        for _, new in self.steps:
            assert new is not None
            store.relabel(self.ids, new.labels)


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
    steps: Sequence[_Step],
    is_recentered: bool = False,
) -> Memory:
    """The memory with changed rows: with the head that a fit of them gives, and a receipt."""
    before, head, classes = memory.tally, memory.head, done.classes
    assert before is not None  # it was counted
    if before.state is not None:
        head = copy.deepcopy(head)
        if is_recentered:
            center_head(head, store.mean, config)
    tally = before
    for gone, come in steps:
        tally = tally.follow(store, head, config, gone, come, is_recentered)
    if tally.state is not None:
        if len(tally.state.counts) > len(classes.names):
            tally.state.truncate(len(classes.names))
        head.classifier = solve_head(tally.state, config, head)
        classes = replace(classes, in_head=len(tally.state.counts))
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
    if after.state is None:
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
        scope=str(Scope.STORE if after.state is None else Scope.STORE_AND_HEAD),
        at=time_of_day(),
        old_labels=list(done.old_labels),
        new_classes=new,
        notes=remarks,
    )
