"""Drawings for pages, as SVG: no plotting library, sharp at any size."""

import html
from collections.abc import Sequence

from .html import plain

COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a3e9d", "#8c6d31",
    "#b22222", "#2f4f4f", "#7fbf3f", "#5b5bd6",
)  # fmt: skip
"""Told apart by most people, also those who see colours otherwise."""

GREY, INK, LINE = "#c3c9cf", "#1c2126", "#d5dbe1"
_LONGEST_NAME = 26
_SIDE, _LEFT, _TOP = 300, 60, 30
"""Of the square in which confidence and accuracy are drawn."""


def drawing(width: int, height: int, parts: Sequence[str]) -> str:
    """A drawing on white.

    Args:
        width: in pixels.
        height: in pixels.
        parts: elements, in the order in which they are drawn.
    """
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13" fill="{INK}">'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>{"".join(parts)}</svg>'
    )


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    """An element with words.

    Args:
        x: where they begin, end or have their middle.
        y: of the line that they stand on.
        words: any.
        anchor: `start`, `middle` or `end`.
    """
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'


def short(name: object) -> str:
    """A name that fits a legend, in one line."""
    words = plain(name)
    return words if len(words) <= _LONGEST_NAME else f"{words[: _LONGEST_NAME - 1]}…"


def reliability_svg(bins: Sequence[Sequence[float]]) -> str:
    """Draws how often answers are right when a model says how sure it is.

    Args:
        bins: mean confidence, accuracy and number of pictures of each, see `metrics.reliability`.
    """

    def spot(confidence: float, accuracy: float) -> tuple[float, float]:
        return _LEFT + confidence * _SIDE, _TOP + (1 - accuracy) * _SIDE

    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        (x, bottom), (left, y) = spot(share, 0), spot(0, share)
        parts.append(f'<path d="M{x} {_TOP}V{bottom}M{left} {y}h{_SIDE}" stroke="{LINE}"/>')
        parts += [text(x, bottom + 18, f"{share:.0%}", "middle")]
        parts += [text(left - 8, y + 4, f"{share:.0%}", "end")]
    (x, y), (right, top) = spot(0, 0), spot(1, 1)
    parts.append(f'<path d="M{x} {y}L{right} {top}" stroke="{GREY}" stroke-dasharray="5 5"/>')
    places = [spot(confidence, accuracy) for confidence, accuracy, _ in bins]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(
        f'<polyline points="{points}" fill="none" stroke="{COLOURS[0]}" stroke-width="2"/>'
    )
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[0]}"/>' for x, y in places]
    parts.append(text(_LEFT + _SIDE / 2, _TOP + _SIDE + 42, "how sure it says it is", "middle"))
    parts.append(text(_LEFT, 18, "how often it is right"))
    return drawing(_LEFT + _SIDE + 30, _TOP + _SIDE + 60, parts)
