"""The command of `hf-knn` about what is kept to be fast; declarations only."""

from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove what is listed.")] = False,
    older_than: Annotated[
        int | None,
        typer.Option(min=0, help="Only what was not used for so many days.", show_default=False),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """List what is kept to be fast: features, graphs and choices of backends; clear it."""
    from hf_knn.commands.cache import show_cache
    from hf_knn.commands.console import run

    run(show_cache, clear, older_than, json_output)
