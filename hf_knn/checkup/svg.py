"""Drawings of a checkup: a map of rows, and what more pictures would bring."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

from ..core.config import Normalization
from ..core.search import normalize_rows
from ..fit.svg import COLOURS, GREY, INK, LINE, drawing, short, text
from .findings import Floats, Ints
from .learning_curve import LearningCurve

MOST_ROWS = 5_000
"""Rows on a map; of more, so many are drawn at random."""

MOST_COLOURS = 12
"""Classes with a colour of their own on a map; the largest ones."""

_PRINCIPAL = 50
_PERPLEXITY = 30.0

Spot = Callable[[float, float], tuple[float, float]]
"""From a size and an accuracy to a place in a drawing."""


def place_features(features: Tensor, seed: int) -> tuple[Ints, Floats]:
    """Places rows in the plane so that neighbours stay neighbours: PCA to 50, then t-SNE.

    Args:
        features: [N, D] raw; they are centred and put to unit length here. Of more than 5,000 rows
            so many are drawn at random.
        seed: of the choice and the places.

    Returns:
        [M] the rows and [M, 2] where they lie.

    Raises:
        ValueError: for fewer than four rows.
    """
    if len(features) < 4:
        raise ValueError(f"Expected at least 4 rows to draw a map of, but got {len(features)}.")
    rows = np.arange(len(features))
    if len(rows) > MOST_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MOST_ROWS, replace=False))
    mean = features.double().mean(0).numpy()
    values = normalize_rows(features.numpy()[rows], mean, Normalization.L2_CENTERED)
    width = min(_PRINCIPAL, *values.shape)
    reduced = PCA(width, random_state=seed, svd_solver="randomized").fit_transform(values)
    perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
    placed = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)
    return rows, placed.astype(np.float64)


def map_svg(
    places: Floats,
    labels: Ints,
    names: Sequence[str],
    marked: NDArray[np.bool_],
    ids: Ints | None = None,
) -> str:
    """Draws placed rows with a legend, the largest classes in colours of their own.

    Args:
        places: [M, 2].
        labels: [M] int64, -1 for none.
        names: of the classes.
        marked: [M] bool, rows with a ring around them.
        ids: [M] of the rows; each dot then carries its own as `data-row`, for pages that listen.
    """
    low, high = places.min(axis=0), places.max(axis=0)
    spots = 20 + (places - low) / np.maximum(high - low, 1e-12) * (700, 560)
    counts = np.bincount(labels[labels >= 0], minlength=len(names))
    shown = [int(c) for c in np.argsort(-counts, kind="stable")[:MOST_COLOURS] if counts[c]]
    rest = ~np.isin(labels, shown)
    parts = [_dots(spots, rest, GREY, 2, ids)]
    parts += [_dots(spots, labels == c, COLOURS[i], 3, ids) for i, c in enumerate(shown)]
    rings = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6"/>' for x, y in spots[marked])
    style = 'fill="none" pointer-events="none" stroke-width="1.2"'
    parts.append(f'<g {style} stroke="{INK}">{rings}</g>')
    legend = [(COLOURS[i], f"{short(names[c])} ({counts[c]})") for i, c in enumerate(shown)]
    if rest.any():
        legend.append((GREY, f"others ({int(rest.sum())})"))
    for row, (colour, words) in enumerate(legend):
        y = 30 + 22 * row
        parts.append(f'<circle cx="750" cy="{y}" r="5" fill="{colour}"/>{text(763, y + 4, words)}')
    if marked.any():
        y = 30 + 22 * len(legend)
        parts.append(f'<circle cx="750" cy="{y}" r="6" fill="none" stroke="{INK}"/>')
        parts.append(text(763, y + 4, f"with a finding ({int(marked.sum())})"))
    return drawing(960, 600, parts)


def curve_svg(curve: LearningCurve) -> str:
    """Draws accuracy over pictures per class, and where twice as many would lie.

    Args:
        curve: with at least one size.
    """
    means = curve.accuracies.mean(axis=0)
    spreads = curve.accuracies.std(axis=0, ddof=1) if len(curve.accuracies) > 1 else 0 * means
    known = not np.isnan(curve.gain)
    last = 2 * curve.per_class[-1] if known else curve.per_class[-1]
    top, bottom = float((means + spreads).max()), float((means - spreads).min())
    if known:
        top = max(top, float(means[-1]) + curve.gain + curve.spread)
    top, bottom = min(1.0, top + 0.03), max(0.0, bottom - 0.03)

    def spot(size: float, accuracy: float) -> tuple[float, float]:
        left, right = np.log(curve.per_class[0]), np.log(last)
        x = 80 + (np.log(size) - left) / max(right - left, 1e-9) * 560
        return float(x), float(30 + (top - accuracy) / max(top - bottom, 1e-9) * 270)

    parts = [_grid(spot, curve, bottom, top)]
    for size, mean, spread in zip(curve.per_class, means, spreads, strict=True):
        parts.append(_mark(spot(size, mean - spread), spot(size, mean), spot(size, mean + spread)))
    if known:
        parts.append(_promise(spot, curve))
    parts.append(text(360, 355, "pictures per class (logarithmic)", "middle"))
    parts.append(text(80, 18, "held out and answered right; bars: ± 1 std over folds"))
    return drawing(720, 370, parts)


def _promise(spot: Spot, curve: LearningCurve) -> str:
    """The power law through what was measured, dashed beyond it."""
    a, b = curve.parameters
    scale = curve.sizes[-1] / curve.per_class[-1]

    def path(first: float, end: float) -> str:
        sizes = np.geomspace(first, end, 40)
        points = (spot(size, 1 - a * (size * scale) ** -b) for size in sizes)
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)

    last = float(curve.per_class[-1])
    x, y = spot(2 * last, 1 - a * (2 * last * scale) ** -b)
    return (
        f'<g fill="none" stroke="{COLOURS[1]}" stroke-width="2">'
        f'<polyline points="{path(float(curve.per_class[0]), last)}"/>'
        f'<polyline points="{path(last, 2 * last)}" stroke-dasharray="5 5"/></g>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#ffffff" stroke="{COLOURS[1]}"/>'
        + text(x - 8, y - 10, f"{100 * curve.gain:+.1f} points", "end")
    )


def _grid(spot: Spot, curve: LearningCurve, bottom: float, top: float) -> str:
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (top - bottom) / s <= 7)
    parts = []
    for number in range(int(np.ceil(bottom / step)), int(np.floor(top / step)) + 1):
        _, y = spot(curve.per_class[0], number * step)
        parts.append(f'<line x1="80" x2="640" y1="{y:.1f}" y2="{y:.1f}" stroke="{LINE}"/>')
        parts.append(text(70, y + 4, f"{number * step:.0%}", "end"))
    sizes = [*curve.per_class, *([] if np.isnan(curve.gain) else [2 * curve.per_class[-1]])]
    for size in sizes:
        x, _ = spot(size, bottom)
        parts.append(text(x, 325, f"{size:.0f}" if size >= 10 else f"{size:.1f}", "middle"))
    return "".join(parts)


def _mark(low: tuple[float, float], mid: tuple[float, float], high: tuple[float, float]) -> str:
    return (
        f'<line x1="{low[0]:.1f}" y1="{low[1]:.1f}" x2="{high[0]:.1f}" y2="{high[1]:.1f}" '
        f'stroke="{COLOURS[0]}" stroke-width="2"/>'
        f'<circle cx="{mid[0]:.1f}" cy="{mid[1]:.1f}" r="5" fill="{COLOURS[0]}"/>'
    )


def _dots(
    spots: Floats, chosen: NDArray[np.bool_], colour: str, radius: int, ids: Ints | None
) -> str:
    rows = np.flatnonzero(chosen)
    names = [""] * len(rows) if ids is None else [f' data-row="{i}"' for i in ids[rows].tolist()]
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"{name}/>'
        for (x, y), name in zip(spots[rows].tolist(), names, strict=True)
    )
    return f'<g fill="{colour}" fill-opacity="0.85">{dots}</g>'
