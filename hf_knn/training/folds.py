"""What a run learns from a part of its rows, to be asked about the rest of them."""

import copy
from collections.abc import Callable, Iterator

from ..data.splits import Fold, stratified_folds
from ..features.extract import ImageFeatures
from ..fit.grids import ProbeGrid
from ..fit.heads import Part, own_votes
from ..fit.measure import HeldOut, ask_voices, joined
from ..model.modeling import KnnForImageClassification
from .arguments import KnnTrainingArguments
from .rows import store_of


def ask_folds(
    features: ImageFeatures,
    args: KnnTrainingArguments,
    fit: Callable[[ImageFeatures], KnnForImageClassification],
    k: int,
) -> HeldOut:
    """Asks about each row a model that has not seen it.

    Args:
        features: all rows.
        args: of the run.
        fit: a head and a datastore from some of the rows.
        k: the largest k that shall be tried.

    Raises:
        ValueError: if no class has two rows, or two groups.
    """
    parts = []
    for fold in _folds_of(features, args):
        model = fit(features.select(fold.fitted))
        parts.append(ask_voices(model, features.select(fold.held_out), k, args.device))
    return joined(parts)


def sweep_parts(
    features: ImageFeatures,
    held_out: ImageFeatures | None,
    grid: ProbeGrid,
    model: KnnForImageClassification,
    args: KnnTrainingArguments,
) -> Iterator[Part]:
    """What the heads of a sweep are fitted and chosen on: the validation set, or folds.

    Args:
        features: all rows.
        held_out: the validation set, if there is one.
        grid: of the sweep, which may need votes.
        model: with the widths.
        args: of the run.

    Raises:
        ValueError: without a validation set, if no class has two rows, or two groups.
    """

    def part(fitted: ImageFeatures, held_out: ImageFeatures) -> Part:
        votes = own_votes(lambda rows: store_of(rows, model.config, args), fitted, model, grid)
        return Part(fitted, held_out, votes)

    if held_out is not None:
        yield part(features, held_out)
        return
    for fold in _folds_of(features, args):
        yield part(features.select(fold.fitted), features.select(fold.held_out))


def quiet_arguments(args: KnnTrainingArguments, folder: str) -> KnnTrainingArguments:
    """The same recipe without saving, evaluating or talking.

    Args:
        args: of the run, which stay as they are.
        folder: the output folder.
    """
    quiet = copy.copy(args)
    changes = {
        "output_dir": folder,
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "push_to_hub": False,
        "load_best_model_at_end": False,
        "do_eval": False,
    }
    for name, value in changes.items():
        setattr(quiet, name, value)
    return quiet


def _folds_of(features: ImageFeatures, args: KnnTrainingArguments) -> list[Fold]:
    return stratified_folds(features.labels, args.tune_folds, args.seed, features.groups)
