"""A model on the Hub: checkpoint and card in one commit."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..store.hub import CARD_NAME, OpenTarget
from .card import draw_reliability, make_card
from .code import legacy_code

if TYPE_CHECKING:
    from .modeling import KnnForImageClassification


def publish(
    model: "KnnForImageClassification",
    target: OpenTarget,
    message: str,
    description: str | None,
    license_name: str | None,
    options: dict[str, Any],
) -> Any:
    """Saves a model with its card, and pushes both.

    Args:
        model: what is pushed.
        target: an open one.
        message: of the commit.
        description: likewise.
        license_name: for the card; None keeps what the card says.
        options: of `save_pretrained`.

    Returns:
        `huggingface_hub.CommitInfo`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        model.save_pretrained(folder, **options)
        draw_reliability(model, folder)
        card = make_card(model, target.repo_id, target.read_text(CARD_NAME), folder, license_name)
        (folder / CARD_NAME).write_text(card, encoding="utf-8")
        replaced = sorted(legacy_code(target.read_text))
        return target.push(folder, message, description, replaced=replaced)
