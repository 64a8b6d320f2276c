"""Which head a trainer trains, and those it fits at once: a closed form, or the best of a grid."""

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from ..core.backbone import split_features
from ..core.config import CLOSED_FORM, Head
from ..features.extract import ImageFeatures
from ..fit.choice import HeadChoice
from ..fit.grids import ProbeGrid, ProbeSettings
from ..fit.heads import (
    PROBE_GRIDS,
    Part,
    fit_closed_form,
    fit_probe,
    own_votes,
    put_fresh_head,
    sweep,
)
from ..fit.sweep import ProbeChoice
from ..model.modeling import KnnForImageClassification
from .arguments import KnnTrainingArguments
from .rows import folds_of, store_of

PartsOf = Callable[[ImageFeatures, ProbeGrid], Iterator[Part]]
"""From all rows and a grid to what is fitted and chosen on."""


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
    for fold in folds_of(features, args):
        yield part(features.select(fold.fitted), features.select(fold.held_out))


OF_DESCENT = ("optimizers", "optimizer_cls_and_kwargs", "compute_loss_func")
"""What a `Trainer` can be given that only a head uses which is trained by gradients."""


def chooses_head(model: KnnForImageClassification, args: KnnTrainingArguments) -> bool:
    """Whether heads are compared: nobody named one, or asked for what only one of them has.

    Args:
        model: to be trained.
        args: of the training.
    """
    is_named = model.has_named_head or args.named_head is not None
    return args.freeze_backbone and not is_named and not args.of_descent


def settle_head(model: KnnForImageClassification, args: KnnTrainingArguments) -> None:
    """Gives a model the head that is to be trained: the one that was named, else a linear one.

    Args:
        model: gets a new head where it has another one.
        args: of the training.

    Raises:
        ValueError: if arguments and model name different ones.
    """
    named, config = args.named_head, model.config
    if not model.has_named_head:
        wanted = named or Head.LINEAR
        if config.head != wanted:
            put_fresh_head(model, wanted, args.seed)
    elif named not in (None, model.config.head):
        raise ValueError(
            f"Expected arguments and model to name one head, but got {str(named)!r} and "
            f"{model.config.head!r}; leave out `head` in the arguments, or make a model with "
            f"`from_backbone(…, head={str(named)!r})`."
        )


def check_at_once(args: KnnTrainingArguments, head: str, resume: str | bool | None) -> None:
    """Refuses options that mean nothing where a head is fitted at once.

    Raises:
        ValueError: naming them.
    """
    if not args.freeze_backbone or resume:
        raise ValueError(
            "Expected `freeze_backbone` to be True and no checkpoint to resume from for a head "
            f"that is fitted at once (head={head!r}, probe_grid={args.probe_grid!r})."
        )
    if head in CLOSED_FORM and args.of_descent:
        raise ValueError(
            f"Expected no {_listed(args.of_descent)} for a {head} head, which is solved in closed "
            "form; leave it out, or name a linear head."
        )


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def fit_at_once(
    model: KnnForImageClassification,
    features: ImageFeatures,
    args: KnnTrainingArguments,
    parts_of: PartsOf,
    choice: ProbeChoice | None,
    head_choice: HeadChoice | None = None,
) -> tuple[dict[str, float], ProbeChoice | None]:
    """Fits a head and puts it into the model.

    Args:
        model: with a datastore of the rows.
        features: the rows.
        args: of the training.
        parts_of: folds, or one part with a validation set.
        choice: which head of the grid is best, if that is known already.
        head_choice: how the head was chosen, if it was, which may say what to fit it with.

    Returns:
        Numbers to log, with the cross-entropy on the rows as `loss`; and the choice, if there was
        one to make.
    """
    if model.config.head in CLOSED_FORM:
        cell = None if head_choice is None else head_choice.fixed
        fit = fit_closed_form(model, features, args.class_weights, args.seed, cell)
        facts = {"regularizer": fit.regularizer, "temperature": fit.temperature}
    else:
        choice, facts = _fit_best_probe(model, features, args, parts_of, choice)
    model.eval()
    head_part, _ = split_features(features.features, model.config)
    with torch.inference_mode():
        logits = model.head(head_part.to(args.device)).float().cpu()
    return facts | {"loss": float(functional.cross_entropy(logits, features.labels))}, choice


def _fit_best_probe(
    model: KnnForImageClassification,
    features: ImageFeatures,
    args: KnnTrainingArguments,
    parts_of: PartsOf,
    choice: ProbeChoice | None,
) -> tuple[ProbeChoice, dict[str, float]]:
    grid, settings = _grid_of(model, args)
    if choice is None:
        parts = parts_of(features, grid)
        choice = sweep(parts, model, grid, settings, not args.disable_tqdm)
    config = choice.score.config
    votes = own_votes(lambda rows: store_of(rows, model.config, args), features, model, [config])
    fit_probe(model, features, votes, config, settings)
    return choice, {
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "alpha": config.alpha,
        "held_out_accuracy": choice.score.accuracy,
    }


def _grid_of(
    model: KnnForImageClassification, args: KnnTrainingArguments
) -> tuple[ProbeGrid, ProbeSettings]:
    """What is tried, and how heads are trained: the named grid with the trainer's own settings."""
    assert args.probe_grid is not None
    grid, settings = PROBE_GRIDS[args.probe_grid]
    sizes = model.config.head_hidden_sizes
    return grid, dataclasses.replace(
        settings, seed=args.seed, class_weighting=args.class_weights,
        label_smoothing=args.label_smoothing_factor, hidden_layers=len(sizes),
        hidden_width=sizes[0] if sizes else None, knn_loss_clamp=args.knn_loss_clamp,
        knn_loss_normalize=args.knn_loss_normalize,
    )  # fmt: skip
