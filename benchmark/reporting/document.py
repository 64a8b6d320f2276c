"""What a report is made of, apart from how it is written down."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class Text:
    """A paragraph; `soft` is fine print."""

    kind: ClassVar[str] = "text"
    text: str
    soft: bool = False


@dataclass(frozen=True)
class Heading:
    """A line above some blocks."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Bullets:
    """Lines of a list: what is in bold, if anything, and the rest."""

    kind: ClassVar[str] = "bullets"
    lines: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Facts:
    """Numbers to see at once: (value, what it counts)."""

    kind: ClassVar[str] = "facts"
    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        columns: the header.
        rows: as wide as the header.
        caption: a line above it.
        words: the first columns, which are text; the others are numbers, aligned to the right.
        strong: places (row, column) in bold.
        good: places that speak for the first of two arms.
        bad: places that speak against it.
        folded: what opens it, for a table that is shut at first; empty for an open one.
    """

    kind: ClassVar[str] = "grid"
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    words: int = 1
    strong: frozenset[tuple[int, int]] = frozenset()
    good: frozenset[tuple[int, int]] = frozenset()
    bad: frozenset[tuple[int, int]] = frozenset()
    folded: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing on light and on dark ground.

    Attributes:
        name: of its file, without the ending.
        alt: what it shows, for those who cannot see it.
        light: PNG.
        dark: PNG.
    """

    name: str
    alt: str
    light: bytes = field(repr=False)
    dark: bytes = field(repr=False)


@dataclass(frozen=True)
class Figures:
    """Drawings side by side where there is room; `wide` ones take a row each."""

    kind: ClassVar[str] = "figures"
    figures: Sequence[Figure]
    wide: bool = False


@dataclass(frozen=True)
class Tile:
    """A picture of a gallery.

    Attributes:
        name: of its file, without the ending.
        picture: a data URI.
        title: the first line.
        lines: more lines.
        good: whether it is a success.
    """

    name: str
    picture: str = field(repr=False)
    title: str
    lines: Sequence[str]
    good: bool


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side."""

    kind: ClassVar[str] = "gallery"
    tiles: Sequence[Tile]


Block = Text | Heading | Bullets | Facts | Grid | Figures | Gallery


@dataclass(frozen=True)
class Section:
    """A chapter; one without blocks is left out."""

    heading: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Report:
    """A whole report."""

    title: str
    lead: Sequence[str]
    sections: Sequence[Section]
