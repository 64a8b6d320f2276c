"""All commands of `hf-knn` together."""

import typer

from .about import app as about
from .caches import prepare_caches
from .demo import app as demonstration
from .everywhere import Commands, options_everywhere
from .label import app as labelling
from .memory import app as memory
from .serve import app as serving
from .sort import app as sorting
from .terminal import flush_streams, prepare_streams
from .train import app as training
from .use import app as use

ABOUT = (
    "Image classifiers that also remember: a trained classifier, and the most similar stored "
    "pictures, which vote. Both in one model."
)

WORDS = (
    "Words. Checkpoint: the folder that holds a model. Backbone: a pretrained model that turns a "
    "picture into numbers, its features. Head: the classifier that is trained on features. "
    "Datastore: the features of the training pictures, one row each. Neighbours: the k rows that "
    "are most like a new picture. Blend: the answers of head and neighbours, mixed. Hub: "
    "huggingface.co."
)
"""Said once, for all commands."""

EXIT_CODES = (
    "Exit codes: 0 done; 1 an error, which is printed; 2 a command line that cannot be understood; "
    "3 doctor found what --fail-on names; 130 stopped by Ctrl-C."
)

app = typer.Typer(
    name="hf-knn",
    cls=Commands,
    help=f"{ABOUT}\n\n{WORDS}",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for part in (training, labelling, use, sorting, memory, demonstration, serving, about):
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
