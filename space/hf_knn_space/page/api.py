"""The named endpoints; the README of the Space says how to call them."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from hf_knn.data import MAX_FILES

from ..explanations import as_json
from ..files import space_file
from ..settings import Settings
from ..uploads import SpaceError
from .contents import Page
from .events import HEAVY, as_message


def add_api(page: Page) -> None:
    """Adds `/classify`, `/neighbors`, `/teach` and `/forget`.

    Args:
        page: what answers.
    """
    handlers = _Handlers(page)
    picture = gr.File(label="Picture", visible=False)
    pictures = gr.File(label="Pictures", file_count="multiple", visible=False)
    settings = [
        gr.Number(label="k", visible=False),
        gr.Number(label="Temperature", visible=False),
        gr.Number(label="knn_weight", visible=False),
        gr.Textbox(label="Weighting", visible=False),
    ]
    visitor = gr.Textbox(label="Visitor token", visible=False)
    label = gr.Textbox(label="Label", visible=False)
    key = gr.Textbox(label="Idempotency key", visible=False)
    ids = gr.JSON(label="Row ids", visible=False)
    result = gr.JSON(label="Result", visible=False)
    endpoints: list[tuple[Callable[..., Any], list[Any]]] = [
        (handlers.classify, [picture, *settings, visitor]),
        (handlers.neighbors, [picture, settings[0], visitor]),
        (handlers.teach, [pictures, label, visitor, key]),
        (handlers.forget, [ids, visitor]),
    ]
    for handler, inputs in endpoints:
        button = gr.Button(visible=False)
        button.click(handler, inputs, result, api_name=handler.__name__, **HEAVY)


def api_text() -> str:
    """How to call them: the part of the README on the API."""
    _, _, body = space_file("README.md").read_text(encoding="utf-8").partition("## API\n")
    return body.partition("\n## ")[0].replace("MAX_FILES", str(MAX_FILES))


class _Handlers:
    """What the endpoints do; the names and defaults of the arguments are part of the API."""

    def __init__(self, page: Page) -> None:
        self._service = page.service

    @as_message
    def classify(
        self,
        image: str,
        k: float | None = None,
        temperature: float | None = None,
        knn_weight: float | None = None,
        weighting: str | None = None,
        visitor: str | None = None,
    ) -> dict[str, Any]:
        """Classify a picture, and say why."""
        settings = Settings(k, temperature, knn_weight, weighting or None)  # type: ignore[arg-type]
        look = self._service.look(image)
        return as_json(self._service.explain(look, settings, visitor or ""))

    @as_message
    def neighbors(
        self, image: str, k: float | None = None, visitor: str | None = None
    ) -> list[dict[str, Any]]:
        """Find the stored pictures that are nearest to a picture, nearest first."""
        look = self._service.look(image)
        found = self._service.explain(look, Settings(k), visitor or "")  # type: ignore[arg-type]
        return as_json(found)["neighbors"]

    @as_message
    def teach(
        self,
        images: list[str],
        label: str,
        visitor: str | None = None,
        idempotency_key: str | None = None,
    ) -> dict[str, Any]:
        """Teach pictures under one label, to this visitor alone; with the same key only once."""
        return self._service.teach(images, label, visitor or "", idempotency_key or "")

    @as_message
    def forget(self, ids: list[int], visitor: str) -> dict[str, Any]:
        """Forget pictures that this visitor taught."""
        if not isinstance(ids, list) or not all(type(row_id) is int for row_id in ids):
            raise SpaceError("Expected `ids` to be a list of whole numbers, as /teach returned.")
        return self._service.forget(ids, visitor or "")
