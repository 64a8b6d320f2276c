"""The command of `hf-knn` that lists backbones; like `--help` it waits for no library."""

import json
from dataclasses import asdict

import typer

from .backbones import Backbone, known_backbones
from .choices import DEFAULT_BACKBONE, JsonOption
from .terminal import called

app = typer.Typer()

_EXPLAINED = (
    "A backbone is a pretrained model that makes numbers of a picture, its features; pictures that "
    "look alike get features that are near to each other. A larger one mostly answers better and "
    "always takes longer. Any other model works too, by its Hub id, timm name or folder.",
    "weights: how many, in millions. MB: the download, about. GFLOPs: thousand million operations "
    "for one picture, counted. ms: for one picture on one processor thread, measured with PyTorch "
    "on a machine with AVX2 (-: not measured); a GPU is far faster. gated: log in and "
    "ask on its page for access.",
)
_NUMBERS = ("features", "pixels", "weights", "MB", "GFLOPs", "ms")


@app.command()
def backbones(json_output: JsonOption = False) -> None:
    """List the backbones that have a short name: their size, speed and licence."""
    known = known_backbones().values()
    if json_output:
        typer.echo(json.dumps([asdict(each) for each in known], indent=2))
        return
    from rich.console import Console
    from rich.table import Column, Table

    numbers = [Column(name, justify="right", no_wrap=True) for name in _NUMBERS]
    table = Table(
        Column("name", no_wrap=True), *numbers, Column("licence", no_wrap=True), "gated",
        box=None, padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip
    for each in known:
        table.add_row(
            each.name, str(each.features), str(each.image_size), f"{each.parameters:.3g} M",
            str(each.megabytes), f"{each.gflops:.3g}", str(each.milliseconds or "-"), each.licence,
            "yes" if each.is_gated else "no",
        )  # fmt: skip
    console = Console()
    console.print(table)
    for each in known:
        console.print(_about(each), soft_wrap=True, highlight=False, markup=False)
    for paragraph in _EXPLAINED:
        console.print(f"\n{paragraph}", highlight=False)
    console.print(f"Next: {called()} train PICTURES --backbone {DEFAULT_BACKBONE}", highlight=False)


def _about(backbone: Backbone) -> str:
    is_default = " It is the default." if backbone.name == DEFAULT_BACKBONE else ""
    note = f" {backbone.note}" if backbone.note else ""
    where = backbone.place
    if backbone.is_offline:
        where = "without network: pip install 'hf-knn[offline]'"
    return f"{backbone.name}: {backbone.title} ({where}).{note}{is_default}"
