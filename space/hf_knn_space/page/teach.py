"""Teach pictures to a model of one's own, list them, and take them away again."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import gradio as gr

from hf_knn import BadImageError
from hf_knn.data import MAX_FILES, check_count, check_label

from ..exports import write_checkpoint, write_dataset
from ..uploads import SpaceError
from .contents import Page
from .events import HEAVY, as_message, clicked
from .scripts import SELECT_JS
from .teach_views import examples_page, labels_page, said_page

_SUGGEST_JS = """
document.querySelector('#knn-label input')?.setAttribute('list', 'knn-labels');
"""
"""The browser suggests the known labels while one is typed."""


class Taught(NamedTuple):
    """What the page needs of the tab.

    Attributes:
        listed: the list of what was taught, for the page to fill when it opens.
        known: the labels that are suggested, likewise.
        changes: after each of them the visitor's model answers anew.
    """

    listed: gr.HTML
    known: gr.HTML
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
            label = gr.Textbox(
                label="Label: a known one, or a new one", max_lines=1, elem_id="knn-label"
            )
            known = gr.HTML(
                labels_page(names_for(page, "")), js_on_load=_SUGGEST_JS, visible="hidden"
            )
            add = gr.Button("Teach", variant="primary", elem_id="knn-teach")
            said = gr.HTML(said_page(""), elem_id="knn-said")
        with gr.Column(scale=3, min_width=300):
            gr.Markdown(
                "### What you taught\nSelect pictures to remove them, or to give them the label "
                "that is typed."
            )
            with gr.Row():
                relabel = gr.Button("Relabel", size="sm", min_width=90, elem_id="knn-relabel")
                remove = gr.Button("Remove", size="sm", min_width=90, elem_id="knn-remove")
                undo = gr.Button("Undo", size="sm", min_width=90, elem_id="knn-undo")
            listed = gr.HTML(examples_page([], set()), js_on_load=SELECT_JS, elem_id="knn-taught")
            with gr.Row():
                dataset = gr.Button("Get as dataset", size="sm", min_width=140)
                checkpoint = gr.Button("Get as checkpoint", size="sm", min_width=140)
            download = gr.File(label="Download", visible=False, interactive=False)
    handlers = _Handlers(page, said)
    options: dict[str, Any] = {"api_visibility": "private", "show_progress_on": [said], **HEAVY}
    after = [token, listed, selected, known, said]
    triggers = [add.click, label.submit]
    changes = [
        gr.on(triggers, handlers.teach, [files, label, token], [*after, files], **options),
        relabel.click(handlers.relabel, [selected, label, token], after, **options),
        remove.click(handlers.remove, [selected, token], after, **options),
        undo.click(handlers.undo, [token], after, **options),
    ]
    listed.click(
        handlers.select, [selected, token], [listed, selected], show_progress="hidden", **options
    )
    dataset.click(handlers.dataset, [token], [download, said], **options)
    checkpoint.click(handlers.checkpoint, [token], [download, said], **options)
    return Taught(listed, known, changes)


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


def names_for(page: Page, token: str) -> list[str]:
    """The classes that a visitor's model knows.

    Args:
        page: what learned them.
        token: of the visitor.
    """
    with page.service.visitors.hold(token) as overlay:
        model = page.service.model if overlay is None else overlay.model
        return list(model.config.class_names)


def _says_why_not(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Says what cannot be done beside the buttons; all else stays as it is."""

    @functools.wraps(handler)
    def wrapped(self: "_Handlers", *args: Any, **kwargs: Any) -> Any:
        try:
            return handler(self, *args, **kwargs)
        except (SpaceError, BadImageError) as error:
            return {self.said: said_page(str(error), is_error=True)}

    return wrapped


class _Handlers:
    """What the events of the tab do."""

    def __init__(self, page: Page, said: gr.HTML) -> None:
        self._page, self.said = page, said

    @_says_why_not
    def teach(self, paths: list[str] | None, label: str, token: str) -> list[Any]:
        """Adds pictures; a visitor without a token gets one."""
        done = self._page.service.teach(check_count(paths), label, token, "")
        message = f"Taught {len(done['ids'])}; you have {done['examples']} now."
        if done["skipped"]:
            message += f" {len(done['skipped'])} were known with this label already."
        return [*self._after(done["visitor"], message), None]

    @_says_why_not
    def relabel(self, selected: list[int], label: str, token: str) -> list[Any]:
        """Gives the selected pictures the label that is chosen."""
        with self._page.service.changing(token) as overlay:
            count = len(overlay.relabel(selected, check_label(label)))
        return self._after(token, f"Relabelled {count}.")

    @_says_why_not
    def remove(self, selected: list[int], token: str) -> list[Any]:
        """Forgets the selected pictures."""
        done = self._page.service.forget(selected, token)
        return self._after(token, f"Removed {len(done['ids'])}; {done['examples']} are left.")

    @_says_why_not
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

    @_says_why_not
    def dataset(self, token: str) -> list[Any]:
        """What was taught, as pictures and labels."""
        with self._page.service.changing(token) as overlay:
            path = write_dataset(overlay.examples.values())
        return [gr.File(path, visible=True), said_page("The dataset can be downloaded.")]

    @_says_why_not
    def checkpoint(self, token: str) -> list[Any]:
        """The model with what was taught."""
        with self._page.service.changing(token) as overlay:
            path = write_checkpoint(overlay.model)
        return [gr.File(path, visible=True), said_page("The checkpoint can be downloaded.")]

    def _after(self, token: str, message: str) -> list[Any]:
        listed, names = list_taught(self._page, token, []), names_for(self._page, token)
        return [token, listed, [], labels_page(names), said_page(message)]
