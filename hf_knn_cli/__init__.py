"""The `hf-knn` command: declarations only, so that `--help` answers without importing torch.

An option is declared once: as a parameter of its command or, of `train`, as a field of
`TrainOptions`; what every command takes, in `everywhere.py`. What a command does is a function of
`hf_knn.commands`, imported when it runs. `backbones.py` is a table that `hf_knn` reads too.
"""

import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .command_line import app as app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the console script; Ctrl-C is heard of while it still imports, too."""
    try:
        from .command_line import run_command_line

        try:
            run_command_line()
        finally:  # what is done is done: nothing is left that Ctrl-C could stop
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        import sys

        print("Stopped before anything was done.", file=sys.stderr)
        raise SystemExit(130) from None


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .command_line import app

    return app
