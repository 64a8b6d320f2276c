"""All commands of `hf-knn` together."""

import typer

from .about import app as about
from .caches import prepare_caches
from .demo import app as demonstration
from .everywhere import Commands, options_everywhere
from .memory import app as memory
from .serve import app as serving
from .terminal import flush_streams, prepare_streams
from .train import app as training
from .use import app as use

EXIT_CODES = (
    "Exit codes: 0 done; 1 an error, which is printed; 2 a command line that cannot be understood; "
    "3 doctor found what --fail-on names; 130 stopped by Ctrl-C."
)

app = typer.Typer(
    name="hf-knn",
    cls=Commands,
    help="Image classifiers that also remember: a head and its nearest neighbours, in one model.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for part in (training, use, memory, demonstration, serving, about):
    app.add_typer(part)
app.callback()(options_everywhere)


def run_command_line() -> None:
    """Runs the command that was typed."""
    prepare_streams()
    prepare_caches()
    try:
        app()
    finally:
        flush_streams()
