"""`hf-knn evaluate`: a checkpoint on labelled pictures, in numbers and as a report."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from rich.table import Table
from transformers import PrinterCallback

from ..data.batches import RowPictures
from ..data.decode import decode_image
from ..data.folders import SPLIT_NAMES
from ..data.loading import prepare
from ..data.walk import StoredPictures
from ..features.extract import ImageFeatures, extract_features, progress_bars
from ..fit.intervals import Number, share_of
from ..fit.measure import WITHOUT_STORED, stored_places
from ..fit.report import Report
from ..model.card import VOICE_NAMES
from ..model.modeling import KnnForImageClassification
from ..model.stored import shown
from ..store.backend import RowStore, as_row_store
from ..training.arguments import KnnTrainingArguments
from ..training.trainer import KnnTrainer
from .console import (
    console,
    escape,
    open_checkpoint,
    open_labelled,
    print_json,
    right,
    say_what_was_skipped,
    typed,
)
from .devices import trains_on_cpu
from .stopping import FEATURES_KEPT, stands

_CAPTION = (
    "top-1: how often it is right. NLL, ECE: how wrong its probabilities are, 0 is best. ± and "
    "ranges hold the true number in 95 of 100 cases."
)

MOST_NAMED = 20
"""Pictures that a message names."""


class Opened(NamedTuple):
    """A model, and labelled pictures to ask it about.

    Attributes:
        model: from a checkpoint.
        rows: features of the pictures that can be used.
        pictures: all of them, decoded when asked for, by sample id.
    """

    model: KnnForImageClassification
    rows: ImageFeatures
    pictures: RowPictures


def evaluate_pictures(
    checkpoint: str,
    pictures: str,
    split: str | None,
    on_bad_image: str,
    json_output: bool,
    splits: str = "auto",
    html: Path | None = None,
    report: Path | None = None,
    stored: Path | None = None,
) -> None:
    """Measures a checkpoint on labelled pictures.

    Args:
        checkpoint: a folder or a Hub id.
        pictures: see `load_splits`.
        split: which one; None takes `test`, else the only one there is.
        on_bad_image: `fail` or `skip`.
        json_output: print JSON instead of a table.
        splits: how folders called like splits are read, `auto` or `none`.
        html: a file for the page of the report; None writes none.
        report: a folder for the page and its JSON; None writes none.
        stored: the folder that the stored paths are relative to, to show neighbours; None looks
            where the pictures lie.

    Raises:
        ValueError: for pictures that cannot be used, or labels that the model does not have.
        OSError: if something is not there or cannot be written.
    """
    model, rows, own = open_split(checkpoint, pictures, split, "test", splits, on_bad_image)
    with tempfile.TemporaryDirectory() as folder:
        trainer = KnnTrainer(model, silent_arguments(folder))
        trainer.remove_callback(PrinterCallback)
        metrics = trainer.evaluate(rows)
        neighbors = _stored_pictures(model, pictures, stored)
        found = trainer.report(rows, pictures=own, stored_pictures=neighbors)
    names = stored_names(model, rows) if found.stored else []
    pages = [] if html is None else [found.write_page(html)]
    pages += [] if report is None else [found.save(report)]
    if json_output:
        print_json(
            metrics
            | {
                "stored_pictures": names,
                "intervals": found.intervals(),
                "comparisons": [
                    asdict(each) | {"is_shown": each.is_shown} for each in found.comparisons
                ],
                "reports": [str(page) for page in pages],
            }
        )
        return
    print_measured(found, f"{len(rows)} pictures", names)
    if found.stored < len(rows):
        _print_together(found)
    for page in pages:
        console.print(f"Next: open [bold]{escape(str(page))}[/]", soft_wrap=True)
    if not pages and found.wrong:
        words = typed("evaluate", checkpoint, pictures, "--report", "REPORT")
        console.print(f"Next: see what is answered wrong: [bold]{words}[/]", soft_wrap=True)


def stored_names(model: KnnForImageClassification, rows: ImageFeatures) -> list[str]:
    """What the pictures are called that a model has in its datastore.

    Args:
        model: with a datastore or without.
        rows: the pictures.
    """
    paths = rows.paths or [""] * len(rows)
    return [paths[place] or f"row {place}" for place in stored_places(model, rows).tolist()]


def print_measured(report: Report, pictures: str, stored: Sequence[str] = ()) -> None:
    """Head, neighbours and blend; where pictures are stored, first without these.

    Args:
        report: of the pictures.
        pictures: how many and which, such as `71 test pictures`.
        stored: the names of those that are stored, where they are known.
    """
    if not report.stored:
        console.print(_table(report.voices, report.count, pictures))
        _print_comparisons(report)
        return
    names = f": {escape(shown(stored, MOST_NAMED))}" if stored else ""
    console.print(
        f"[yellow]{report.stored} of these {pictures} are stored in the model[/], and each of them "
        f"is its own nearest neighbour{names}.",
        soft_wrap=True,
    )  # fmt: skip
    all_voices, count = report.voices, report.count
    if report.with_stored:
        title = f"Without them: {pictures} less {report.stored}"
        console.print(_table(report.voices, report.count, title))
        _print_comparisons(report)
        all_voices, count = report.with_stored, report.count + report.stored
    else:
        console.print("No picture is left to measure it on; pass others.")
    title = "With them: what the model remembers, not what it can do"
    console.print(_table(all_voices, count, title))


def _table(voices: dict[str, dict[str, Number]], count: int, title: str) -> Table:
    """Head, neighbours and blend with 95 % intervals.

    Args:
        voices: see `Report.voices`.
        count: pictures.
        title: of the table.
    """
    names = map(right, ("top-1", "mean per class", "NLL", "ECE"))
    table = Table("", *names, title=title, title_justify="left", caption=_CAPTION)
    for voice, numbers in voices.items():
        shares = (numbers[name].say_share(count) for name in ("top1", "mean_class"))
        table.add_row(
            VOICE_NAMES[voice], *shares, numbers["nll"].say(), f"{numbers['ece'].value:.3f}"
        )
    return table


def _print_comparisons(report: Report) -> None:
    for each in report.comparisons[:2]:
        console.print(each.say(VOICE_NAMES), highlight=False, soft_wrap=True)


def _print_together(report: Report) -> None:
    """How often both voices err, and what choosing between them could reach at best."""
    prefix = f"eval_{WITHOUT_STORED}" if report.with_stored else "eval_"
    if f"{prefix}both_wrong" not in report.metrics:
        return
    wrong, best = (
        share_of(round(report.metrics[f"{prefix}{name}"] * report.count), report.count)
        for name in ("both_wrong", "oracle")
    )
    console.print(
        f"Head and neighbours are both wrong at {wrong.say_share(report.count)}; whoever chose the "
        f"right one of them each time would be right at {best.say_share(report.count)}.",
        highlight=False,
    )  # fmt: skip


def open_split(
    checkpoint: str, pictures: str, split: str | None, usual: str, how: str, on_bad_image: str
) -> Opened:
    """A model and one split of labelled pictures: the usual or the only one.

    Args:
        checkpoint: a folder or a Hub id.
        pictures: see `load_splits`.
        split: which one; None takes the usual, else the only one there is.
        usual: its name.
        how: how folders called like splits are read, `auto` or `none`.
        on_bad_image: `fail` or `skip`.

    Raises:
        ValueError: for a split that is not there, or pictures that cannot be used.
        OSError: if something is not there.
    """
    wanted = usual if split is None else SPLIT_NAMES.get(split.casefold(), split)
    model = open_checkpoint(checkpoint)
    splits = open_labelled(pictures, how, wanted)
    if split is None and len(splits) == 1:
        wanted = next(iter(splits))
    if wanted not in splits:
        raise ValueError(f"Expected a split {wanted!r}, but {pictures} has {sorted(splits)}.")
    dataset = prepare(splits[wanted], model.config.class_names)
    stands(FEATURES_KEPT)
    with progress_bars():
        rows = extract_features(model, dataset, on_bad_image=on_bad_image)
    say_what_was_skipped(rows)
    return Opened(model, rows, RowPictures(dataset, rows.ids.tolist()))


def silent_arguments(folder: str) -> KnnTrainingArguments:
    """Arguments of a trainer that says nothing itself.

    Args:
        folder: of the trainer.
    """
    return KnnTrainingArguments(
        folder, freeze_backbone=True, report_to=[], disable_tqdm=True, logging_strategy="no",
        use_cpu=trains_on_cpu(),
    )  # fmt: skip


class _PicturesByPath(Mapping[int, Image.Image]):
    """Stored pictures by row id, found below a folder by their paths."""

    def __init__(self, store: RowStore, folder: Path) -> None:
        self._store, self._pictures = store, StoredPictures(folder)

    def __getitem__(self, row_id: int) -> Image.Image:
        path = self._pictures.find(self._store.path_of(row_id))
        if path is None:
            raise KeyError(row_id)
        return decode_image(path)

    def __iter__(self) -> Iterator[int]:
        return iter(self._store.ids.tolist())

    def __len__(self) -> int:
        return len(self._store)


def _stored_pictures(
    model: KnnForImageClassification, pictures: str, folder: Path | None
) -> _PicturesByPath | None:
    """Stored pictures, where they are looked for; beside the pictures only if prints tell them."""
    if model.datastore is None:
        return None
    beside = Path(pictures).expanduser()
    if folder is None and (model.memory.contents is None or not beside.exists()):
        return None
    place = folder or (beside if beside.is_dir() else beside.parent)
    return _PicturesByPath(as_row_store(model.datastore), place)
