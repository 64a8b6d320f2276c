"""What a visitor taught, as HTML."""

from collections.abc import Iterable

from ..journal import Example
from ..uploads import as_uri
from .markup import name_of, text


def examples_page(examples: Iterable[Example], selected: set[int]) -> str:
    """What a visitor taught, as buttons that are pressed or not."""
    tiles = "".join(
        f'<button type="button" class="knn-tile" data-row="{row.row_id}" aria-pressed="'
        f'{str(row.row_id in selected).lower()}"><img src="{as_uri(row.thumbnail)}" alt="">'
        f"<b>{name_of(row.label)}</b><span>no. {row.row_id}</span></button>"
        for row in examples
    )
    if not tiles:
        return (
            '<div class="knn-empty"><p>Nothing yet. What you teach is seen by you alone, and the '
            "next answer knows it.</p></div>"
        )
    return f'<div class="knn-tiles">{tiles}</div>'


def labels_page(names: Iterable[str]) -> str:
    """Labels for the browser to suggest."""
    options = "".join(f'<option value="{text(name)}"></option>' for name in names)
    return f'<datalist id="knn-labels">{options}</datalist>'


def said_page(message: str, is_error: bool = False) -> str:
    """One sentence on what was done, or could not be.

    Args:
        message: empty for nothing yet.
        is_error: whether it could not be.
    """
    kind = 'class="knn-notice" role="alert"' if is_error else 'role="status"'
    return f"<p {kind}>{text(message)}</p>" if message else '<p role="status"></p>'
