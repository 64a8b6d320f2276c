"""The command of `hf-knn` that shows a checkpoint to people."""

from pathlib import Path
from typing import Annotated

import typer

from . import places
from .choices import Backend
from .everywhere import device_named
from .limits import reads_pictures

app = typer.Typer()


@app.command()
@reads_pictures
def demo(
    context: typer.Context,
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            callback=places.checkpoint,
            help="A checkpoint folder or a Hub id; none builds a small one, once.",
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free from 7860 on.")
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            callback=places.stored_pictures,
            help="The folder it was trained on, to show the pictures that voted; with --push "
            "small copies are sent along, for everybody to see.",
        ),
    ] = None,
    backend: Annotated[
        Backend | None,
        typer.Option(
            help="The library that runs the backbone here. Default: $HF_KNN_BACKEND, else torch."
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            callback=places.repo_id,
            help="Put the page on the Hub, as the Space org/name, instead of opening it here.",
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push: make the Space private, if it is new.")
    ] = False,
    thumbnails: Annotated[
        bool,
        typer.Option(
            "--thumbnails",
            help="With --push: take the small pictures along that the checkpoint keeps; whoever "
            "sees the Space sees them. Else they stay here.",
        ),
    ] = False,
) -> None:
    """Open a page in the browser: classify pictures, see why, and teach new ones."""
    if thumbnails and push is None:
        raise typer.BadParameter("Expected --push with --thumbnails; here they are shown anyway.")
    if push is not None and device_named(context):
        raise typer.BadParameter("Expected no --device with --push: a Space has its own hardware.")
    from hf_knn.commands.console import run
    from hf_knn.commands.demo import push_space, show_demo

    if push is None:
        run(show_demo, checkpoint, port, pictures, backend)
    elif backend is not None:
        raise typer.BadParameter(
            "not with --push: set the variable HF_KNN_BACKEND in the Space's settings, and add its "
            "package to requirements.txt there."
        )
    else:
        run(push_space, checkpoint, push, private, pictures, thumbnails)
