"""What was changed in a model after its training: one receipt per change, kept with the model."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

logger = logging.getLogger(__name__)

CHANGES_NAME = "changes.json"
"""File of a checkpoint with its receipts, oldest first."""

_KEPT = 100
_LARGEST_FILE = 50 * 10**6


class Change(StrEnum):
    """What can be done to a model without training."""

    TEACH = "teach"
    FORGET = "forget"
    RELABEL = "relabel"
    MERGE = "merge"
    UNDO = "undo"


class Scope(StrEnum):
    """What a change reached."""

    STORE = "store"
    STORE_AND_HEAD = "store and head"


@dataclass(frozen=True)
class Receipt:
    """What one change did.

    Attributes:
        action: what was done.
        ids: of the rows that came, went or were relabelled.
        labels: their class names after the change (before it, for rows that are gone).
        old_labels: their class names before, if they were relabelled.
        new_classes: classes that did not exist before.
        rows_before: rows of the datastore before.
        rows_after: and after.
        hash_before: fingerprint of rows and mean before, whatever their order.
        hash_after: and after.
        scope: what was changed: the store, or store and head.
        at: when, ISO 8601 in UTC.
        notes: what it did not reach.
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

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        pairs = zip(self.old_labels, self.labels, strict=False)
        for label in [f"{old} → {new}" for old, new in pairs] or self.labels:
            counts[label] = counts.get(label, 0) + 1
        named = ", ".join(f"{count} of {label}" for label, count in counts.items())
        new = f" New classes: {', '.join(self.new_classes)}." if self.new_classes else ""
        return (
            f"{self.action}: {named or 'no rows'}; {self.rows_before:,} → {self.rows_after:,} rows,"
            f" {self.hash_before[:12]} → {self.hash_after[:12]}; reached: {self.scope}.{new}"
        )


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
    if path is None or path.stat().st_size > _LARGEST_FILE:
        return []
    try:
        return [_checked(Receipt(**entry)) for entry in json.loads(path.read_text("utf-8"))]
    except (ValueError, TypeError) as error:
        logger.warning("Expected %s to hold receipts of changes, but: %r.", path.name, error)
        return []


def _checked(receipt: Receipt) -> Receipt:
    if not all(isinstance(row_id, int) for row_id in receipt.ids):
        raise ValueError(f"ids {receipt.ids[:3]} that are not whole numbers")
    for names in (receipt.labels, receipt.old_labels, receipt.new_classes, receipt.notes):
        if not all(isinstance(name, str) for name in names):
            raise ValueError("names that are not texts")
    return receipt
