"""What is stored: a map, the classes, and what may be wrong."""

from typing import Any

import gradio as gr

from .contents import Page
from .events import HEAVY, as_message, clicked
from .explore_views import NOTHING, class_page, findings_page, map_page, rows_of
from .scripts import DIALOG_JS, SELECT_JS

_WAITING = (
    '<div class="knn-empty"><p>Looking through the stored pictures; the first time takes a while.'
    "</p></div>"
)
_NO_CLASS = class_page("", [], 0, lambda row_id: None)


def add_explore_tab(page: Page, tab: gr.Tab, token: gr.BrowserState) -> None:
    """Fills the tab.

    Args:
        page: what is shown.
        tab: looked into when it is opened.
        token: of the visitor, for the tiles of what they taught.
    """
    names = [f"{name} ({count})" for name, count in page.explorer.classes()]
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=300):
            drawn = gr.HTML(_WAITING, js_on_load=SELECT_JS, min_height=300, elem_id="knn-map")
            detail = gr.HTML("", js_on_load=SELECT_JS + DIALOG_JS, elem_id="knn-stored")
        with gr.Column(scale=2, min_width=300):
            chosen = gr.Dropdown(
                names, value=None, label="Class", filterable=True, elem_id="knn-class"
            )
            listed = gr.HTML(_NO_CLASS, js_on_load=SELECT_JS, elem_id="knn-rows")
    found = gr.HTML("", js_on_load=SELECT_JS, elem_id="knn-findings")
    handlers = _Handlers(page)
    options: dict[str, Any] = {"api_visibility": "private", **HEAVY}
    tab.select(handlers.look, None, [drawn, found], **options)
    chosen.change(handlers.browse, [chosen], [listed], **options)
    for source in (drawn, listed, found, detail):
        source.click(handlers.near, [token], [detail], **options)


class _Handlers:
    """What the events of the tab do."""

    def __init__(self, page: Page) -> None:
        self._page = page

    @as_message
    def look(self) -> list[Any]:
        """The map and the findings; the first visitor waits for them."""
        found = self._page.explorer.look()
        if found is None:
            return [NOTHING, ""]
        total = len(self._page.service.model.datastore)
        picture_of = self._page.picture_of("", rows_of(found))
        return [map_page(found, total), findings_page(found, picture_of)]

    @as_message
    def browse(self, chosen: str | None) -> str:
        """The pictures of a class."""
        for name, count in self._page.explorer.classes():
            if chosen == f"{name} ({count})":
                rows = self._page.explorer.rows_of(name)
                picture_of = self._page.picture_of("", [row.row_id for row in rows])
                return class_page(name, rows, count, picture_of)
        return _NO_CLASS

    @as_message
    def near(self, event: gr.EventData, token: str) -> Any:
        """A stored picture, large, and what is near it."""
        row_id = clicked(event, "row")
        return gr.skip() if row_id is None else self._page.near(row_id, token)
