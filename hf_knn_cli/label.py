"""`hf-knn label` and `hf-knn suggest`: pictures that have no labels yet."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import places
from .choices import DEFAULT_BACKBONE, BackendOption, JsonOption
from .limits import reads_pictures

app = typer.Typer()

PAGE = "The page"
"""A group of options in `--help`."""

Folders = Literal["copy", "link"]
"""How a folder for each class is made."""


def _output(place: Path) -> Path:
    if place.suffix.lower() == ".csv":
        return places.new_file(place) or place
    return places.new_folder(place)


FolderArgument = Annotated[
    Path,
    typer.Argument(
        callback=places.picture_folder,
        help="A folder of pictures, in sub-folders or not; nothing in it is changed.",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        callback=places.checkpoint,
        show_default=False,
        help="A checkpoint that knows some classes already; it stays as it is.",
    ),
]
BackboneOption = Annotated[
    str | None,
    typer.Option(
        callback=places.backbone_if_named,
        show_default=False,
        help=f"Without --model, as for `train`. Default: {DEFAULT_BACKBONE}.",
    ),
]
BatchOption = Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")]


def _check_one(model: str | None, backbone: str | None) -> None:
    if model and backbone:
        raise typer.BadParameter("Expected --model or --backbone; a checkpoint has its backbone.")


@app.command()
@reads_pictures
def label(
    folder: FolderArgument,
    labels: Annotated[
        list[str],
        typer.Option(
            "--label",
            "-l",
            default_factory=list,
            show_default=False,
            help="A class that will come, in the order of the keys; repeat it. More can be named "
            "at any time.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            callback=_output,
            help="Folder for all that is written: answers.jsonl (every answer at once), "
            "labels.csv, model, and pictures with --folders. Or the name of a csv, beside which "
            "that folder lies.",
        ),
    ] = Path("knn-labels"),
    model: ModelOption = None,
    backbone: BackboneOption = None,
    groups: Annotated[
        int | None,
        typer.Option(
            min=0,
            show_default=False,
            help="Groups of pictures that look alike are asked about first, so many; 0 for none. "
            "Default: one for 20 pictures, 20 at most.",
        ),
    ] = None,
    folders: Annotated[
        Folders | None,
        typer.Option(
            help="At the end also make pictures/LABEL/… of copies, or of links; no picture is "
            "ever moved."
        ),
    ] = None,
    no_checkpoint: Annotated[
        bool, typer.Option("--no-checkpoint", help="Make no checkpoint at the end.")
    ] = False,
    terminal: Annotated[
        bool, typer.Option("--terminal", help="Ask in this terminal, with the keyboard alone.")
    ] = False,
    host: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            rich_help_panel=PAGE,
            help="Where the page listens. Default: 127.0.0.1, this machine alone; elsewhere "
            "everything needs a token.",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            show_default=False,
            rich_help_panel=PAGE,
            help="Default: the first free from 7861 on.",
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            rich_help_panel=PAGE,
            help="With --host. Default: that of $HF_KNN_TOKEN; else one is made and printed.",
        ),
    ] = None,
    no_browser: Annotated[
        bool,
        typer.Option(
            "--no-browser", rich_help_panel=PAGE, help="Only print the address of the page."
        ),
    ] = False,
    batch_size: BatchOption = 32,
    backend: BackendOption = None,
) -> None:
    """Label pictures: name groups that look alike, then the most useful picture comes next.

    A page opens in the browser, for the keyboard alone, a mouse or a thumb.

    Every answer is on disk before the next question, and the next guess knows it. The same command
    goes on where it was stopped. f finishes: it writes a csv (path,label) and a checkpoint.

    Keys: 1 to 9 and letters for the classes, Enter takes the guess, n and a name makes a class,
    s skips, u takes the last answer back, f finishes. Of copies, a number keeps that one and a
    keeps all. With --terminal, - and numbers leave some of a group out. Piped in, keys come one
    after the other or one a line; behind n comes the name, up to the end of the line.
    """
    _check_one(model, backbone)
    if terminal and (host or port or token or no_browser):
        raise typer.BadParameter("Expected --terminal alone: --host, --port, --token and "
                                 "--no-browser are about the page.")  # fmt: skip
    from hf_knn.commands.console import run
    from hf_knn.commands.label import LabelOptions, label_in_terminal, label_on_page

    options = LabelOptions(
        folder, output, model, backbone, labels, groups, folders, not no_checkpoint, batch_size
    )
    if terminal:
        run(label_in_terminal, options)
    else:
        run(label_on_page, options, host, port, token, not no_browser)


@app.command()
@reads_pictures
def suggest(
    folder: FolderArgument,
    model: ModelOption = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many pictures.")] = 50,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            callback=places.answer_file,
            help="Write them into this .csv, .jsonl or .parquet instead, with what each is taken "
            "for.",
        ),
    ] = None,
    backbone: BackboneOption = None,
    batch_size: BatchOption = 32,
    backend: BackendOption = None,
    json_output: JsonOption = False,
) -> None:
    """Print the pictures that are most worth a label, one path a line, the best first.

    It is the order in which `hf-knn label` would ask if nobody answered. Pictures that the
    checkpoint has already are left out. Nothing else is printed on stdout.
    """
    _check_one(model, backbone)
    from hf_knn.commands.console import run
    from hf_knn.commands.suggest import suggest_pictures

    lines: list[str] = []
    command = partial(
        suggest_pictures, folder, count, model, backbone, batch_size, output, json_output, lines
    )
    run(command, json_output=True)
    for line in lines:
        typer.echo(line)
