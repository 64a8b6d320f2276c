"""Answers as HTML."""

from collections.abc import Iterable, Mapping, Sequence

from hf_knn import Explanation

from ..explanations import disagrees, first
from ..service import Look, Near
from ..uploads import as_uri
from .markup import FindPicture, name_of, picture_or_number, text, tile

_BARS = 6
_TILES = 10
_MOST_TILES = 100
_FLIP_TILES = 12

EMPTY = (
    '<div class="knn-empty"><p>Choose a picture to see the answer, and the pictures it was '
    "answered by.</p></div>"
)


def answer_page(
    looks: Sequence[Look],
    chosen: int,
    answers: Sequence[Explanation],
    settings: str,
    picture_of: FindPicture,
) -> str:
    """The answer and its reasons.

    Args:
        looks: all pictures that were sent.
        chosen: which one is shown.
        answers: an explanation of each.
        settings: one line on how the neighbours voted.
        picture_of: of a stored row.
    """
    found = answers[chosen]
    best = found.probabilities[found.answer]
    voices, notes = _voices(found), _notices(found)
    spoken = " ".join([f"{text(found.answer)}, {best:.0%}.", *notes.values()])
    warnings = "".join(f'<p class="knn-notice">{note}</p>' for note in notes)
    return (
        f"{_strip(looks, chosen, answers)}"
        f'<div class="knn-answer"><img src="{as_uri(looks[chosen].thumbnail)}" alt="Your picture">'
        f'<div><p class="knn-hint">This looks like</p><h2 id="knn-answer" data-announce="'
        f'{spoken}">{name_of(found.answer)}</h2>'
        f'<p class="knn-score">{best:.0%} <span class="knn-hint">head and neighbours together'
        f"</span></p>{warnings}</div></div>"
        f"<section><h3>Probabilities</h3>{bars(found.probabilities, 'blend')}</section>"
        f"<section><h3>Who voted</h3>{_gallery(found, picture_of)}"
        f'<p class="knn-hint">Share of the vote · similarity. {settings} Select a picture to see '
        "it large and what is near it.</p></section>"
        f'<section><h3>What would change the answer</h3><p id="knn-flip">{_flip(found)}</p>'
        f'{_flip_tiles(found, picture_of)}</section><div class="knn-voices">{voices}</div>'
    )


def rows_of(found: Explanation) -> list[int]:
    """Ids of the stored rows whose pictures the page of an answer shows.

    Args:
        found: the answer that is shown.
    """
    voters = [row.row_id for row in found.neighbors[:_MOST_TILES]]
    return voters + ([] if found.flip is None else found.flip.row_ids[:_FLIP_TILES])


def bars(probabilities: Mapping[str, float], kind: str) -> str:
    """The likeliest classes, as bars with their numbers.

    Args:
        probabilities: class to probability, likeliest first.
        kind: `blend`, `head` or `knn`; names the list.
    """
    rows = "".join(
        f'<li data-label="{text(name)}" data-score="{value:.6f}"><span class="knn-name" title="'
        f'{text(name)}">{name_of(name)}</span><span class="knn-bar" aria-hidden="true"><i style="'
        f'width:{100 * value:.1f}%"></i></span><span class="knn-value">{value:.1%}</span></li>'
        for name, value in list(probabilities.items())[:_BARS]
    )
    return f'<ul class="knn-bars knn-{kind}">{rows}</ul>'


def samples_page(samples: Iterable[bytes]) -> str:
    """Pictures to begin with, as buttons."""
    tiles = "".join(
        f'<button type="button" class="knn-tile knn-small" data-row="{number}" '
        f'aria-label="Example {number + 1}"><img src="{as_uri(picture)}" alt=""></button>'
        for number, picture in enumerate(samples)
    )
    hint = '<p class="knn-hint">Or begin with one of these:</p>'
    return f'{hint if tiles else ""}<div class="knn-tiles">{tiles}</div>'


def _strip(looks: Sequence[Look], chosen: int, answers: Sequence[Explanation]) -> str:
    if len(looks) == 1:
        return ""
    tiles = "".join(
        f'<button type="button" class="knn-tile" data-look="{number}" aria-pressed="'
        f'{str(number == chosen).lower()}" aria-label="Picture {number + 1}: {text(one.answer)}">'
        f'<img src="{as_uri(look.thumbnail)}" alt=""><b>{name_of(one.answer)}</b>'
        f"<span>{one.probabilities[one.answer]:.0%}</span></button>"
        for number, (look, one) in enumerate(zip(looks, answers, strict=True))
    )
    return f'<div class="knn-tiles knn-strip">{tiles}</div>'


def _notices(found: Explanation) -> dict[str, str]:
    """What to be careful about: as it is shown, and as it is read out."""
    notes = {}
    if disagrees(found):
        head, knn = str(first(found.head)[0]), str(first(found.knn)[0])
        notes[
            f"Head and neighbours disagree: the head says <b>{name_of(head)}</b>, the neighbours "
            f"<b>{name_of(knn)}</b>."
        ] = "Head and neighbours disagree."
    if not found.is_typical:
        notes[
            f"Unlike anything seen: only {found.typicality:.1%} of the stored pictures lie as far "
            "from their nearest one."
        ] = "Unlike anything seen."
    return notes


def _gallery(found: Explanation, picture_of: FindPicture) -> str:
    if not found.neighbors:
        return "<p>Nobody: this model has no stored pictures.</p>"
    tiles = [
        tile(Near(row.row_id, row.label, row.similarity, row.share), picture_of(row.row_id))
        for row in found.neighbors[:_MOST_TILES]
    ]
    heaviest, rest = "".join(tiles[:_TILES]), tiles[_TILES:]
    count = len(found.neighbors) - _TILES
    shown = f", the first {len(rest)} of them" if count > len(rest) else ""
    more = (
        f'<details class="knn-more"><summary>{count} more, that weigh less{shown}</summary>'
        f'<div class="knn-tiles">{"".join(rest)}</div></details>'
    )
    return f'<div class="knn-tiles" id="knn-voters">{heaviest}</div>{more if rest else ""}'


def _flip(found: Explanation) -> str:
    if found.flip is None:
        return "Nothing among the stored pictures near it: the answer would stay."
    count, answer = len(found.flip.row_ids), name_of(found.flip.answer)
    pictures = "this picture" if count == 1 else f"these {count} pictures"
    how = "" if found.flip.is_smallest else " (perhaps fewer would do)"
    return f"Without {pictures} it would be <b>{answer}</b>{how}."


def _flip_tiles(found: Explanation, picture_of: FindPicture) -> str:
    """The pictures that the answer hangs on, the heaviest first."""
    ids = [] if found.flip is None else found.flip.row_ids
    tiles = "".join(
        f'<button type="button" class="knn-tile knn-small" data-row="{row_id}" aria-label="'
        f'Picture {row_id}">{picture_or_number(row_id, picture_of(row_id))}</button>'
        for row_id in ids[:_FLIP_TILES]
    )
    more = f'<p class="knn-hint">and {len(ids) - _FLIP_TILES} more</p>'
    return f'<div class="knn-tiles">{tiles}</div>{more if len(ids) > _FLIP_TILES else ""}'


def _voices(found: Explanation) -> str:
    parts = [f"<section><h3>The head alone</h3>{bars(found.head, 'head')}</section>"]
    if found.knn:
        parts.append(f"<section><h3>The neighbours alone</h3>{bars(found.knn, 'knn')}</section>")
    return "".join(parts)
