"""Writes the report of a benchmark run: `python benchmark/report.py DIR`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hf_knn_cli.terminal import prepare_streams
from reporting.baseline import baseline_report
from reporting.build import build_report
from reporting.cells import load_results
from reporting.markdown import write_markdown
from reporting.page import write_html
from reporting.parquet import write_table
from reporting.pictures import local_pictures
from reporting.push import push_results
from reporting.trackio import log_to_trackio

app = typer.Typer(add_completion=False)


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What benchmark/run.py wrote.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where the report goes; DIR itself by default."),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="DIR2", help="Compare with this folder, cell by cell.")
    ] = None,
    pictures: Annotated[
        bool, typer.Option(help="Galleries of pictures, of tasks drawn from installed packages.")
    ] = True,
    trackio: Annotated[
        str | None, typer.Option(help="Project of trackio to log to; needs `pip install trackio`.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Push DIR as a dataset, in one commit.")
    ] = None,
) -> None:
    """Writes report.md, report.html, their figures and results.parquet."""
    console = Console()
    target = output or folder
    if push is not None and (output is not None or baseline is not None):
        raise typer.BadParameter(
            "goes neither with --output nor with --baseline", param_hint="push"
        )
    try:
        results = load_results(folder)
        if baseline is None:
            source = local_pictures(results.run.get("options", {}).get("limit"))
            report = build_report(results, source if pictures else None)
            paths = [write_table(results, target)]
        else:
            report = baseline_report(results, load_results(baseline))
            target = output or folder / f"against-{baseline.resolve().name}"
            paths = []
        logged = None if trackio is None else log_to_trackio(results, trackio)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        console.print(f"[red]{type(error).__name__}[/]:", end=" ")
        console.print(str(error), markup=False)
        raise typer.Exit(1) from error
    paths += [write_markdown(report, target), write_html(report, target / "report.html")]
    if logged is not None:
        console.print(f"{logged} runs in the trackio project {trackio}", markup=False)
    for path in paths:
        console.print(str(path), markup=False)
    if push is not None:
        console.print(push_results(folder, push), markup=False)


if __name__ == "__main__":
    prepare_streams()
    app()
