"""What the parts of the page share."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import gradio as gr
from explorer import Explorer
from service import Service
from thumbnails import Pictures
from uploads import SpaceError
from views import FindPicture, detail_page

from hf_knn import BadImageError

QUEUE_SIZE = 64
"""Requests that may wait; more are told that the queue is full."""

_NEAR = 8

Returned = TypeVar("Returned")

PRIVATE: dict[str, Any] = {"api_visibility": "private"}
"""Of events that are the page's own."""

HEAVY: dict[str, Any] = {"concurrency_limit": 2, "concurrency_id": "model"}
"""Of everything that runs the model: two at a time."""

SELECT_JS = """
let pressed = '';
element.addEventListener('click', (event) => {
  const tile = event.target.closest('[data-row], [data-look]');
  if (!tile) return;
  const {row, look} = tile.dataset;
  pressed = row === undefined ? `[data-look="${look}"]` : `[data-row="${row}"]`;
  trigger('click', {row: row ?? null, look: look ?? null});
});
watch('value', () => setTimeout(() => {
  if (pressed && document.activeElement === document.body) element.querySelector(pressed)?.focus();
}));
"""
"""A click on a tile says which one; if the page is drawn anew it keeps the focus."""

ANNOUNCE_JS = """
const status = document.createElement('div');
status.className = 'knn-unseen';
status.setAttribute('role', 'status');
element.parentElement.append(status);
let seen = '';
watch('value', () => setTimeout(() => {
  status.textContent = element.querySelector('[data-announce]')?.dataset.announce ?? '';
  const asked = element.querySelector('.knn-answer > img')?.src ?? '';
  if (asked !== seen && element.getBoundingClientRect().top > innerHeight / 2)
    element.scrollIntoView({behavior: 'smooth'});
  seen = asked;
}));
"""
"""A new answer is read out by a screen reader: in one sentence, not the whole page of it. Where it
is below the fold, on a phone, it is scrolled into view; the same picture answered anew is not."""

DIALOG_JS = """
let opener = null;
watch('value', () => setTimeout(() => {
  const dialog = element.querySelector('dialog');
  if (!dialog) { opener = null; return; }
  opener ??= document.activeElement;
  dialog.addEventListener('click', (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener('close', () => {
    opener?.focus();
    props.value = '';  // the same picture can be opened again
  });
  dialog.showModal();
}));
"""
"""What is filled in opens over the page; the focus goes back to where it came from."""


class Page(NamedTuple):
    """What is shown.

    Attributes:
        service: answers.
        pictures: of published rows.
        samples: pictures to begin with, as paths of files.
        explorer: looks through the published rows.
    """

    service: Service
    pictures: Pictures
    samples: list[str]
    explorer: Explorer

    @classmethod
    def of(cls, service: Service, pictures: Pictures, samples: list[str]) -> "Page":
        """The page of a model.

        Args:
            service: answers.
            pictures: of published rows.
            samples: see `Page`.
        """
        return cls(service, pictures, samples, Explorer(service.model))

    def near(self, row_id: int, token: str) -> str:
        """A stored picture, large, with what is next to it.

        Args:
            row_id: of a row that the visitor can see.
            token: of the visitor.

        Raises:
            SpaceError: for a row that there is not.
        """
        own, others = self.service.near(row_id, _NEAR, token)
        return detail_page(own, others, self.picture_of(token))

    def picture_of(self, token: str) -> FindPicture:
        """How one visitor sees stored rows.

        Args:
            token: of the visitor; empty for nobody's.
        """
        with self.service.visitors.hold(token) as overlay:
            own = {} if overlay is None else {i: e.thumbnail for i, e in overlay.examples.items()}
        store, kept = self.service.model.datastore, self.service.model.thumbnails

        def find(row_id: int) -> bytes | None:
            known = own.get(row_id) or (None if kept is None else kept.get(row_id))
            if known is not None:
                return known
            if store is None or not bool((store.ids == row_id).any()):
                return None
            return self.pictures.find(row_id, store.path_of(row_id))

        return find


def clicked(event: gr.EventData, name: str) -> int | None:
    """The number that a tile carries; None if it carries none.

    Args:
        event: of `SELECT_JS`, which anybody can send.
        name: `row` or `look`.
    """
    value = (event._data or {}).get(name)
    return int(value) if isinstance(value, str) and value.isdecimal() else None


def as_message(handler: Callable[..., Returned]) -> Callable[..., Returned]:
    """Shows what a visitor can do something about as a message, without a traceback.

    Args:
        handler: of an event.
    """

    @functools.wraps(handler)
    def wrapped(*args: Any, **kwargs: Any) -> Returned:
        try:
            return handler(*args, **kwargs)
        except (SpaceError, BadImageError) as error:
            raise gr.Error(str(error), print_exception=False) from None

    return wrapped
