"""What all commands of `hf-knn` share: messages, tables, and errors that say what to do."""

import logging
import os
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils import logging as transformers_logging

from ..data.loading import hide_progress_bars
from ..features.extract import ImageFeatures
from ..model.card import VOICE_NAMES

console = Console()


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


def metrics_table(metrics: dict[str, float], title: str) -> Table:
    """Head, neighbours and blend as a table.

    Args:
        metrics: what `KnnTrainer.evaluate` returned.
        title: of the table.
    """
    table = Table(title=title, title_justify="left")
    for column in ("", "top-1", "mean per class", "NLL", "ECE"):
        table.add_column(column, justify="left" if not column else "right")
    for voice, label in VOICE_NAMES.items():
        if f"eval_{voice}_top1" in metrics:
            values = [metrics[f"eval_{voice}_{name}"] for name in ("top1", "mean_class")]
            tail = [metrics[f"eval_{voice}_{name}"] for name in ("nll", "ece")]
            table.add_row(label, *[f"{v:.1%}" for v in values], *[f"{v:.3f}" for v in tail])
    return table


def say_what_was_skipped(rows: ImageFeatures) -> None:
    """Names each picture that could not be used.

    Args:
        rows: features of the others.
    """
    for row in rows.skipped:
        place = escape(row.path or f"row {row.row}")
        console.print(f"[yellow]Skipped[/] {place}: {escape(row.reason)}.")
