"""What a checkpoint folder holds before a training replaces it, and the way back afterwards."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from safetensors import SafetensorError

from ..core.manifest import MANIFEST_NAME, DatastoreError, Manifest
from ..store.backend import RowStore
from ..store.datastore import Datastore
from ..store.folders import replaced_folder, restore
from ..store.remote import explain_pending, is_pending, read_manifest
from .before import (
    BEFORE_NAME,
    is_checkpoint_file,
    keep_version,
    kept_versions,
    link_version,
    refers_elsewhere,
    version_files,
)
from .checkpoint import write_card
from .memory import fingerprint_of
from .modeling import KnnForImageClassification
from .receipts import (
    CHANGES_NAME,
    PICTURES_MARK,
    ROWS_MARK,
    Change,
    Receipt,
    Scope,
    describe_changes,
    read_changes,
    standing,
    time_of_day,
    write_changes,
)

_SHOWN = 3


@dataclass(frozen=True)
class Occupant:
    """What lies in a folder that a training would replace.

    Attributes:
        problem: why nobody can tell what it was made of, or what was done to it since its training;
            empty if nothing.
        pictures: a hash of the pictures that it was trained on; empty if unknown.
        about: how many rows of what.
        is_kept: whether the version can be kept for `undo`.
        lost: what was done to the version before it, which is kept no longer then.
    """

    problem: str
    pictures: str = ""
    about: str = "a model"
    is_kept: bool = True
    lost: str = ""

    def __str__(self) -> str:
        """What became of it, once it was replaced."""
        said = f"Replaced what was there ({self.about})."
        if not self.is_kept:
            said += " That version is not kept; its rows stay on the server."
        return said + (
            f" A version before that one is gone; in it {self.lost}." if self.lost else ""
        )


def occupant_of(folder: Path, keep: int = 1) -> Occupant | None:
    """What a training into a folder would replace; None for nothing but a user's own files.

    Args:
        folder: it need not exist.
        keep: how many versions will be kept.

    Raises:
        NotADirectoryError: if it is a file.
    """
    restore(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(
            f"Expected {folder} to be a folder, but got a file; choose another --output."
        )
    if not version_files(folder):
        return None
    try:
        return _occupant(folder, keep)
    except (OSError, ValueError, SafetensorError) as error:
        return Occupant(f"it cannot be opened ({error})")


def _occupant(folder: Path, keep: int) -> Occupant:
    changes = read_changes(_file(folder, CHANGES_NAME))
    is_kept = not refers_elsewhere(folder)
    if is_pending(folder):
        return Occupant(f"a change of it was interrupted ({explain_pending(folder)})")
    if _file(folder, MANIFEST_NAME) is None:
        return Occupant("it holds a model that `hf-knn train` did not make")
    manifest = read_manifest(folder / MANIFEST_NAME)
    pictures = manifest.source.get(PICTURES_MARK, "")
    dataset = manifest.source.get("dataset")
    about = f"{manifest.num_rows:,} rows" + (f" of {dataset}" if dataset else "")
    done = describe_changes(changes)
    if done:
        problem = f"since it was trained, {done}"
    elif not pictures:
        problem = "it does not say which pictures it was trained on"
    elif isinstance(manifest, Manifest) and _hash_of(folder) != manifest.source.get(ROWS_MARK):
        problem = "its rows were changed since it was trained"
    else:
        problem = ""
    dropped = [read_changes(_file(one, CHANGES_NAME)) for one in kept_versions(folder)[keep - 1 :]]
    lost = next(filter(None, map(describe_changes, dropped)), "")
    return Occupant(problem, pictures, about, is_kept, lost)


def check_free(folder: Path, pictures: str | None = None, keep: int = 1) -> Occupant | None:
    """Refuses to train into a folder where something would be lost.

    Args:
        folder: where the model will go; it need not exist.
        pictures: a hash of those to train on; None if it is not known yet.
        keep: how many versions will be kept.

    Returns:
        What will be replaced; None for nothing.

    Raises:
        ValueError: for a model that was changed since it was trained, or trained on other pictures.
        NotADirectoryError: if it is a file.
    """
    found = occupant_of(folder, keep)
    if found is None:
        return None
    problem = found.problem
    if not problem and pictures is not None and found.pictures != pictures:
        problem = f"it holds {found.about}, trained on other pictures"
    if not problem:
        return found
    back = f" (`hf-knn undo {folder}` brings it back)" if found.is_kept else ""
    raise ValueError(
        f"Expected {folder} to be free or to hold a model of the same pictures, as it was trained, "
        f"but {problem}; pass --overwrite to replace it{back}, or choose another --output."
    )


def mark_training(store: RowStore, pictures: str) -> None:
    """Notes what a training made rows of, so that a change of either is seen.

    Args:
        store: as the training left it.
        pictures: a hash of the pictures.
    """
    marks = {PICTURES_MARK: pictures, ROWS_MARK: fingerprint_of(store)}
    store.source = store.source | marks


def goes_back_to_training(folder: Path) -> bool:
    """Whether the last thing done to a checkpoint was a training, or the undoing of one."""
    left = standing(read_changes(_file(folder, CHANGES_NAME)))
    return (folder / BEFORE_NAME).is_dir() and (not left or left[-1].action == Change.EXCHANGE)


def check_steps(folder: Path, changes: Sequence[Receipt], steps: int) -> int:
    """Refuses to go back further than somebody can.

    Args:
        folder: of a checkpoint.
        changes: all its receipts, oldest first.
        steps: how many are wanted, from 1.

    Returns:
        How many of them are changes; the rest are trainings.

    Raises:
        ValueError: if there are fewer steps, or rows were forgotten in one of them.
    """
    left = [*reversed(standing(changes))]
    left = [*takewhile(lambda receipt: receipt.action != Change.EXCHANGE, left)]
    kept = len(kept_versions(folder))
    if steps > len(left) + kept:
        raise ValueError(
            f"Expected at most {len(left) + kept} steps back ({len(left)} changes and {kept} kept "
            "versions), "
            f"but got {steps}; nothing was changed (`hf-knn log` lists the changes)."
        )
    for place, receipt in enumerate(left[:steps]):
        if receipt.action == Change.FORGET:
            raise ValueError(
                f"Expected {steps} changes that can be taken back, but step {place + 1} forgot "
                f"{len(receipt.ids)} rows, and no byte of them was saved; nothing was changed. "
                "Merge a backup, or go back to before the training (`hf-knn undo CHECKPOINT "
                "--training`)."
            )
    return min(steps, len(left))


def exchange_versions(folder: Path, back: int = 1) -> Receipt:
    """Puts a version before the last trainings in its place again, and keeps the present one.

    Called twice, it changes nothing. A kill at any moment leaves both as they were or exchanged.

    Args:
        folder: of a checkpoint, whose lock the caller holds.
        back: which of the versions that are kept, 1 for the last one; the others stay, in order.

    Returns:
        The receipt, also kept in the version that is put back.

    Raises:
        ValueError: if no version is kept, or the rows of the present one lie on a server.
        OSError: if it could not be written; everything is as it was.
    """
    kept = kept_versions(folder)
    if back > len(kept):
        few = f"{len(kept)} only" if kept else "none"
        raise ValueError(
            f"Expected {folder} to keep the version before a training, {back} of them, but it "
            f"keeps {few}; `hf-knn train --keep` keeps more."
        )
    before = kept.pop(back - 1)
    if refers_elsewhere(folder):
        raise ValueError(
            f"Expected rows beside {folder}, to be kept while the version before the last training "
            "is put back, but they lie on a server; copy the folder, or bring the rows home "
            "(model.datastore.to_datastore())."
        )
    model = KnnForImageClassification.from_pretrained(before)  # or it is refused: it must be whole
    receipt = _receipt(folder, model)
    model.changes = [*model.changes, receipt]
    names, present = version_files(before), version_files(folder)

    def is_owned(name: str) -> bool:
        return is_checkpoint_file(name) or name in present or name == BEFORE_NAME

    with replaced_folder(folder, is_owned) as staging:
        link_version(before, staging, names - {CHANGES_NAME})
        write_changes(model.changes, staging)
        keep_version(folder, staging, kept)
        write_card(model, folder, staging)
    return receipt


def _receipt(folder: Path, model: KnnForImageClassification) -> Receipt:
    """Of the exchange of the present version for that of a model."""
    rows = model.datastore
    try:
        now: RowStore | None = Datastore.load(folder)
    except (OSError, DatastoreError):
        now = None
    counts = [0 if store is None else len(store) for store in (now, rows)]
    done = describe_changes(model.changes)
    hashes = ["" if store is None else fingerprint_of(store) for store in (now, rows)]
    return Receipt(
        action=str(Change.EXCHANGE),
        ids=[],
        labels=[],
        rows_before=counts[0],
        rows_after=counts[1],
        hash_before=hashes[0],
        hash_after=hashes[1],
        scope=str(Scope.ALL),
        at=time_of_day(),
        notes=[
            "the version that was kept is back" + (f", in which {done}" if done else ""),
            f"the other one is kept now: `hf-knn undo {folder}` puts it back again",
        ],
    )


def _hash_of(folder: Path) -> str:
    return fingerprint_of(Datastore.load(folder))


def _file(folder: Path, name: str) -> Path | None:
    path = folder / name
    return path if path.is_file() else None
