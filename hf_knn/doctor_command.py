"""`hf-knn doctor`: what is wrong with pictures, before anything is trained on them."""

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from PIL import Image
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .checkup import Checkup, Watch
from .checkup_report import TITLES, first_things, sections_of
from .console import console
from .data import picture_of
from .doctor import DoctorOptions, Source, check_up, open_source
from .findings import write_csv
from .images import BadImageError
from .pages import plain, write_page

CSV_NAME, PAGE_NAME = "findings.csv", "report.html"


def diagnose_pictures(options: DoctorOptions) -> None:
    """Checks pictures, writes a page and a csv, and says what to do first.

    Args:
        options: see `hf-knn doctor --help`.

    Raises:
        ValueError: for pictures that cannot be used at all.
        OSError: if something is not there, or the report cannot be written.
    """
    source = open_source(options)
    with watching(not options.json_output) as watch:
        checkup = check_up(options, source, watch)

    def show(number: int) -> Image.Image | None:
        return _picture(source, number)

    name = Path(options.pictures).name
    lead = [
        f"What hf-knn doctor found in {name}, looked at with {_short(options.backbone)}. "
        f"{CSV_NAME} beside this page has all of it, to be sorted and worked through."
    ]
    with checkup.phase("report"):
        write_csv(options.output / CSV_NAME, checkup.findings, checkup.pictures)
        page = write_page(
            options.output / PAGE_NAME, f"Check of {name}", sections_of(checkup, show), lead
        )
    if options.json_output:
        typer.echo(json.dumps(summary_of(checkup, page), indent=2, ensure_ascii=False))
        return
    print_checkup(checkup, page)
    labels = "" if checkup.pictures.label_names else "give the pictures labels, "
    console.print(
        f"Next: look at the page, act on {CSV_NAME}, {labels}then [bold]"
        f"{escape(plain(_next_command(options)))}[/]",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


def _next_command(options: DoctorOptions) -> str:
    """Trains on the same pictures, with the features that are there now."""
    words = ["hf-knn", "train", options.pictures, "--backbone", options.backbone]
    if options.group_by is not None:
        words += ["--group-by", options.group_by]
    return shlex.join(words)


@contextmanager
def watching(shown: bool) -> Iterator[Watch]:
    """Progress bars for phases that take long.

    Args:
        shown: False keeps silent.
    """
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*bars, TimeRemainingColumn(), console=console, disable=not shown,
                  transient=True) as progress:  # fmt: skip

        def watch(name: str, total: int) -> Callable[[int], object]:
            task = progress.add_task(name, total=total)
            return lambda done: progress.update(task, advance=done)

        yield watch


def print_checkup(checkup: Checkup, page: Path) -> None:
    """The counts, what to do first, and where the page is.

    Args:
        checkup: done.
        page: the report.
    """
    table = Table(title=f"{len(checkup.pictures)} pictures", title_justify="left")
    table.add_column("finding")
    table.add_column("how many", justify="right")
    for kind, count in checkup.counts().items():
        table.add_row(TITLES[kind], f"[{'bold' if count else 'dim'}]{count}[/]")
    console.print(table)
    first = first_things(checkup.findings)
    for number, line in enumerate(first, 1):
        console.print(f"{number}. {escape(line)}", highlight=False)
    if not first:
        console.print("[green]Nothing was found that has to be done.[/]")
    for line in checkup.skipped:
        console.print(f"[yellow]Not looked at:[/] {escape(line)}")
    if checkup.curve is not None:
        console.print(escape(checkup.curve.statement()), highlight=False)
    seconds = sum(checkup.seconds.values())
    console.print(f"Report after {seconds:.0f} s: {escape(str(page))}", soft_wrap=True)


def summary_of(checkup: Checkup, page: Path) -> dict[str, Any]:
    """What `--json` prints.

    Args:
        checkup: done.
        page: the report.
    """
    curve = checkup.curve
    return {
        "pictures": len(checkup.pictures),
        "classes": len(checkup.pictures.label_names),
        "counts": {str(kind): count for kind, count in checkup.counts().items()},
        "first": first_things(checkup.findings),
        "learning_curve": None
        if curve is None
        else {
            "per_class": curve.per_class.tolist(),
            "accuracy": curve.accuracies.mean(axis=0).tolist(),
            "gain": None if curve.reason else curve.gain,
            "spread": None if curve.reason else curve.spread,
            "statement": curve.statement(),
        },
        "not_looked_at": checkup.skipped,
        "seconds": checkup.seconds,
        "report": str(page),
        "csv": str(page.with_name(CSV_NAME)),
    }


def _short(backbone: str) -> str:
    """A Hub id as it is, a folder without its parents."""
    return Path(backbone).name if Path(backbone).exists() else backbone


def _picture(source: Source, number: int) -> Image.Image | None:
    if source.places[number] < 0:
        return None
    part, row = source.picture(number)
    try:
        image: Image.Image = picture_of(part, row)
    except (BadImageError, OSError):  # it is a finding already, with this reason
        return None
    return image
