"""`hf-knn train`, and how it reads its options from a file."""

from pathlib import Path
from typing import Annotated

import typer

from .choices import BackendOption
from .forwarding import fields_as_options
from .limits import reads_pictures
from .terminal import one_line
from .train_options import TrainOptions

app = typer.Typer()


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Takes the options of a file as defaults."""
    if path is None:
        return None
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = one_line(f"Expected {path} to be YAML or JSON, but: {error}")
        raise typer.BadParameter(said) from error
    if not isinstance(values, dict):
        said = one_line(f"Expected {path} to hold options by name, but got a list.")
        raise typer.BadParameter(said)
    found = {str(name).replace("-", "_"): value for name, value in values.items()}
    known = {str(parameter.name) for parameter in context.command.params} - {"config"}
    unknown = sorted(set(found) - known)
    if unknown:
        said = f"Expected options of this command in {path}, but got {unknown}; known are "
        raise typer.BadParameter(one_line(f"{said}{sorted(known)}."))
    context.default_map = {**(context.default_map or {}), **found}
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        callback=_read_config,
        is_eager=True,
        exists=True,
        dir_okay=False,
        help="YAML or JSON with options of this command, by their long names; what is typed wins.",
    ),
]
"""Sets the defaults of the other options."""


@app.command()
@reads_pictures
@fields_as_options
def train(
    options: TrainOptions, config: ConfigOption = None, backend: BackendOption = None
) -> None:
    """Make a model of your own pictures: a checkpoint folder, and a report how good it is.

    What it does: compute features of all pictures (once, they are kept), fit a head on them, store
    them as the rows that neighbours are found among, choose how both answers are mixed, and
    measure all of it on pictures that were held out.
    """
    from hf_knn.commands.console import run
    from hf_knn.commands.train import train_pictures

    run(train_pictures, options)
