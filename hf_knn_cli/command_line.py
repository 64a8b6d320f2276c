"""All commands of `hf-knn` together."""

import os
from typing import Annotated

import typer

from .caches import prepare_caches
from .demo import app as demonstration
from .label import app as labelling
from .memory import app as memory
from .serve import app as serving
from .terminal import flush_streams, prepare_streams
from .train import app as training
from .use import app as use

app = typer.Typer(
    name="hf-knn",
    help="Image classifiers that also remember: a head and its nearest neighbours, in one model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for part in (training, labelling, use, memory, demonstration, serving):
    app.add_typer(part)


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option(help="Show the whole traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ["HF_KNN_DEBUG"] = "1"


def main() -> None:
    """Entry point of the console script."""
    prepare_streams()
    prepare_caches()
    try:
        app()
    finally:
        flush_streams()
