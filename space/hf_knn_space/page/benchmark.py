"""The results at hand, as `benchmark/report.py` wrote them."""

import base64
import html
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr
from markdown_it import MarkdownIt

from ..files import CLONED_BENCHMARK

_PAGES = ("report.html", "report.md")  # the second is what a clone holds
_STYLE = """<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2126; background: #fff; margin: 1.2rem; }
img { max-width: 100%; } table { border-collapse: collapse; display: block; overflow-x: auto; }
td, th { border: 1px solid #d5d9e2; padding: .25rem .5rem; text-align: left; }
</style>"""
_FIGURE = re.compile(r'src="(figures/[\w.-]+\.png)"')
_WAITING = '<div class="knn-empty"><p>Opening the report.</p></div>'


def find_report(beside: Path | None = None) -> Path | None:
    """The page of `HF_KNN_RESULTS`, of `results` beside app.py, or of the clone's own results.

    Args:
        beside: the folder of app.py; None for none.

    Raises:
        FileNotFoundError: if `HF_KNN_RESULTS` names a folder without a report.
    """
    named = os.environ.get("HF_KNN_RESULTS")
    folders = [CLONED_BENCHMARK / "results"]
    if named:
        folders = [Path(named)]
    elif beside is not None:
        folders.insert(0, beside / "results")
    places = [folder / page for folder in folders for page in _PAGES]
    found = next((place for place in places if place.is_file()), None)
    if named and found is None:
        raise FileNotFoundError(
            f"Expected HF_KNN_RESULTS to name a folder with {_PAGES[0]}, but got {named}; do "
            f"`python benchmark/report.py {named}`."
        )
    return found


def add_benchmark_tab(report: Path, tab: gr.Tab) -> None:
    """Fills the tab; the page is read when it is opened.

    Args:
        report: of `find_report`.
        tab: looked into when it is opened.
    """
    shown = gr.HTML(_WAITING, min_height=420, elem_id="knn-report")
    options: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
    tab.select(lambda: report_frame(report), None, [shown], **options)


@cache
def report_frame(report: Path) -> str:
    """The page in a frame of its own, where no script runs.

    Args:
        report: the file.
    """
    content = report.read_text(encoding="utf-8")
    if report.suffix == ".md":
        content = _STYLE + _with_figures(MarkdownIt().enable("table").render(content), report)
    page = html.escape(content, quote=True)
    return (
        f'<iframe class="knn-report" sandbox="" title="Benchmark report" srcdoc="{page}"></iframe>'
    )


def _with_figures(content: str, report: Path) -> str:
    """Figures beside the report, inside the page."""

    def embedded(found: re.Match[str]) -> str:
        place = report.parent / found[1]
        if not place.is_file():
            return found[0]
        return f'src="data:image/png;base64,{base64.b64encode(place.read_bytes()).decode()}"'

    return _FIGURE.sub(embedded, content)
