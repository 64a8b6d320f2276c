"""`hf-knn sort`: pictures into a folder for each class, and back."""

from pathlib import Path
from typing import Annotated

import typer

from . import places
from .choices import BackendOption, JsonOption
from .limits import reads_pictures

app = typer.Typer()


@app.command()
@reads_pictures
def sort(
    inbox: Annotated[
        Path | None,
        typer.Argument(
            callback=places.inbox,
            show_default=False,
            help="Folder of pictures, looked through with all folders below it.",
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="CHECKPOINT",
            callback=places.checkpoint,
            show_default=False,
            help="What sorts them: a checkpoint folder or a Hub id.",
        ),
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            callback=places.new_report,
            show_default=False,
            help="Folder for the folders of the classes; it may hold pictures already.",
        ),
    ] = None,
    move: Annotated[
        bool, typer.Option("--move", help="Move the pictures; without it they are copied.")
    ] = False,
    link: Annotated[
        bool,
        typer.Option("--link", help="Make symbolic links to the pictures, which stay in INBOX."),
    ] = False,
    max_error: Annotated[
        float,
        typer.Option(
            help="At most this share of the pictures in folders of classes should be wrong; what "
            "is not sure enough for it goes into unsure. 1 sorts all of them.",
        ),
    ] = 0.05,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would go where.")
    ] = False,
    undo: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            callback=places.sorted_folder,
            show_default=False,
            help="Put every file back that was sorted into this folder; name nothing else.",
        ),
    ] = None,
    backend: BackendOption = None,
    json_output: JsonOption = False,
) -> None:
    """Sort the pictures of INBOX into a folder for each class, below DIR.

    Pictures that the model is not sure of go into unsure/, what is unlike anything seen into
    strange/. Nothing is overwritten: a name that is taken gets a number. What lies beside a picture
    under its name (a.xmp or a.jpg.json beside a.jpg) goes along. A picture that cannot be read
    stays where it is, and is listed.

    A journal in DIR keeps where each file came from. After a stop, the same command goes on; and
    hf-knn sort --undo DIR moves everything back, or removes the copies and links that nobody
    changed since.
    """
    if undo is not None and (inbox or checkpoint or into or move or link or dry_run):
        raise typer.BadParameter("Expected --undo DIR alone, or with --json.")
    if undo is None and None in (inbox, checkpoint, into):
        raise typer.BadParameter(
            "Expected INBOX --model CHECKPOINT --into DIR to sort pictures, or --undo DIR to take "
            "that back."
        )
    if move and link:
        raise typer.BadParameter("Expected --move or --link, but got both; pass one of them.")
    from hf_knn.commands.console import run
    from hf_knn.commands.sort import SortOptions, sort_pictures, take_back
    from hf_knn.data.carrying import How

    if undo is not None:
        run(take_back, undo, json_output, json_output=json_output)
        return
    assert inbox is not None  # or it was refused
    assert checkpoint is not None
    assert into is not None
    how = How.MOVE if move else How.LINK if link else How.COPY
    options = SortOptions(inbox, checkpoint, into, how, max_error, dry_run, json_output)
    run(sort_pictures, options, json_output=json_output)
