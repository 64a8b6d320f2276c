"""Pieces of HTML that the views share. Every text of a visitor or a model goes through `text`."""

import html
from collections.abc import Callable

from ..service import Near
from ..uploads import as_uri

FindPicture = Callable[[int], bytes | None]
"""From the id of a row to its small picture."""

_TEMPLATE_MARKS = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;"})


def text(value: object) -> str:
    """A text that is shown as it is: no markup, and nothing that a template would fill in."""
    return html.escape(str(value)).translate(_TEMPLATE_MARKS)


def name_of(label: str) -> str:
    """A class in a sentence, whichever way its script runs."""
    return f"<bdi>{text(label)}</bdi>"


def tile(near: Near, picture: bytes | None, remark: str = "") -> str:
    """A stored row as a button.

    Args:
        near: the row.
        picture: its small picture; None shows its id.
        remark: below it; empty shows share and similarity, where there are any.
    """
    share = "" if near.share is None else f"{percent(near.share)} · "
    similarity = "" if near.similarity is None else f"{near.similarity:.2f}"
    spoken = "" if near.share is None else f", {percent(near.share)} of the vote"
    spoken += "" if near.similarity is None else f", similarity {similarity}"
    spoken += f", {text(remark)}" if remark else ""
    return (
        f'<button type="button" class="knn-tile" data-row="{near.row_id}" aria-label="'
        f'{text(near.label)}{spoken}, picture {near.row_id}">'
        f"{picture_or_number(near.row_id, picture)}<b>{name_of(near.label)}</b>"
        f"<span>{text(remark) or share + similarity}</span></button>"
    )


def picture_or_number(row_id: int, picture: bytes | None) -> str:
    """A stored row's picture; its id on a plain tile where there is none."""
    if picture is not None:
        return f'<img src="{as_uri(picture)}" alt="">'
    return f'<span class="knn-plain" aria-hidden="true">{row_id}</span>'


def percent(share: float) -> str:
    """A share in [0, 1], where a small one is not shown as none."""
    return "&lt;1%" if 0 < share < 0.005 else f"{share:.0%}"
