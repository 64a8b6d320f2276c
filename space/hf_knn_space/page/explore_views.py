"""What is stored, as HTML."""

from collections.abc import Iterable, Sequence

from ..explorer import MAX_TILES, Exploration
from ..service import Near
from .markup import FindPicture, name_of, picture_or_number, text, tile

NOTHING = '<div class="knn-empty"><p>This model holds no stored pictures of its own.</p></div>'


def map_page(found: Exploration, total: int) -> str:
    """The map, with a line on how to read it.

    Args:
        found: what was found.
        total: rows of the datastore.
    """
    if not found.svg:
        return '<div class="knn-empty"><p>Too few pictures for a map.</p></div>'
    sample = (
        f" {found.looked_at:,} of {total:,}, drawn at random." if found.looked_at < total else ""
    )
    return (
        '<figure class="knn-map" role="group" aria-label="A map of the stored pictures; the list '
        f'of classes beside it shows the same pictures">{found.svg}</figure><p class="knn-hint">'
        "Each dot is a stored picture; alike ones lie together, and distances between clusters "
        f"mean little. Rings have a finding below. Select a dot to see it.{sample}</p>"
    )


def class_page(name: str, rows: Sequence[Near], count: int, picture_of: FindPicture) -> str:
    """The pictures of a class.

    Args:
        name: of the class.
        rows: the first of them.
        count: how many it has.
        picture_of: of a stored row.
    """
    if not rows:
        return '<div class="knn-empty"><p>Choose a class to see its pictures.</p></div>'
    shown = f", the first {len(rows)} of them" if count > len(rows) else ""
    tiles = "".join(tile(row, picture_of(row.row_id)) for row in rows)
    return (
        f'<p class="knn-hint"><b>{text(name)}</b>: {count:,} stored{shown}.</p>'
        f'<div class="knn-tiles">{tiles}</div>'
    )


def rows_of(found: Exploration) -> list[int]:
    """Ids of the stored rows whose pictures the findings show.

    Args:
        found: what was found.
    """
    doubted = [one.row.row_id for one in found.doubts]
    return doubted + [row.row_id for group in found.copies for row in group]


def findings_page(found: Exploration, picture_of: FindPicture) -> str:
    """Likely label errors, and copies."""
    doubts = "".join(
        tile(one.row, picture_of(one.row.row_id), f"rather {one.suggested}?")
        for one in found.doubts
    )
    copies = "".join(
        '<div class="knn-group">'
        + "".join(tile(row, picture_of(row.row_id)) for row in group)
        + "</div>"
        for group in found.copies
    )
    none = '<p class="knn-hint">None found.</p>'
    return (
        f"<section><h3>Likely label errors</h3>{_tiles(doubts) or none}</section>"
        f"<section><h3>The same picture twice</h3>{_groups(copies) or none}</section>"
        f'<p class="knn-hint">At most {MAX_TILES} of each are shown. Both come from the stored '
        "features alone: a suggestion to look, not a verdict.</p>"
    )


def detail_page(own: Near, others: Iterable[Near], picture_of: FindPicture) -> str:
    """One stored picture, large, and its neighbours, over the page."""
    tiles = "".join(tile(near, picture_of(near.row_id)) for near in others)
    large = picture_or_number(own.row_id, picture_of(own.row_id))
    return (
        '<dialog class="knn-detail" aria-labelledby="knn-detail"><form method="dialog"><button '
        f'aria-label="Close">✕</button></form><div class="knn-answer">{large}<div><p class="'
        f'knn-hint">Stored picture {own.row_id}</p><h3 id="knn-detail">{name_of(own.label)}</h3>'
        '<p class="knn-hint">Below: what is stored nearest to it, with the similarity.</p></div>'
        f'</div><div class="knn-tiles">{tiles}</div></dialog>'
    )


def _tiles(tiles: str) -> str:
    return f'<div class="knn-tiles" id="knn-doubts">{tiles}</div>' if tiles else ""


def _groups(groups: str) -> str:
    return f'<div class="knn-groups" id="knn-copies">{groups}</div>' if groups else ""
