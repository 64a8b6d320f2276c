"""Drawings of a report, each on light and on dark ground; numbers come in ready to be drawn."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from reporting.document import Figure
from reporting.statistics import Floats, Interval
from reporting.words import arm_name

_DPI = 150
_LONGEST = 48  # characters
_COLOURS_KEPT = 96  # flat drawings: a palette is a third of the size


@dataclass(frozen=True)
class Theme:
    """Colours of a ground."""

    paper: str
    ink: str
    soft: str
    line: str
    arms: Mapping[str, str]
    others: Sequence[str]
    map: str

    def colour(self, arm: str, number: int = 0) -> str:
        """The colour of an arm, or of the n-th one that has none of its own."""
        return self.arms.get(arm, self.others[number % len(self.others)])


LIGHT = Theme(
    "#ffffff", "#1c2126", "#59636e", "#d5dbe1",
    {"head": "#0072b2", "plain": "#0072b2", "knn": "#c2410c", "blend": "#00805c",
     "fixed": "#8a5a9e", "ridge": "#8c6d31"},
    ("#6b7280", "#b5277d", "#3f7d20", "#5b5bd6", "#9a3412", "#0f766e"),
    "viridis",
)  # fmt: skip
DARK = Theme(
    "#14181c", "#e4e8ec", "#a0aab4", "#38414a",
    {"head": "#5db4ee", "plain": "#5db4ee", "knn": "#ff8f4d", "blend": "#3fcf9b",
     "fixed": "#c79be0", "ridge": "#d9b25c"},
    ("#a8b0ba", "#f07ac0", "#8fd06a", "#a5a5ff", "#ffb08a", "#5eead4"),
    "viridis",
)  # fmt: skip


class Row(NamedTuple):
    """A line of a forest plot.

    Attributes:
        label: of what.
        interval: in shares.
    """

    label: str
    interval: Interval


class Curve(NamedTuple):
    """Accuracy over shots of one arm: [n] each."""

    shots: Sequence[int]
    means: Sequence[float]
    stds: Sequence[float]


class Spot(NamedTuple):
    """A point of a gain plot: what may explain the gain, the gain, and a class of points."""

    place: float
    gain: Interval
    series: str


def forest(name: str, title: str, rows: Sequence[Row], alt: str) -> Figure:
    """Differences with intervals, one line each; 0 is marked."""
    height = 1.4 + 0.27 * len(rows)
    return _drawn(name, alt, (6.4, height), partial(_forest, title=title, rows=rows))


def curves(name: str, title: str, arms: Mapping[str, Curve], alt: str) -> Figure:
    """Accuracy against pictures per class with a band of ± 1 std over splits."""
    return _drawn(name, alt, (4.2, 3.3), partial(_curves, title=title, arms=arms))


def gains(name: str, title: str, spots: Sequence[Spot], alt: str, *, x: str, y: str) -> Figure:
    """Gains with their intervals against a share, both in hundredths; `x` and `y` name them."""
    return _drawn(name, alt, (6.4, 4.0), partial(_gains, title=title, spots=spots, x=x, y=y))


def heat(
    name: str, title: str, ks: Sequence[int], temperatures: Sequence[float], top1: Floats, alt: str
) -> Figure:
    """Accuracy of k-NN alone over k and temperature, [k, T]; the best cell is marked."""
    draw = partial(_heat, title=title, ks=ks, temperatures=temperatures, top1=top1)
    return _drawn(name, alt, (4.2, 3.3), draw)


def reliability(name: str, title: str, arms: Mapping[str, Floats], alt: str) -> Figure:
    """Accuracy against confidence; from `reliability_bins`, the dots as large as their bins."""
    return _drawn(name, alt, (4.2, 3.6), partial(_reliability, title=title, arms=arms))


Draw = Callable[[Axes, Theme], None]


def _drawn(name: str, alt: str, size: tuple[float, float], draw: Draw) -> Figure:
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "figure"
    return Figure(safe, alt, _png(size, draw, LIGHT), _png(size, draw, DARK))


def _png(size: tuple[float, float], draw: Draw, theme: Theme) -> bytes:
    engine = ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.09)  # inches
    canvas = Canvas(figsize=size, dpi=_DPI, facecolor=theme.paper, layout=engine)
    axes = canvas.add_subplot()
    axes.set_facecolor(theme.paper)
    axes.tick_params(colors=theme.soft, labelsize=8, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.line)
    draw(axes, theme)
    agg = FigureCanvasAgg(canvas)
    agg.draw()
    small = io.BytesIO()
    picture = Image.fromarray(np.asarray(agg.buffer_rgba())).convert("RGB")
    picture.quantize(_COLOURS_KEPT, dither=Image.Dither.NONE).save(small, "PNG")
    return small.getvalue()


def _titled(axes: Axes, theme: Theme, title: str, x: str, y: str) -> None:
    axes.set_title(_literal(title), color=theme.ink, fontsize=9.5, loc="left")
    axes.set_xlabel(x, color=theme.soft, fontsize=8.5)
    axes.set_ylabel(y, color=theme.soft, fontsize=8.5)


def _legend(axes: Axes, theme: Theme) -> None:
    axes.legend(frameon=False, fontsize=8, labelcolor=theme.ink)


def _literal(text: str) -> str:
    """Names are no formulas, and long ones would leave no room to draw."""
    lines = (x if len(x) <= _LONGEST else f"{x[: _LONGEST - 1]}…" for x in text.split("\n"))
    return "\n".join(lines).replace("$", r"\$")


def _forest(axes: Axes, theme: Theme, title: str, rows: Sequence[Row]) -> None:
    axes.axvline(0, color=theme.soft, linewidth=1)
    for place, (_, interval) in enumerate(rows):
        colour = {1: theme.arms["blend"], -1: theme.arms["knn"], 0: theme.soft}[interval.sign]
        ends = [100 * interval.low, 100 * interval.high]
        axes.plot(ends, [place, place], color=colour, linewidth=2, solid_capstyle="round")
        axes.plot([100 * interval.mean], [place], "o", color=colour, markersize=5.5)
    axes.set_yticks(range(len(rows)), [_literal(row.label) for row in rows])
    axes.tick_params(axis="y", colors=theme.ink, length=0)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=theme.line, linewidth=0.6)
    axes.set_axisbelow(True)
    _titled(axes, theme, title, "points of top-1, 95 % interval", "")


def _curves(axes: Axes, theme: Theme, title: str, arms: Mapping[str, Curve]) -> None:
    for number, (arm, curve) in enumerate(arms.items()):
        colour = theme.colour(arm, number)
        means, stds = 100 * np.asarray(curve.means), 100 * np.nan_to_num(np.asarray(curve.stds))
        style = "--" if arm == "fixed" else "-"
        label = _literal(arm_name(arm))
        axes.plot(curve.shots, means, style, marker="o", color=colour, markersize=4, label=label)
        axes.fill_between(
            curve.shots, means - stds, means + stds, color=colour, alpha=0.12, linewidth=0
        )
    shots = sorted({s for curve in arms.values() for s in curve.shots})
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, [str(s) for s in shots])
    axes.minorticks_off()
    axes.grid(axis="y", color=theme.line, linewidth=0.6)
    _titled(axes, theme, title, "labelled pictures per class", "top-1 on test, %")
    _legend(axes, theme)


def _gains(axes: Axes, theme: Theme, title: str, spots: Sequence[Spot], x: str, y: str) -> None:
    axes.axhline(0, color=theme.soft, linewidth=1)
    markers = "os^Dvphx*<>"
    for number, series in enumerate(dict.fromkeys(spot.series for spot in spots)):
        chosen = [spot for spot in spots if spot.series == series]
        places = [100 * spot.place for spot in chosen]
        means = np.array([100 * spot.gain.mean for spot in chosen])
        low = means - [100 * spot.gain.low for spot in chosen]
        high = [100 * spot.gain.high for spot in chosen] - means
        colour = (*theme.arms.values(), *theme.others)[1 + number % 10]
        axes.errorbar(
            places, means, yerr=np.maximum([low, high], 0), fmt=markers[number % len(markers)],
            color=colour, ecolor=(colour, 0.35), markersize=5, elinewidth=1, label=_literal(series),
        )  # fmt: skip
    axes.grid(color=theme.line, linewidth=0.6)
    axes.set_axisbelow(True)
    _titled(axes, theme, title, x, y)
    _legend(axes, theme)


def _heat(
    axes: Axes, theme: Theme, title: str, ks: Sequence[int], temperatures: Sequence[float],
    top1: Floats,
) -> None:  # fmt: skip
    values = 100 * np.asarray(top1)
    image = axes.imshow(values.T, cmap=theme.map, aspect="auto", origin="lower")
    column, row = np.unravel_index(np.nanargmax(values), values.shape)
    axes.plot(
        [column], [row], "o", markerfacecolor="none", markeredgecolor="#ffffff",
        markeredgewidth=2, markersize=9,
    )  # fmt: skip
    every = max(1, len(temperatures) // 8)
    axes.set_xticks(range(len(ks)), [str(k) for k in ks])
    axes.set_yticks(range(0, len(temperatures), every), [f"{t:g}" for t in temperatures[::every]])
    bar = axes.figure.colorbar(image, ax=axes)
    bar.ax.tick_params(colors=theme.soft, labelsize=8, length=2)
    bar.outline.set_edgecolor(theme.line)
    _titled(axes, theme, title, "k", "temperature T")


def _reliability(axes: Axes, theme: Theme, title: str, arms: Mapping[str, Floats]) -> None:
    axes.plot([0, 100], [0, 100], color=theme.soft, linewidth=1, linestyle=":")
    for number, (arm, bins) in enumerate(arms.items()):
        colour = theme.colour(arm, number)
        axes.plot(100 * bins[:, 0], 100 * bins[:, 1], color=colour, label=_literal(arm_name(arm)))
        sizes = 8 + 90 * bins[:, 2] / bins[:, 2].sum()
        axes.scatter(100 * bins[:, 0], 100 * bins[:, 1], s=sizes, color=colour, linewidth=0)
    axes.set_xlim(0, 101)
    axes.set_ylim(0, 101)
    axes.grid(color=theme.line, linewidth=0.6)
    axes.set_axisbelow(True)
    _titled(axes, theme, title, "confidence of the answer, %", "of these right, %")
    _legend(axes, theme)
