"""The demo: a page around a checkpoint, here or as a Space of the Hub."""

from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None, beside: Path | None = None) -> int:
    """Opens the page around a checkpoint and waits until it is closed.

    Args:
        arguments: of the command line; None takes the process's.
        beside: the folder of app.py, which may hold `model`, `model.txt`, `pictures.zip`,
            `examples` and `results`; None where there is none.

    Returns:
        The exit status.
    """
    from .command import main as start  # gradio and torch are imported when a page is wanted

    return start(arguments, beside)
