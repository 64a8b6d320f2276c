"""What a trainer's model is worth: which pictures are asked about, and which are at hand."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..data.augmentation import EpochRows
from ..data.batches import SAMPLE_ID, RowPictures
from ..features.extract import ImageFeatures
from ..fit.assess import assess
from ..fit.measure import OWN_NOTE
from ..fit.report import Report
from .rows import checked_rows

if TYPE_CHECKING:
    from .trainer import KnnTrainer

Shown = Mapping[int, Any] | None
"""Pictures by their ids, of any kind that is read; None where there are none."""


def report_of(
    trainer: "KnnTrainer",
    dataset: Any,
    features_of: Callable[[Any], ImageFeatures],
    pictures: Shown,
    stored_pictures: Shown,
) -> Report:
    """The report of one set of pictures; see `KnnTrainer.report`.

    Args:
        trainer: of the model.
        dataset: what was given.
        features_of: makes features of prepared pictures.
        pictures: by sample id; None takes those of the dataset.
        stored_pictures: by row id; None takes those of the training set.

    Raises:
        ValueError: see `KnnTrainer.report`.
    """
    model, own = trainer.model, trainer.eval_dataset
    chosen = _one_of(dataset, own)
    is_tuned_on = chosen is own and trainer.tune_result is not None
    rows = checked_rows(chosen, model)
    if stored_pictures is None and model.memory.contents is not None:  # by which they are known
        stored_pictures = _pictures_in(trainer.train_dataset)
    return assess(
        model, features_of(rows), trainer.args.device,
        pictures=_pictures_in(rows) if pictures is None else pictures,
        stored_pictures=stored_pictures, notes=[OWN_NOTE] if is_tuned_on else [],
    )  # fmt: skip


def _one_of(dataset: Any, own: Any) -> Any:
    """The one set of pictures that is asked about.

    Args:
        dataset: pictures, the name of one of several, or None.
        own: those of the trainer: one set, several by name, or None.

    Raises:
        ValueError: for none or several.
    """
    chosen = own if dataset is None else dataset
    if isinstance(chosen, str) and isinstance(own, dict) and chosen in own:
        chosen = own[chosen]
    if chosen is None or isinstance(chosen, dict | str):
        got = list(chosen) if isinstance(chosen, dict) else repr(chosen)
        raise ValueError(f"Expected one set of labelled pictures, but got {got}; pass one.")
    return chosen


def _pictures_in(rows: Any) -> RowPictures | None:
    """The pictures of a dataset by their sample ids; None of features, which have none.

    Args:
        rows: prepared, or None.
    """
    rows = rows.rows if isinstance(rows, EpochRows) else rows
    if rows is None or isinstance(rows, ImageFeatures):
        return None
    return RowPictures(rows, rows[SAMPLE_ID][:])
