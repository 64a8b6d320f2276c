"""The results at hand, as `benchmark/report.py` wrote them."""

import html
import os
from pathlib import Path
from typing import Any

import gradio as gr

_HERE = Path(__file__).parent
_PAGE = "report.html"
_WAITING = '<div class="knn-empty"><p>Opening the report.</p></div>'


def find_report() -> Path | None:
    """The page of `HF_KNN_RESULTS`, of `results` beside this file, or of the clone's own results.

    Raises:
        FileNotFoundError: if `HF_KNN_RESULTS` names a folder without a report.
    """
    named = os.environ.get("HF_KNN_RESULTS")
    if named:
        place = Path(named) / _PAGE
        if not place.is_file():
            raise FileNotFoundError(
                f"Expected HF_KNN_RESULTS to name a folder with {_PAGE}, but got {named}; do "
                f"`python benchmark/report.py {named}`."
            )
        return place
    places = [_HERE / "results" / _PAGE, _HERE.parent / "benchmark" / "results" / _PAGE]
    return next((place for place in places if place.is_file()), None)


def add_benchmark_tab(report: Path, tab: gr.Tab) -> None:
    """Fills the tab; the page is read when it is opened.

    Args:
        report: one HTML file that needs no other.
        tab: looked into when it is opened.
    """
    shown = gr.HTML(_WAITING, min_height=420, elem_id="knn-report")
    options: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
    tab.select(lambda: report_frame(report), None, [shown], **options)


def report_frame(report: Path) -> str:
    """The page in a frame of its own, where no script runs.

    Args:
        report: the file.
    """
    page = html.escape(report.read_text(encoding="utf-8"), quote=True)
    return (
        f'<iframe class="knn-report" sandbox="" title="Benchmark report" srcdoc="{page}"></iframe>'
    )
