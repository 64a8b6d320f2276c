"""Writes a report as Markdown, with its pictures in a folder beside it."""

import base64
import re
from collections.abc import Iterator
from pathlib import Path

from reporting.document import (
    Block,
    Bullets,
    Facts,
    Figures,
    Gallery,
    Grid,
    Heading,
    Report,
    Text,
)
from reporting.words import clean

FIGURES = "figures"
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~#])")
_TILES_IN_A_ROW = 4

LONGEST_FOLDED = 200
"""Rows of a folded table; a longer one is in the page alone, as sites show no such Markdown."""


def write_markdown(report: Report, folder: Path) -> Path:
    """Writes `report.md` and the folder `figures`.

    Args:
        report: to write.
        folder: where to; made if it is missing.

    Returns:
        The path of the Markdown.
    """
    (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    lines = [f"# {escaped(report.title)}", "", *_paragraphs(report.lead)]
    for section in report.sections:
        if section.blocks:
            lines += [f"## {escaped(section.heading)}", ""]
            for block in section.blocks:
                lines += [*_block(block, folder), ""]
    path = folder / "report.md"
    text = "\n".join(lines).rstrip() + "\n"
    path.write_text(re.sub(r"\n{3,}", "\n\n", text), encoding="utf-8")
    return path


def escaped(text: object) -> str:
    """A text that Markdown shows as it is, in one line."""
    return _SPECIAL.sub(r"\\\1", clean(text)).replace("&", "&amp;")


def _paragraphs(texts: object) -> list[str]:
    assert isinstance(texts, list | tuple)
    return [line for text in texts for line in (escaped(text), "")]


def _block(block: Block, folder: Path) -> Iterator[str]:
    match block:
        case Text():
            yield escaped(block.text)
        case Heading():
            yield f"### {escaped(block.text)}"
        case Bullets():
            for lead, rest in block.lines:
                yield f"- **{escaped(lead)}** {escaped(rest)}" if lead else f"- {escaped(rest)}"
        case Facts():
            yield " · ".join(f"**{escaped(value)}** {escaped(name)}" for value, name in block.facts)
        case Grid():
            yield from _grid(block)
        case Figures():
            yield from _figures(block, folder)
        case Gallery():
            yield from _gallery(block, folder)


def _grid(grid: Grid) -> Iterator[str]:
    if grid.folded and len(grid.rows) > LONGEST_FOLDED:
        where = "in report.html, which the same command writes; the numbers are in results.parquet"
        yield f"{escaped(grid.folded)}: {len(grid.rows):,} rows, {where}."
        return
    if grid.folded:
        yield from (f"<details><summary>{escaped(grid.folded)}</summary>", "")
    if grid.caption:
        yield from (escaped(grid.caption), "")
    yield _row([escaped(name) for name in grid.columns])
    yield _row(["---" if i < grid.words else "---:" for i in range(len(grid.columns))])
    for number, row in enumerate(grid.rows):
        cells = [escaped(cell) for cell in row]
        yield _row([f"**{c}**" if (number, i) in grid.strong else c for i, c in enumerate(cells)])
    if grid.folded:
        yield from ("", "</details>")


def _figures(block: Figures, folder: Path) -> Iterator[str]:
    for figure in block.figures:
        (folder / FIGURES / f"{figure.name}.png").write_bytes(figure.light)
        yield f"![{escaped(figure.alt)}]({FIGURES}/{figure.name}.png)"


def _gallery(block: Gallery, folder: Path) -> Iterator[str]:
    cells = []
    for tile in block.tiles:
        kind, _, data = tile.picture.partition(",")
        name = f"{tile.name}.{'png' if 'png' in kind else 'jpg'}"
        (folder / FIGURES / name).write_bytes(base64.b64decode(data))
        words = "<br>".join(map(escaped, [tile.title, *tile.lines]))
        mark = "✓" if tile.good else "✗"
        cells.append(f"![{escaped(tile.title)}]({FIGURES}/{name})<br>{mark} {words}")
    width = min(_TILES_IN_A_ROW, len(cells))
    yield _row([" "] * width)
    yield _row(["---"] * width)
    for first in range(0, len(cells), width):
        row = cells[first : first + width]
        yield _row(row + [" "] * (width - len(row)))


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
