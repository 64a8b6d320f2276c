"""What the events of the page have in common."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import gradio as gr

from hf_knn import BadImageError

from ..uploads import SpaceError

QUEUE_SIZE = 64
"""Requests that may wait; more are told that the queue is full."""

PRIVATE: dict[str, Any] = {"api_visibility": "private"}
"""Of events that are the page's own."""

HEAVY: dict[str, Any] = {"concurrency_limit": 2, "concurrency_id": "model"}
"""Of everything that runs the model: two at a time."""

Returned = TypeVar("Returned")


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
