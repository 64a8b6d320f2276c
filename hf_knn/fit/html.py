"""Reports as one HTML file: no resource from elsewhere, every text escaped.

No script runs but that of the check boxes (`picking.py`), on pages that have some.
"""

import base64
import html
import io
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from PIL import Image

from .picking import PICK_POLICY, PICK_STYLE, Pick, Picking, pick_box, pick_panel

PAGE_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2126; --soft: #59636e;
  --line: #d5dbe1; --card: #f5f7f9; --good: #1a7f37; --bad: #b42318; --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181c; --ink: #e4e8ec; --soft: #a0aab4; --line: #38414a; --card: #1d2328;
    --good: #57c274; --bad: #ff8a7d; --link: #7db8f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 0 0 .5rem; font-weight: 600; }
p { max-width: 46rem; margin: .5rem 0; }
header p { color: var(--soft); }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; list-style: none; margin: 1rem 0 0;
  padding: 0; font-size: .9rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem;
  list-style: none; margin: 1rem 0; padding: 0; }
.facts li { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .6rem .8rem; }
.facts b { display: block; font-size: 1.5rem; line-height: 1.2;
  font-variant-numeric: tabular-nums; }
.facts span { color: var(--soft); font-size: .85rem; }
.facts .good b { color: var(--good); }
.facts .bad b { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: .75rem;
  list-style: none; margin: .75rem 0; padding: 0; }
.tiles li { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .5rem; }
.tiles li.good { border-color: var(--good); }
.tiles li.bad { border-color: var(--bad); }
.tiles .good .mark { color: var(--good); }
.tiles .bad .mark { color: var(--bad); }
figure { margin: 0; }
figure img, .empty { display: block; width: 112px; height: 112px; object-fit: contain;
  margin: 0 auto .4rem; }
figure img { background: #ffffff; border-radius: .25rem; }
.empty { border: 1px dashed var(--line); border-radius: .25rem; }
figcaption { font-size: .8rem; line-height: 1.35; }
figcaption b { display: block; }
figcaption span:not(.mark) { display: block; color: var(--soft); }
.groups { display: flex; flex-wrap: wrap; gap: .75rem; margin: .75rem 0; align-items: stretch; }
.group { border: 1px solid var(--line); border-radius: .6rem; padding: .75rem; max-width: 100%; }
.group .tiles { display: flex; flex-wrap: wrap; margin: 0; }
.group .tiles li { width: 132px; }
.table { overflow: auto; max-width: 100%; margin: .75rem 0; position: relative; }
.table:focus-visible, a:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; }
caption { text-align: left; color: var(--soft); padding-bottom: .35rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1rem .3rem 0;
  border-bottom: 1px solid var(--line); }
td { min-width: 6.5rem; }
.number { min-width: 0; text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
tbody th { font-weight: 400; }
td, th, h3, figcaption b, figcaption span { unicode-bidi: plaintext; }
.heat { max-height: 90vh; }
.heat table { border-collapse: separate; border-spacing: 1px; font-size: .8rem; }
.heat th, .heat td { border: 0; padding: .15rem .35rem; }
.heat td { text-align: center; min-width: 1.6rem; font-variant-numeric: tabular-nums; }
.heat th { background: var(--paper); }
.heat th span { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.heat tbody th { position: sticky; left: 0; text-align: right; }
.heat tbody th span { max-width: 7.5rem; }
.heat thead th { vertical-align: bottom; }
.heat thead span { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 8rem; }
.drawing { max-width: none; }
.drawing img { max-width: 100%; height: auto; background: #ffffff; border-radius: .5rem; }
@media (max-width: 26rem) { body { padding: 1rem .75rem 3rem; }
  .facts { grid-template-columns: 1fr 1fr; } .facts b { font-size: 1.2rem; }
  .group { padding: .5rem; width: 100%; } .group .tiles { gap: .5rem; }
  .group .tiles li { width: calc(50% - .25rem); } figure img, .empty { max-width: 100%; } }
@media print { nav { display: none; } .tiles li, .group { break-inside: avoid; } }
"""

THUMBNAIL_SIZE = 112
"""Side of a tile's picture, in pixels."""

_QUALITY = 82
_BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_MARKS = {"good": "✓", "bad": "✗", "neutral": ""}


class Tone(StrEnum):
    """What the frame of a tile or a number says; a mark beside the text says it too."""

    GOOD = "good"
    BAD = "bad"
    NEUTRAL = "neutral"


@dataclass(frozen=True)
class Tile:
    """A picture with a few lines of text.

    Attributes:
        title: the first line.
        picture: a data URI, see `thumbnail`; None shows an empty frame beside other pictures.
        lines: more lines.
        tone: good, bad or neutral.
        alt: what a screen reader says of the picture; the title if empty.
        pick: what a check box chooses; None for no box.
    """

    title: str
    picture: str | None = None
    lines: Sequence[str] = ()
    tone: str = Tone.NEUTRAL
    alt: str = ""
    pick: Pick | None = None


@dataclass(frozen=True)
class Group:
    """Tiles that belong together: a picture and its neighbours, say.

    Attributes:
        tiles: in order.
        title: a line above them; none if empty.
    """

    tiles: Sequence[Tile]
    title: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        columns: the header.
        rows: as wide as the header.
        caption: a line above it; none if empty.
        numeric: the columns, by number, that are aligned to the right.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    numeric: Sequence[int] = ()


@dataclass(frozen=True)
class Heat:
    """Counts of pairs, such as a confusion matrix, coloured by their share of the row.

    Attributes:
        names: of the rows, and first of the columns.
        more: names of further columns.
        counts: a row for each name, as wide as there are columns; what lies on the diagonal is
            good, and 0 is left empty.
        caption: a line above it.
    """

    names: Sequence[str]
    counts: Sequence[Sequence[int]]
    caption: str
    more: Sequence[str] = ()


@dataclass(frozen=True)
class Drawing:
    """A large picture.

    Attributes:
        picture: a data URI, see `png_uri` and `svg_uri`.
        alt: what it shows, for those who cannot see it.
    """

    picture: str
    alt: str


@dataclass(frozen=True)
class Fact:
    """A number to see at once.

    Attributes:
        value: the number.
        name: what it counts.
        tone: good, bad or neutral.
    """

    value: str
    name: str
    tone: str = Tone.NEUTRAL


@dataclass(frozen=True)
class Section:
    """One part of a page, shown in the order of the attributes.

    Attributes:
        heading: also listed at the top of the page.
        text: paragraphs.
        facts: numbers to see at once.
        drawings: large pictures.
        heats: counts of pairs.
        tables: rows of text.
        tiles: pictures side by side.
        groups: tiles that belong together, one group below the other.
    """

    heading: str
    text: Sequence[str] = ()
    facts: Sequence[Fact] = ()
    drawings: Sequence[Drawing] = ()
    heats: Sequence[Heat] = ()
    tables: Sequence[Table] = ()
    tiles: Sequence[Tile] = ()
    groups: Sequence[Group] = ()


def thumbnail(image: Image.Image, size: int = THUMBNAIL_SIZE) -> str:
    """A small copy of a picture as a data URI: encoded anew, so without its metadata.

    Args:
        image: decoded, any mode that converts to RGB.
        size: the longer side in pixels, >= 1; a tiny picture is enlarged in whole steps.

    Raises:
        ValueError: for a size below 1.
    """
    if size < 1:
        raise ValueError(f"Expected `size` to be >= 1 pixel, but got {size}.")
    small = image.convert("RGB")
    factor = size // max(small.size)
    if factor >= 2:
        enlarged = (small.width * factor, small.height * factor)
        return png_uri(_encoded(small.resize(enlarged, Image.Resampling.NEAREST), "PNG"))
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    return _uri("image/jpeg", _encoded(small, "JPEG", quality=_QUALITY))


def webp_uri(data: bytes) -> str:
    """A data URI of the bytes of a WEBP file."""
    return _uri("image/webp", data)


def png_uri(data: bytes) -> str:
    """A data URI of the bytes of a PNG file."""
    return _uri("image/png", data)


def svg_uri(text: str) -> str:
    """A data URI of an SVG drawing; as a picture it can run nothing and load nothing."""
    return _uri("image/svg+xml", text.encode())


def plain(text: object) -> str:
    """A text in one line without control characters, unpaired surrogates and turns of direction."""
    spaced = (" " if character in "\n\r\t\v\f" else character for character in str(text))
    return "".join(
        character
        for character in spaced
        if unicodedata.category(character) not in ("Cc", "Cs") and character not in _BIDIRECTIONAL
    )


def write_page(
    path: str | Path,
    title: str,
    sections: Sequence[Section],
    lead: Sequence[str] = (),
    picking: Picking | None = None,
) -> Path:
    """Writes a page as one file that needs no network and no other file.

    Args:
        path: the HTML file; folders are made.
        title: of the page.
        sections: in order; from three on they are listed at the top.
        lead: paragraphs before the first section.
        picking: what becomes of pictures that are chosen; None if no tile has a check box.

    Returns:
        The path.

    Raises:
        ValueError: for a picture that is not a data URI of an image, a row that is not as wide as
            its table, or check boxes without `picking`.
        OSError: if it cannot be written.
    """
    text = render_page(title, sections, lead, picking)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def render_page(
    title: str,
    sections: Sequence[Section],
    lead: Sequence[str] = (),
    picking: Picking | None = None,
) -> str:
    """The text of the page that `write_page` writes; same arguments and errors."""
    body = [f"<header><h1>{_text(title)}</h1>{_paragraphs(lead)}</header>"]
    if len(sections) > 2:
        links = (
            f'<li><a href="#s{number}">{_text(section.heading)}</a></li>'
            for number, section in enumerate(sections)
        )
        body.append(f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav>')
    parts = "\n".join(_section(number, section) for number, section in enumerate(sections))
    body.append(f"<main>\n{parts}\n</main>")
    policy, style = "default-src 'none'; img-src data:; style-src 'unsafe-inline'", PAGE_STYLE
    if '<label class="pick">' in parts:  # a text cannot say that
        if picking is None:
            raise ValueError("Expected `picking` for tiles with check boxes, but got None.")
        policy, style = f"{policy}; {PICK_POLICY}", style + PICK_STYLE
        body.append(pick_panel(picking))
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{_text(title)}</title>\n<style>{style}</style>\n</head>\n<body>",
            *body,
            "</body>\n</html>\n",
        ]
    )


def _section(number: int, section: Section) -> str:
    parts = [f'<section id="s{number}" aria-labelledby="h{number}">']
    parts.append(f'<h2 id="h{number}">{_text(section.heading)}</h2>')
    parts.append(_paragraphs(section.text))
    if section.facts:
        parts.append(f'<ul class="facts">{"".join(map(_fact, section.facts))}</ul>')
    parts += map(_drawing, section.drawings)
    parts += map(_heat, section.heats)
    parts += [_table(table, section.heading) for table in section.tables]
    if section.tiles:
        parts.append(_tiles(section.tiles))
    if section.groups:
        parts.append(f'<div class="groups">{"".join(map(_group, section.groups))}</div>')
    return "\n".join([part for part in parts if part] + ["</section>"])


def _fact(fact: Fact) -> str:
    tone = Tone(fact.tone)
    return f'<li class="{tone}"><b>{_text(fact.value)}</b> <span>{_text(fact.name)}</span></li>'


def _drawing(drawing: Drawing) -> str:
    return (
        f'<p class="drawing"><img src="{_source(drawing.picture)}" alt="{_text(drawing.alt)}"></p>'
    )


def _table(table: Table, heading: str) -> str:
    caption = f"<caption>{_text(table.caption)}</caption>" if table.caption else ""
    kinds = [' class="number"' if i in table.numeric else "" for i in range(len(table.columns))]
    names = zip(kinds, table.columns, strict=True)
    head = "".join(f'<th scope="col"{kind}>{_text(name)}</th>' for kind, name in names)
    rows = "".join(f"<tr>{_cells(row, kinds)}</tr>" for row in table.rows)
    content = f"{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    return _scrolled(content, table.caption or heading)


def _heat(heat: Heat) -> str:
    columns = [*heat.names, *heat.more]
    head = "".join(f'<th scope="col">{_named(name)}</th>' for name in columns)
    rows = []
    for number, (name, counts) in enumerate(zip(heat.names, heat.counts, strict=True)):
        if len(counts) != len(columns):
            raise ValueError(f"Expected rows of {len(columns)} counts, but got {len(counts)}.")
        total = max(1, sum(counts))
        cells = (_heat_cell(n, n / total, i == number) for i, n in enumerate(counts))
        rows.append(f'<tr><th scope="row">{_named(name)}</th>{"".join(cells)}</tr>')
    content = (
        f"<caption>{_text(heat.caption)}</caption><thead><tr><td></td>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody>"
    )
    return _scrolled(content, heat.caption, "table heat")


def _heat_cell(count: int, share: float, is_good: bool) -> str:
    if not count:
        return "<td></td>"
    colour = "26 127 55" if is_good else "200 50 35"
    return f'<td style="background:rgb({colour}/{0.1 + 0.45 * share:.2f})">{count}</td>'


def _named(name: str) -> str:
    """A name that may be cut off, and is whole in its title."""
    return f'<span title="{_text(name)}">{_text(name)}</span>'


def _scrolled(content: str, label: str, kind: str = "table") -> str:
    """A table that scrolls in a box of its own, which the keyboard reaches."""
    return (
        f'<div class="{kind}" tabindex="0" role="region" aria-label="{_text(label)}">'
        f"<table>{content}</table></div>"
    )


def _cells(row: Sequence[str], kinds: list[str]) -> str:
    if len(row) != len(kinds):
        raise ValueError(f"Expected rows of {len(kinds)} cells, but got one of {len(row)}.")
    return "".join(f"<td{kind}>{_text(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))


def _tiles(tiles: Iterable[Tile]) -> str:
    listed = list(tiles)
    # an empty frame keeps the lines of its neighbours' pictures level, and is of no other use
    frame = '<div class="empty" aria-hidden="true"></div>'
    frame = frame if any(tile.picture is not None for tile in listed) else ""
    return f'<ul class="tiles">{"".join(_tile(tile, frame) for tile in listed)}</ul>'


def _group(group: Group) -> str:
    title = f"<h3>{_text(group.title)}</h3>" if group.title else ""
    return f'<div class="group">{title}{_tiles(group.tiles)}</div>'


def _tile(tile: Tile, frame: str) -> str:
    tone = Tone(tile.tone)
    mark = f'<span class="mark" aria-hidden="true">{_MARKS[tone]}</span> ' if _MARKS[tone] else ""
    picture = frame
    if tile.picture is not None:
        picture = f'<img src="{_source(tile.picture)}" alt="{_text(tile.alt or tile.title)}">'
    lines = "".join(f"<span>{_text(line)}</span>" for line in tile.lines)
    caption = f"<figcaption><b>{mark}{_text(tile.title)}</b>{lines}</figcaption>"
    box = "" if tile.pick is None else pick_box(tile.pick)
    return f'<li class="{tone}"><figure>{picture}{caption}</figure>{box}</li>'


def _paragraphs(texts: Sequence[str]) -> str:
    return "".join(f"<p>{_text(text)}</p>" for text in texts)


def _text(value: object) -> str:
    return html.escape(plain(value))


def _source(uri: str) -> str:
    if not uri.startswith("data:image/"):
        raise ValueError(f"Expected a picture as a data URI, but got {uri[:40]!r}.")
    return html.escape(uri)


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    bare = Image.new("RGB", image.size)
    bare.paste(image)
    bare.save(buffer, kind, **options)
    return buffer.getvalue()
