"""`hf-knn teach | undo | log | refit | merge | diff`: each change whole or not."""

import shlex
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ..core.manifest import MANIFEST_NAME
from ..core.plain_json import read_json
from ..core.reading import CONTENTS_NAME, HubFiles
from ..data.batches import RowPictures
from ..data.loading import from_files
from ..features.extract import extract_features, progress_bars
from ..fit.heads import refit
from ..fit.measure import rows_but
from ..milvus.datastore import MilvusDatastore
from ..milvus.pending import settle, whole_or_not
from ..model.before import kept_versions
from ..model.compare import Difference, compare
from ..model.contents import Contents
from ..model.modeling import KnnForImageClassification
from ..model.receipts import CHANGES_NAME, Change, Receipt, Scope, history, load_changes
from ..model.stored import StoredOtherwiseError
from ..model.versions import check_steps, exchange_versions, goes_back_to_training
from ..store.backend import RowStore
from ..store.datastore import Datastore
from ..store.remote import is_pending, read_manifest
from .console import (
    Terminal,
    as_called,
    changing,
    console,
    escape,
    open_checkpoint,
    open_labelled,
    print_json,
    say_what_was_left_out,
    say_what_was_skipped,
    typed,
)
from .stopping import FEATURES_KEPT, stands

_SHOWN = 20
_TAKEN_BACK = "A half-done change was taken back: the checkpoint is as it was last saved."

CLASSES_NAME = "classes.json"
"""What the label numbers of a backup mean, beside its datastore."""


def teach_pictures(
    checkpoint: Path,
    pictures: Path,
    label: str | None,
    on_bad_image: str,
    json_output: bool,
    splits: str = "auto",
    again: bool = False,
    relabel: bool = False,
) -> None:
    """Adds labelled pictures to a checkpoint, of which those that are stored are left out.

    Args:
        checkpoint: a folder.
        pictures: see `load_splits`; with a label also one picture, or a folder of pictures.
        label: of all of them; None takes the labels that come with them.
        on_bad_image: `fail` or `skip`.
        json_output: print the receipt as JSON.
        splits: how folders called like splits are read, `auto` or `none`.
        again: also add those that are stored with their label.
        relabel: give those that are stored with another label the new one.

    Raises:
        ValueError: for pictures or labels that cannot be used; nothing is changed.
    """

    def change(model: KnnForImageClassification) -> Receipt:
        rows = _labelled(pictures, splits) if label is None else _of_label(pictures, label)
        stands(FEATURES_KEPT)
        with progress_bars():
            found = extract_features(model, rows, on_bad_image=on_bad_image, progress=True)
        say_what_was_skipped(found)
        names = rows.features["label"].names
        labels = [names[number] for number in found.labels.tolist()]
        try:
            receipt = model.teach(
                features=found.features, contents=found.contents, labels=labels,
                paths=found.paths or None, again=again, relabel=relabel,
            )  # fmt: skip
        except StoredOtherwiseError as error:
            raise ValueError(_how_to_relabel(error, checkpoint)) from error
        if model.thumbnails is not None:
            taken = found.ids[rows_but(len(found), torch.tensor(receipt.skipped).long())]
            ids = receipt.ids[len(receipt.old_labels) :]
            model.keep_thumbnails(RowPictures(rows, ids, taken.tolist()))
        return receipt

    receipt = change_checkpoint(checkpoint, change, json_output)
    if json_output:
        return
    if receipt.scope == Scope.NOTHING:
        console.print("Nothing was changed.")
    else:
        console.print(
            f"Next: [bold]{typed('predict', checkpoint, 'PICTURE.jpg')}[/], or "
            f"{typed('undo', checkpoint)}",
            soft_wrap=True,
        )


def undo_change(checkpoint: Path, steps: int, training: bool, json_output: bool) -> None:
    """Takes the last changes of a checkpoint back; an interrupted one is the first of them.

    Where nothing was changed since the last training, one more step puts the version before that in
    its place again, if it is kept; called once more, the two are exchanged again.

    Args:
        checkpoint: a folder.
        steps: how many, from 1; all of them are possible, or none is taken.
        training: go back to the version before the last training, whatever was changed since.
        json_output: print the receipt as JSON; of several steps, a list.

    Raises:
        ValueError: if there is less to take back.
    """
    with changing(checkpoint) as folder:
        if training and not is_pending(folder):
            receipts = [exchange_versions(folder)]
        else:
            receipts = _taken_back(checkpoint, folder, steps)
    if json_output:
        print_json(asdict(receipts[0]) if steps == 1 else [asdict(one) for one in receipts])
        return
    for receipt in receipts:
        say_receipt(receipt, json_output)


def _taken_back(checkpoint: Path, folder: Path, steps: int) -> list[Receipt]:
    """The receipts of some steps back; the caller holds the lock of the folder."""
    if steps == 1:
        if not is_pending(folder) and goes_back_to_training(folder):
            return [exchange_versions(folder)]
        return [changed(checkpoint, folder, lambda model: model.undo(), _nothing_else)]
    receipts = []
    if is_pending(folder):
        receipts.append(changed(checkpoint, folder, lambda model: model.undo(), _nothing_else))
        steps -= 1
    path = folder / CHANGES_NAME
    count = check_steps(folder, load_changes(path) if path.is_file() else [], steps)

    def change(model: KnnForImageClassification) -> Receipt:
        if isinstance(model.datastore, MilvusDatastore):
            raise ValueError(
                "Expected one step at a time for rows in Milvus, which are changed for all who "
                "refer to them; call undo again after each."
            )
        receipts.extend(model.undo() for _ in range(count))
        return receipts[-1]

    if count:
        last = changed(checkpoint, folder, change)
        receipts[-1] = last
    if count < steps:
        receipts.append(exchange_versions(folder, steps - count))
    return receipts


def show_log(checkpoint: str, json_output: bool) -> None:
    """Says what was changed in a checkpoint since it was trained, the newest last.

    Args:
        checkpoint: a folder or a Hub id.
        json_output: print JSON.

    Raises:
        ValueError: for receipts that cannot be read.
        OSError: if a Hub id cannot be reached.
    """
    folder = Path(checkpoint)
    files = HubFiles(checkpoint, {})
    path = folder / CHANGES_NAME if folder.is_dir() else files.resolve(CHANGES_NAME)
    entries = history(load_changes(path) if path is not None and path.is_file() else [])
    if json_output:
        print_json([
            {"number": one.number, "in_words": str(one), "takes_back": one.takes_back,
             "is_taken_back": one.is_taken_back} | asdict(one.receipt) for one in entries
        ])  # fmt: skip
        return
    say = partial(console.print, soft_wrap=True, highlight=False)
    for one in entries:
        day, _, time = one.receipt.at.partition("T")
        when = escape(f"{day} {time[:5]} UTC")
        mark = " [dim](taken back)[/]" if one.is_taken_back else ""
        say(f"{one.number:>3}  {when}  {escape(one)}{mark}")
    if not entries:
        say("Nothing was changed since it was trained.")
    if not folder.is_dir():
        return
    undo = f"[bold]{typed('undo', checkpoint)}[/]"
    left = [one for one in entries
            if not one.is_taken_back and one.receipt.action != Change.UNDO]  # fmt: skip
    last = left[-1] if left else None
    kept = len(kept_versions(folder))
    if kept > 1:
        say(f"{kept} versions that trainings replaced are kept: behind the changes, a step each.")
    if is_pending(folder):
        say(f"The last change was interrupted: {undo} takes it back first.")
    elif goes_back_to_training(folder):
        say(f"{undo} exchanges this version and the one before the last training.")
    elif last is not None and last.receipt.action == Change.FORGET:
        say(f"Number {last.number} cannot be taken back: no byte of those rows was kept here.")
    elif last is not None and last.receipt.action != Change.EXCHANGE:
        say(f"{undo} takes number {last.number} back.")


def refit_head(checkpoint: Path) -> None:
    """Makes a head in closed form anew from the rows of a checkpoint.

    Args:
        checkpoint: a folder.

    Raises:
        ValueError: for another head, or rows that are not in the folder; nothing is changed.
    """
    with changing(checkpoint) as folder:
        model = KnnForImageClassification.from_pretrained(folder)
        before = model.config.head_regularizer, model.config.head_temperature
        with console.status("Fitting the head on all rows …"):
            fit = refit(model)
        model.save_pretrained(folder)
    console.print(
        f"Fitted on {len(fit.state):,} stored pictures: smoothing (regulariser) {before[0]:.3g} → "
        f"{fit.regularizer:.3g}, "
        f"temperature {before[1]:.3g} → {fit.temperature:.3g}."
    )
    console.print(
        f"Next: [bold]{typed('tune', checkpoint, 'PICTURES')}[/], to choose anew what neighbours "
        "count; until then --max-error has no threshold.", soft_wrap=True,
    )  # fmt: skip


def merge_stores(checkpoint: Path, other: str, json_output: bool) -> None:
    """Adds the rows of another checkpoint, or of a datastore, of the same backbone.

    Args:
        checkpoint: a folder, which is changed.
        other: a folder or a Hub id, which is not.
        json_output: print the receipt as JSON.

    Raises:
        ValueError: for another backbone, or a datastore that nobody knows the backbone of.
    """

    def change(model: KnnForImageClassification) -> Receipt:
        if _holds_datastore_alone(other):
            store = Datastore.from_pretrained(other)
            _check_maker(store, checkpoint, other)
            kept = Path(other) / CONTENTS_NAME  # believed of the rows that it was made with
            known = Contents.load(kept if kept.is_file() else None)
            return model.merge(store, _classes_of(Path(other)), known)
        second = open_checkpoint(other)
        rows, names = store_of(second, Path(other)), second.config.class_names
        return model.merge(rows, names, second.memory.contents)

    change_checkpoint(checkpoint, change, json_output)


def show_difference(first: str, second: str, json_output: bool) -> None:
    """Says what differs between two checkpoints.

    Args:
        first: a folder or a Hub id.
        second: another one.
        json_output: print JSON.
    """
    models = [open_checkpoint(name) for name in (first, second)]
    found = compare(models[0], models[1])
    if json_output:
        print_json(asdict(found))
        return
    if found.is_nothing:
        console.print("Both are the same.")
        return
    console.print(_difference_table(found))
    if not found.same_backbone:
        console.print("[yellow]The backbones differ: rows of one mean nothing to the other.[/]")


def _nothing_else(model: KnnForImageClassification) -> Receipt:
    """What `undo` did where it found an interrupted change, which no receipt speaks of."""
    state, store = model.fingerprint_rows(), model.datastore
    assert store is not None  # it has just been counted
    return Receipt.nothing(Change.UNDO, len(store), state, ["nothing else was undone"])


def change_checkpoint(
    checkpoint: Path, change: Callable[[KnnForImageClassification], Receipt], json_output: bool
) -> Receipt:
    """Opens, changes and saves a checkpoint as one: nobody else writes it meanwhile.

    Args:
        checkpoint: a folder.
        change: changes the model and returns the receipt.
        json_output: print the receipt as JSON.
    """
    with changing(checkpoint) as folder:
        receipt = changed(checkpoint, folder, change)
    return say_receipt(receipt, json_output)


def changed(
    checkpoint: Path,
    folder: Path,
    change: Callable[[KnnForImageClassification], Receipt],
    after_settling: Callable[[KnnForImageClassification], Receipt] | None = None,
) -> Receipt:
    """The receipt of a change, which is saved then.

    Args:
        checkpoint: a folder.
        folder: the same without links; the caller holds its lock.
        change: changes the model; where its receipt says that nothing was, nothing is saved.
        after_settling: called instead, if an interrupted change was taken back.

    Raises:
        ValueError: for rows that cannot be changed as one with the folder.
    """
    was_interrupted = settle(folder)
    if was_interrupted:
        Terminal(stderr=True).print(_TAKEN_BACK, soft_wrap=True)
    model = open_checkpoint(checkpoint)
    store = store_of(model, checkpoint)
    if store.location is not None and not isinstance(store, MilvusDatastore):
        raise ValueError(
            f"Expected rows beside the checkpoint or in Milvus, to change both as one, but got "
            f"rows in {store.location}; change them in Python and save the model."
        )
    if was_interrupted and after_settling is not None:
        return after_settling(model)
    with whole_or_not(store if isinstance(store, MilvusDatastore) else None, folder):
        receipt = change(model)
        if receipt.scope == Scope.NOTHING:
            return receipt
        model.save_pretrained(checkpoint)
    return model.changes[-1]  # the save may have noted something


def say_receipt(receipt: Receipt, json_output: bool) -> Receipt:
    """Prints what was done.

    Args:
        receipt: of a change.
        json_output: print it as JSON.
    """
    if json_output:
        print_json(asdict(receipt))
        return receipt
    console.print(escape(str(receipt)), soft_wrap=True)
    if receipt.ids and receipt.action != Change.FORGET:
        shown = ", ".join(map(str, receipt.ids[:_SHOWN]))
        console.print(f"Ids: {shown}{', …' if len(receipt.ids) > _SHOWN else ''}", soft_wrap=True)
    for note in receipt.notes:
        console.print(f"Note: {escape(as_called(note))}.", soft_wrap=True)
    return receipt


def _how_to_relabel(error: StoredOtherwiseError, checkpoint: Path) -> str:
    """What was refused, with the commands that do it."""
    place, rows = shlex.quote(str(checkpoint)), sum(map(len, error.moves.values()))
    if rows > _SHOWN:
        return f"{error.problem} Nothing was changed; --relabel gives all {rows:,} the new label."
    commands = [
        f"`hf-knn relabel {place} --ids {','.join(map(str, ids))} --label {shlex.quote(label)}`"
        for label, ids in error.moves.items()
    ]
    return (
        f"{error.problem} Nothing was changed; {' and '.join(commands)} gives them the new label, "
        "and this command with --relabel does that and teaches the rest."
    )


def _labelled(pictures: Path, how: str) -> Any:
    """Pictures that come with their labels: of a split `train`, or the only one there is."""
    splits = open_labelled(str(pictures), how)
    if len(splits) > 1 and "train" not in splits:
        raise ValueError(f"Expected {pictures} to have one split, but got {list(splits)}.")
    name = "train" if "train" in splits else next(iter(splits))
    others = [other for other in splits if other != name]
    if others:
        said = ", ".join(f"{other} ({len(splits[other])} pictures)" for other in others)
        say_what_was_left_out([f"Only the split {name} is taught; left out: {said}."])
    return splits[name]


def _of_label(pictures: Path, label: str) -> Any:
    """One picture, or all below a folder, under one label."""
    found = from_files(pictures, label)
    say_what_was_left_out(found.notes)
    return found.splits["train"]


def store_of(model: KnnForImageClassification, place: Path) -> RowStore:
    """The rows of a model.

    Args:
        model: that was opened.
        place: its checkpoint.

    Raises:
        ValueError: if it has none.
    """
    if model.datastore is None:
        raise ValueError(f"Expected {place} to hold a datastore, but it has none.")
    return model.datastore


def _classes_of(folder: Path) -> list[str] | None:
    """The classes of a backup; None for a datastore that does not say what its numbers mean."""
    path = folder / CLASSES_NAME
    return read_json(path) if path.is_file() else None


def _holds_datastore_alone(name: str) -> bool:
    folder = Path(name)
    return (folder / MANIFEST_NAME).is_file() and not (folder / "config.json").is_file()


def _check_maker(store: Datastore, checkpoint: Path, other: str) -> None:
    """Refuses rows of another backbone, as far as their manifest says whose they are."""
    ours = read_manifest(checkpoint / MANIFEST_NAME).binding
    theirs = store.binding
    if theirs is not None and ours is not None and theirs.fingerprint != ours.fingerprint:
        raise ValueError(
            f"Expected rows of the backbone {ours.fingerprint[:12]}…, but {other} has rows of "
            f"{theirs.fingerprint[:12]}…."
        )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _difference_table(found: Difference) -> Table:
    table = Table("", "what", title="From the first to the second", title_justify="left")
    for name in ("added", "removed", "changed"):
        ids = getattr(found, name)
        if ids:
            shown = ", ".join(map(str, ids[:_SHOWN]))
            more = ", …" if len(ids) > _SHOWN else ""
            table.add_row(f"rows {name}", f"{len(ids):,}: ids {shown}{more}")
    if found.relabelled:
        shown = ", ".join(f"{i}: {old} → {new}" for i, old, new in found.relabelled[:_SHOWN])
        table.add_row("rows relabelled", escape(f"{len(found.relabelled):,}: {shown}"))
    for name, names in (("new", found.new_classes), ("lost", found.lost_classes)):
        if names:
            table.add_row(f"{name} classes", escape(", ".join(names[:_SHOWN])))
    for name, (old, new) in (found.settings | found.metrics).items():
        table.add_row(name, escape(f"{_short(old)} → {_short(new)}"))
    table.add_row("backbone", "same" if found.same_backbone else "[red]another one[/]")
    table.add_row("head", "same" if found.same_head else "changed")
    return table
