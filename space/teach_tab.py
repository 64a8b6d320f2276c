"""Teach pictures to a model of one's own, list them, and take them away again."""

from typing import Any, NamedTuple

import gradio as gr
from exports import write_checkpoint, write_dataset
from shared import HEAVY, SELECT_JS, Page, as_message, clicked
from uploads import MAX_FILES, check_label
from views import examples_page


class Taught(NamedTuple):
    """What the page needs of the tab.

    Attributes:
        listed: the list of what was taught, for the page to fill when it opens.
        changes: after each of them the visitor's model answers anew.
    """

    listed: gr.HTML
    changes: list[Any]


def add_teach_tab(page: Page, token: gr.BrowserState) -> Taught:
    """Adds the tab.

    Args:
        page: what learns.
        token: of the visitor.
    """
    selected = gr.State([], time_to_live=3600)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            files = gr.File(
                label=f"Up to {MAX_FILES} pictures of one thing", file_count="multiple", height=170,
                elem_id="knn-lessons",
            )  # fmt: skip
            label = gr.Textbox(label="Label: a known one, or a new one", elem_id="knn-label")
            add = gr.Button("Teach", variant="primary", elem_id="knn-teach")
            said = gr.Markdown("", elem_id="knn-said")
        with gr.Column(scale=3, min_width=300):
            gr.Markdown("### What you taught\nSelect pictures to relabel or remove them.")
            listed = gr.HTML(examples_page([], set()), js_on_load=SELECT_JS, elem_id="knn-taught")
            with gr.Row():
                relabel = gr.Button("Relabel selected", size="sm")
                remove = gr.Button("Remove selected", size="sm", elem_id="knn-remove")
                undo = gr.Button("Undo", size="sm", elem_id="knn-undo")
            with gr.Row():
                dataset = gr.Button("Get as dataset", size="sm")
                checkpoint = gr.Button("Get as checkpoint", size="sm")
            download = gr.File(label="Download", visible=False, interactive=False)
    handlers = _Handlers(page)
    options: dict[str, Any] = {"api_visibility": "private", **HEAVY}
    after = [token, listed, selected, said]
    changes = [
        add.click(handlers.teach, [files, label, token], [*after, files], **options),
        relabel.click(handlers.relabel, [selected, label, token], after, **options),
        remove.click(handlers.remove, [selected, token], after, **options),
        undo.click(handlers.undo, [token], after, **options),
    ]
    listed.click(handlers.select, [selected, token], [listed, selected], **options)
    dataset.click(handlers.dataset, [token], [download], **options)
    checkpoint.click(handlers.checkpoint, [token], [download], **options)
    return Taught(listed, changes)


def list_taught(page: Page, token: str, selected: list[int]) -> str:
    """The tiles of what a visitor taught.

    Args:
        page: what learned it.
        token: of the visitor.
        selected: ids that are selected.
    """
    with page.service.visitors.hold(token) as overlay:
        rows = [] if overlay is None else list(overlay.examples.values())
    return examples_page(rows, set(selected))


class _Handlers:
    """What the events of the tab do."""

    def __init__(self, page: Page) -> None:
        self._page = page

    @as_message
    def teach(self, paths: list[str] | None, label: str, token: str) -> list[Any]:
        """Adds pictures; a visitor without a token gets one."""
        done = self._page.service.teach(paths, label, token, "")
        message = f"Taught {len(done['ids'])}; you have {done['examples']} now."
        return [*self._after(done["visitor"], message), None]

    @as_message
    def relabel(self, selected: list[int], label: str, token: str) -> list[Any]:
        """Gives the selected pictures the label that is typed."""
        with self._page.service.changing(token) as overlay:
            count = len(overlay.relabel(selected, check_label(label)))
        return self._after(token, f"Relabelled {count}.")

    @as_message
    def remove(self, selected: list[int], token: str) -> list[Any]:
        """Forgets the selected pictures."""
        done = self._page.service.forget(selected, token)
        return self._after(token, f"Removed {len(done['ids'])}; {done['examples']} are left.")

    @as_message
    def undo(self, token: str) -> list[Any]:
        """Takes the last change back."""
        with self._page.service.changing(token) as overlay:
            action = overlay.undo()
        return self._after(token, f"Undone: {action}.")

    @as_message
    def select(self, event: gr.EventData, selected: list[int], token: str) -> list[Any]:
        """Presses a tile, or releases it."""
        row_id = clicked(event, "row")
        chosen = set(selected) if row_id is None else set(selected) ^ {row_id}
        return [list_taught(self._page, token, sorted(chosen)), sorted(chosen)]

    @as_message
    def dataset(self, token: str) -> Any:
        """What was taught, as pictures and labels."""
        with self._page.service.changing(token) as overlay:
            return gr.File(write_dataset(overlay.examples.values()), visible=True)

    @as_message
    def checkpoint(self, token: str) -> Any:
        """The model with what was taught."""
        with self._page.service.changing(token) as overlay:
            return gr.File(write_checkpoint(overlay.model), visible=True)

    def _after(self, token: str, message: str) -> list[Any]:
        return [token, list_taught(self._page, token, []), [], message]
