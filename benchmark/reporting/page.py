"""Writes a report as one HTML file: no script, nothing from elsewhere, every text escaped."""

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hf_knn.checkup import PAGE_STYLE
from reporting.document import Report
from reporting.words import clean

_TEMPLATE = "page.html.jinja"


def write_html(report: Report, path: Path) -> Path:
    """Writes a page that needs no network; light or dark as the reader's system is.

    Args:
        report: to write.
        path: the HTML file; its folder is made if it is missing.

    Returns:
        The path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_html(report), encoding="utf-8")
    return path


def render_html(report: Report) -> str:
    """The text of the page that `write_html` writes."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=_plain,
    )  # fmt: skip
    environment.filters["uri"] = _uri
    sections = [section for section in report.sections if section.blocks]
    template = environment.get_template(_TEMPLATE)
    return template.render(report=report, sections=sections, style=PAGE_STYLE)


def _plain(value: object) -> object:
    """Texts of strangers lose control characters; markup is what the template wrote itself."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _uri(png: bytes) -> Markup:
    return Markup("data:image/png;base64,{}").format(base64.b64encode(png).decode())
