"""What all commands of `hf-knn` share: messages, tables, errors that say what to do, and a lock."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from transformers.utils import logging as transformers_logging

from ..data.loading import hide_progress_bars, read_labelled
from ..features.extract import ImageFeatures
from ..model.card import VOICE_NAMES
from ..store.folders import exclusive_lock

console = Console()
right = partial(Column, justify="right")
"""A column of numbers in a table."""


def run(command: Callable[..., None], *args: Any) -> None:
    """Runs a command; an error a user can do something about becomes one message.

    Args:
        command: what to run.
        args: its arguments.
    """
    hide_progress_bars()
    transformers_logging.disable_progress_bar()
    # a command says itself what a user should know; pymilvus logs the traceback of each retry
    quiet = {"hf_knn": logging.ERROR, "pymilvus": logging.CRITICAL}
    loggers = [logging.getLogger(name) for name in quiet]
    levels = [logger.level for logger in loggers]
    for logger, level in zip(loggers, quiet.values(), strict=True):
        logger.setLevel(level)
    try:
        command(*args)
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        if os.environ.get("HF_KNN_DEBUG"):
            raise
        Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}")
        raise typer.Exit(1) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def print_json(value: object) -> None:
    """What `--json` prints instead of tables."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


@contextmanager
def changing(checkpoint: Path) -> Iterator[Path]:
    """Keeps others from writing a checkpoint while a command changes it.

    Args:
        checkpoint: a folder.

    Returns:
        A context that holds the lock; its value is the folder without links.

    Raises:
        ValueError: if it is no folder.
    """
    if not checkpoint.is_dir():
        raise ValueError(
            f"Expected {checkpoint} to be a checkpoint folder, since it will be changed."
        )
    folder = checkpoint.resolve()
    with exclusive_lock(folder):
        yield folder


def metrics_table(metrics: dict[str, float], title: str, prefix: str = "eval_") -> Table:
    """Head, neighbours and blend as a table.

    Args:
        metrics: what `KnnTrainer.evaluate` returned.
        title: of the table.
        prefix: of the numbers to show.
    """
    names = map(right, ("top-1", "mean per class", "NLL", "ECE"))
    table = Table("", *names, title=title, title_justify="left")
    for voice, label in VOICE_NAMES.items():
        if f"{prefix}{voice}_top1" in metrics:
            values = [metrics[f"{prefix}{voice}_{name}"] for name in ("top1", "mean_class")]
            tail = [metrics[f"{prefix}{voice}_{name}"] for name in ("nll", "ece")]
            table.add_row(label, *[f"{v:.1%}" for v in values], *[f"{v:.3f}" for v in tail])
    return table


def open_labelled(pictures: str, splits: str) -> dict[str, Any]:
    """The labelled pictures of a command, by split; what was left out is said.

    Args:
        pictures: see `load_splits`.
        splits: `auto`, or `none` for folders that are called like splits and are classes.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: for pictures that cannot be used, or come without labels.
    """
    found = read_labelled(pictures, reading_of(splits))
    say_what_was_left_out(found.notes)
    return found.splits


def reading_of(splits: str) -> bool | None:
    """What `--splits` means for `load_splits`."""
    return False if splits == "none" else None


def say_what_was_left_out(notes: Sequence[str]) -> None:
    """Prints what a loader noticed.

    Args:
        notes: in sentences.
    """
    for note in notes:
        Console(stderr=True).print(
            f"[yellow]Note:[/] {escape(note)}", soft_wrap=True, highlight=False
        )


def say_what_was_skipped(rows: ImageFeatures) -> None:
    """Names each picture that could not be used.

    Args:
        rows: features of the others.
    """
    for row in rows.skipped:
        place = escape(row.path or f"row {row.row}")
        console.print(f"[yellow]Skipped[/] {place}: {escape(row.reason)}.")
