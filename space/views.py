"""Answers as HTML. Every text of a visitor or a model goes through `text`."""

import html
from collections.abc import Callable, Iterable, Mapping, Sequence

from journal import Example
from service import Look, Near
from uploads import as_uri

from hf_knn import Explanation

_BARS = 6
_TILES = 10
_TEMPLATE_MARKS = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;"})

FindPicture = Callable[[int], bytes | None]
"""From the id of a row to its small picture."""

EMPTY = (
    '<div class="knn-empty"><p>Choose a picture to see the answer, and the pictures it was '
    "answered by.</p></div>"
)


def text(value: object) -> str:
    """A text that is shown as it is: no markup, and nothing that a template would fill in."""
    return html.escape(str(value)).translate(_TEMPLATE_MARKS)


def answer_page(
    looks: Sequence[Look], chosen: int, found: Explanation, settings: str, picture_of: FindPicture
) -> str:
    """The answer and its reasons.

    Args:
        looks: all pictures that were sent.
        chosen: which one is shown.
        found: its explanation.
        settings: one line on how the neighbours voted.
        picture_of: of a stored row.
    """
    best = found.probabilities[found.answer]
    voices = _voices(found)
    return (
        f"{_strip(looks, chosen)}"
        f'<div class="knn-answer"><img src="{as_uri(looks[chosen].thumbnail)}" alt="Your picture">'
        f'<div><p class="knn-hint">This looks like</p><h2 id="knn-answer" data-announce="'
        f'{text(found.answer)}, {best:.0%}">{text(found.answer)}</h2>'
        f'<p class="knn-score">{best:.0%} <span class="knn-hint">head and neighbours together'
        f"</span></p>{_notices(found)}</div></div>"
        f"<section><h3>Probabilities</h3>{bars(found.probabilities, 'blend')}</section>"
        f"<section><h3>Who voted</h3>{_gallery(found, picture_of)}"
        f'<p class="knn-hint">Share of the vote · similarity. {settings} Select a picture to see '
        "it large and what is near it.</p></section>"
        f'<section><h3>What would change the answer</h3><p id="knn-flip">{_flip(found)}</p>'
        f'</section><div class="knn-voices">{voices}</div>'
    )


def bars(probabilities: Mapping[str, float], kind: str) -> str:
    """The likeliest classes, as bars with their numbers.

    Args:
        probabilities: class to probability, likeliest first.
        kind: `blend`, `head` or `knn`; names the list.
    """
    rows = "".join(
        f'<li data-label="{text(name)}" data-score="{value:.6f}"><span class="knn-name" title="'
        f'{text(name)}">{text(name)}</span><span class="knn-bar" aria-hidden="true"><i style="'
        f'width:{100 * value:.1f}%"></i></span><span class="knn-value">{value:.1%}</span></li>'
        for name, value in list(probabilities.items())[:_BARS]
    )
    return f'<ul class="knn-bars knn-{kind}">{rows}</ul>'


def detail_page(own: Near, others: Iterable[Near], picture_of: FindPicture) -> str:
    """One stored picture, large, and its neighbours."""
    tiles = "".join(tile(near, picture_of(near.row_id)) for near in others)
    large = _picture(own, picture_of(own.row_id))
    return (
        f'<section class="knn-detail"><div class="knn-answer">{large}<div><p class="knn-hint">'
        f'Stored picture {own.row_id}</p><h3 id="knn-detail">{text(own.label)}</h3><p>Its own '
        f'nearest pictures:</p></div></div><div class="knn-tiles">{tiles}</div></section>'
    )


def examples_page(examples: Iterable[Example], selected: set[int]) -> str:
    """What a visitor taught, as buttons that are pressed or not."""
    tiles = "".join(
        f'<button type="button" class="knn-tile" data-row="{row.row_id}" aria-pressed="'
        f'{str(row.row_id in selected).lower()}"><img src="{as_uri(row.thumbnail)}" alt="">'
        f"<b>{text(row.label)}</b><span>no. {row.row_id}</span></button>"
        for row in examples
    )
    if not tiles:
        return (
            '<div class="knn-empty"><p>Nothing yet. What you teach is seen by you alone, and the '
            "next answer knows it.</p></div>"
        )
    return f'<div class="knn-tiles">{tiles}</div>'


def samples_page(samples: Iterable[bytes]) -> str:
    """Pictures to begin with, as buttons."""
    tiles = "".join(
        f'<button type="button" class="knn-tile knn-small" data-row="{number}" '
        f'aria-label="Example {number + 1}"><img src="{as_uri(picture)}" alt=""></button>'
        for number, picture in enumerate(samples)
    )
    return f'<div class="knn-tiles">{tiles}</div>'


def tile(near: Near, picture: bytes | None, remark: str = "") -> str:
    """A stored row as a button.

    Args:
        near: the row.
        picture: its small picture; None shows its id.
        remark: below it; empty shows share and similarity, where there are any.
    """
    share = "" if near.share is None else f"{_percent(near.share)} · "
    similarity = "" if near.similarity is None else f"{near.similarity:.2f}"
    return (
        f'<button type="button" class="knn-tile" data-row="{near.row_id}">'
        f"{_picture(near, picture)}<b>{text(near.label)}</b>"
        f"<span>{text(remark) or share + similarity}</span></button>"
    )


def disagrees(found: Explanation) -> bool:
    """Whether head and neighbours alone would answer differently."""
    return bool(found.knn) and first(found.head)[0] != first(found.knn)[0]


def _strip(looks: Sequence[Look], chosen: int) -> str:
    if len(looks) == 1:
        return ""
    tiles = "".join(
        f'<button type="button" class="knn-tile knn-small" data-look="{number}" aria-pressed="'
        f'{str(number == chosen).lower()}" aria-label="Picture {number + 1}"><img src="'
        f'{as_uri(look.thumbnail)}" alt=""></button>'
        for number, look in enumerate(looks)
    )
    return f'<div class="knn-tiles">{tiles}</div>'


def _notices(found: Explanation) -> str:
    notes = []
    if disagrees(found):
        head, knn = first(found.head)[0], first(found.knn)[0]
        notes.append(
            f"Head and neighbours disagree: the head says <b>{text(head)}</b>, the neighbours "
            f"<b>{text(knn)}</b>."
        )
    if not found.is_typical:
        notes.append(
            f"Unlike anything seen: only {found.typicality:.1%} of the stored pictures lie as far "
            "from their nearest one."
        )
    return "".join(f'<p class="knn-notice" role="status">{note}</p>' for note in notes)


def _gallery(found: Explanation, picture_of: FindPicture) -> str:
    if not found.neighbors:
        return "<p>Nobody: this model has no stored pictures.</p>"
    tiles = [
        tile(Near(row.row_id, row.label, row.similarity, row.share), picture_of(row.row_id))
        for row in found.neighbors
    ]
    heaviest, rest = "".join(tiles[:_TILES]), tiles[_TILES:]
    more = (
        f'<details class="knn-more"><summary>{len(rest)} more, that weigh less</summary>'
        f'<div class="knn-tiles">{"".join(rest)}</div></details>'
    )
    return f'<div class="knn-tiles" id="knn-voters">{heaviest}</div>{more if rest else ""}'


def _percent(share: float) -> str:
    return "&lt;1%" if 0 < share < 0.005 else f"{share:.0%}"


def _picture(near: Near, picture: bytes | None) -> str:
    if picture is not None:
        return f'<img src="{as_uri(picture)}" alt="">'
    return f'<span class="knn-plain" aria-hidden="true">{near.row_id}</span>'


def _flip(found: Explanation) -> str:
    if found.flip is None:
        return "Nothing among the stored pictures near it: the answer would stay."
    count, answer = len(found.flip.row_ids), text(found.flip.answer)
    pictures = "one picture" if count == 1 else f"{count} pictures"
    how = "" if found.flip.is_smallest else " (perhaps fewer would do)"
    return f"Without {pictures} of these it would be <b>{answer}</b>{how}."


def _voices(found: Explanation) -> str:
    parts = [f"<section><h3>The head alone</h3>{bars(found.head, 'head')}</section>"]
    if found.knn:
        parts.append(f"<section><h3>The neighbours alone</h3>{bars(found.knn, 'knn')}</section>")
    return "".join(parts)


def first(probabilities: Mapping[str, float]) -> tuple[str, float | str]:
    """The likeliest class and its probability; empty texts where there is none.

    Args:
        probabilities: most likely first.
    """
    return next(iter(probabilities.items()), ("", ""))
