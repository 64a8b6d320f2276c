"""The page as a whole, and its server."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from hf_knn.data import give_back_large_blocks

from ..guard import Guard, shelf
from ..uploads import MAX_BYTES, SpaceError
from ..visitors import token_of
from .api import add_api, api_text
from .benchmark import add_benchmark_tab, find_report
from .classify import add_classify_tab
from .contents import Page
from .events import PRIVATE, QUEUE_SIZE
from .explore import add_explore_tab
from .markup import text
from .style import CSS, HEAD
from .teach import add_teach_tab, list_taught, names_for
from .teach_views import labels_page, said_page

_CACHE_SECONDS = (600, 3600)
_FONTS = ["system-ui", "sans-serif"]  # nothing is fetched from elsewhere
_LOCAL = "http://127.0.0.1:7860"
_ADDRESS_JS = f"""(text) => text.replaceAll('{_LOCAL}',
  (location.origin + location.pathname).replace(/\\/$/, ''))"""
"""The examples of the API name the page that is open."""


def make_app(page: Page, beside: Path | None = None) -> gr.Blocks:
    """The page around a model.

    Args:
        page: what answers.
        beside: the folder of app.py, which may hold `results`; None for none.

    Raises:
        FileNotFoundError: if `HF_KNN_RESULTS` names a folder without a report.
    """
    model = page.service.model
    rows = 0 if model.datastore is None else len(model.datastore)
    shelf()  # before the page asks where to keep files
    with gr.Blocks(title="A classifier that also remembers", delete_cache=_CACHE_SECONDS) as app:
        # whoever reads the browser's storage reads the page's source too: the secret is none, and
        # a fixed one lets the token survive a restart
        token = gr.BrowserState("", storage_key="hf-knn-visitor", secret="hf-knn-visitor")
        add_api(page)  # first, since names are given out in order
        gr.HTML(
            '<header class="knn-header"><h1>A classifier that also remembers</h1><p>It answers '
            f"with a head and with the nearest of {rows:,} stored pictures, shows them, and can be "
            f"taught. {model.config.classes} classes: "
            f"{text(', '.join(model.config.class_names[:12]))}"
            f"{', …' if model.config.classes > 12 else ''}.</p></header>"
        )
        with gr.Tab("Classify", id="classify"):
            answer_after = add_classify_tab(page, token)
        with gr.Tab("Teach", id="teach"):
            taught = add_teach_tab(page, token)
        for change in taught.changes:
            answer_after(change)
        with gr.Tab("Explore", id="explore") as explore:
            add_explore_tab(page, explore, token)
        report = find_report(beside)
        if report is not None:
            with gr.Tab("Benchmark", id="benchmark") as benchmark:
                add_benchmark_tab(report, benchmark)
        with gr.Tab("API", id="api"):
            api = gr.Markdown(api_text(), elem_id="knn-api")
        app.load(_open(page), [token], [token, taught.listed, taught.known], **PRIVATE)
        app.load(None, [api], [api], js=_ADDRESS_JS)
    app.queue(max_size=QUEUE_SIZE)
    return app


def launch(app: gr.Blocks, **options: Any) -> Any:
    """Starts the server, with the limits of reliability.

    Args:
        app: of `make_app`.
        options: of `gr.Blocks.launch`.
    """
    give_back_large_blocks()
    return app.launch(
        theme=gr.themes.Soft(font=_FONTS), css=CSS, head=HEAD, max_file_size=MAX_BYTES,
        show_error=False, run_history=False, footer_links=[], state_session_capacity=1000,
        ssr_mode=False, app_kwargs={"middleware": [Middleware(Guard, shelf=shelf())]}, **options,
    )  # fmt: skip


def _open(page: Page) -> Callable[[Any], list[Any]]:
    """What is filled in when a visitor opens the page."""

    def opened(known: Any) -> list[Any]:
        token = token_of(known)  # at once, so that all tabs of a browser have the same one
        try:
            return [token, list_taught(page, token, []), labels_page(names_for(page, token))]
        except SpaceError as error:
            return [token, said_page(str(error), is_error=True), gr.skip()]

    return opened
