"""Which head `hf-knn train` trains: as options say, or as a comparison says, which is shown."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Literal

from rich.table import Table

from hf_knn_cli.train_options import TrainOptions

from ..fit.choice import HeadChoice
from ..model.backbones import AUTO_HEAD
from .console import console, right

_DESCENT = ("fine_tune", "epochs", "learning_rate", "sweep", "alpha", "label_smoothing")
_USED_BY: tuple[tuple[tuple[str, ...], tuple[Literal["linear", "mlp"], ...]], ...] = (
    (("hidden",), ("mlp",)),
    (_DESCENT, ("linear", "mlp")),
)
"""Options that only some heads use; the first of these is the one that they choose."""


def with_named_head(options: TrainOptions) -> tuple[TrainOptions, str]:
    """The options with the head that others of them ask for, and a sentence that says so.

    Args:
        options: as typed.

    Returns:
        The options; the sentence is empty if they name a head, or ask for none.

    Raises:
        ValueError: for an option that the named head does not use.
    """
    said = ""
    for names, heads in _USED_BY:
        given = given_of(options, names)
        if not given:
            continue
        if options.head == AUTO_HEAD:
            options = replace(options, head=heads[0])
            said = f"The head is {heads[0]}, which {listed(given)} asks for."
        elif options.head not in heads:
            raise ValueError(
                f"Expected a head of {list(heads)} with {listed(given)}, but got "
                f"--head {options.head}, which does not use it; change one of them."
            )
    return options, said


def given_of(options: TrainOptions, names: Sequence[str]) -> list[str]:
    """Those of some options that are not at their defaults.

    Args:
        options: as typed.
        names: of fields.
    """
    defaults: dict[str, Any] = {
        each.name: [] if callable(each.default_factory) else each.default
        for each in fields(options)
    }
    return [name for name in names if getattr(options, name) != defaults[name]]


def listed(names: Sequence[str]) -> str:
    """Options as they are typed."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def print_choice(choice: HeadChoice) -> None:
    """Prints the table that a head was chosen by.

    Args:
        choice: of a trainer.
    """
    if choice.table:
        columns = ("alone", "with neighbours", "which count", "log-likelihood")
        table = Table(
            "head",
            *map(right, columns),
            "",
            title="How often each head is right on pictures held out",
        )
        for score in choice.table:
            best = score.best
            table.add_row(
                str(score.head), f"{score.alone.accuracy:.1%}", f"{best.accuracy:.1%}",
                f"{best.knn_weight:.0%}", f"{best.log_likelihood:.3f}",
                "chosen" if score.head == choice.head else "",
            )  # fmt: skip
        console.print(table)
    console.print(choice.say())
    for head, why in choice.left_out.items():
        console.print(f"{head} was left out: {why}.")
