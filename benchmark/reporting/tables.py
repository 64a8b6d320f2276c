"""Tables of a report: what each arm scored, how arms differ, what it cost."""

from collections.abc import Sequence
from statistics import mean, median

from reporting.cells import Cell, Results, Setting
from reporting.document import Grid
from reporting.pairs import Across, Difference, shared_arms
from reporting.statistics import Interval, mean_and_std
from reporting.words import (
    DASH,
    arm_name,
    difference_name,
    p_value,
    percent,
    points,
    signed,
)
from study.phases import PHASES

METRICS = {"top1": "top-1", "mean_class": "mean class", "nll": "NLL", "ece": "ECE"}


def values_of(cells: Sequence[Cell], arm: str, metric: str, part: str = "test") -> list[float]:
    """One value per split; splits that lack the arm or the metric are left out."""
    found = [cell.arms.get(arm, {}).get(part) or {} for cell in cells]
    return [float(entry[metric]) for entry in found if entry.get(metric) is not None]


def shown_metric(values: Sequence[float], metric: str) -> str:
    """Mean ± std over splits: percent, except the NLL."""
    if not values:
        return DASH
    average, deviation = mean_and_std(values)
    if metric == "nll":
        return f"{average:.3f}" + ("" if deviation != deviation else f" ± {deviation:.3f}")
    return percent(average, deviation)


def setting_words(setting: Setting) -> list[str]:
    """Task, backbone and, if there is any, shots and shift."""
    return [*setting.pair, *([setting.detail] if setting.detail else [])]


def overview(results: Results, protocol: str, arms: Sequence[str], folded: str = "") -> Grid:
    """Top-1 of each arm of a protocol, one row per setting; the best is bold."""
    settings = results.settings(protocol)
    detailed = any(setting.detail for setting in settings)
    rows, strong = [], set()
    for number, (setting, cells) in enumerate(settings.items()):
        words = setting_words(setting)
        words += [""] * (2 + detailed - len(words))
        values = [values_of(cells, arm, "top1") for arm in arms]
        best = max((mean(v) for v in values if v), default=0.0)
        strong |= {
            (number, len(words) + 1 + column)
            for column, v in enumerate(values)
            if v and mean(v) >= best - 1e-12
        }
        rows.append([*words, str(len(cells)), *(shown_metric(v, "top1") for v in values)])
    columns = ["task", "backbone", *(["variant"] if detailed else []), "splits"]
    return Grid(
        [*columns, *map(arm_name, arms)], rows, words=2 + detailed, strong=frozenset(strong),
        caption="Top-1 on test in %, mean ± std over splits; the best arm is bold.", folded=folded,
    )  # fmt: skip


def all_metrics(results: Results, protocol: str) -> Grid:
    """Every metric of every arm, with and without near duplicates, and what was chosen."""
    rows = []
    for setting, cells in results.settings(protocol).items():
        where = " · ".join(setting_words(setting))
        for arm in shared_arms(cells):
            row = [where, arm_name(arm)]
            for part in ("test", "test_clean"):
                row += [shown_metric(values_of(cells, arm, m, part), m) for m in METRICS]
            rows.append([*row, chosen_words(cells, arm)])
    clean = [f"{name} (clean)" for name in METRICS.values()]
    return Grid(
        ["setting", "arm", *METRICS.values(), *clean, "chosen"], rows, words=2,
        folded="All metrics, also without near duplicates, and what was chosen",
        caption="Mean ± std over splits, in % except the NLL (p floored at 1e-12). "
        "“Clean”: without test items that have a near duplicate in training.",
    )  # fmt: skip


def chosen_words(cells: Sequence[Cell], arm: str) -> str:
    """What was chosen on validation, in each split."""
    names = dict.fromkeys(name for cell in cells for name in cell.arms[arm].get("chosen") or {})
    words = []
    for name in names:
        values = [_short((cell.arms[arm].get("chosen") or {}).get(name)) for cell in cells]
        same = len(set(values)) == 1
        words.append(f"{name} {values[0] if same else ', '.join(values)}")
    return "; ".join(words) or DASH


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def with_interval(interval: Interval, digits: int = 1) -> str:
    """A difference in points with its interval."""
    low, high = points(interval.low, digits), points(interval.high, digits)
    return f"{points(interval.mean, digits)} [{low}, {high}]"


def differences_table(
    results: Results, differences: Sequence[Difference], folded: str = ""
) -> Grid:
    """Paired differences, with and without near duplicates; clear ones are coloured."""
    rows: list[list[str]] = []
    good: set[tuple[int, int]] = set()
    bad: set[tuple[int, int]] = set()
    for number, difference in enumerate(differences):
        comparison, setting = difference.comparison, difference.setting
        name = difference_name(comparison.first, comparison.second)
        nll = difference.nll
        shown = [signed(value, 3) for value in nll]
        clean = DASH if difference.clean is None else with_interval(difference.clean)
        rows.append(
            [
                name, " · ".join(setting_words(setting)), str(difference.splits),
                with_interval(difference.top1), clean, f"{shown[0]} [{shown[1]}, {shown[2]}]",
            ]
        )  # fmt: skip
        signs = {3: difference.top1.sign, 5: -nll.sign}
        signs[4] = difference.clean.sign if difference.clean else 0
        good |= {(number, column) for column, sign in signs.items() if sign > 0}
        bad |= {(number, column) for column, sign in signs.items() if sign < 0}
    columns = ["difference", "setting", "splits", "top-1, points", "top-1, clean", "NLL"]
    return Grid(
        columns, rows, words=2, good=frozenset(good), bad=frozenset(bad),
        strong=frozenset(good | bad),
        caption="Mean [95 % interval]; bold where the interval excludes 0. Lower NLL is better.",
        folded=folded,
    )  # fmt: skip


def across_table(across: Sequence[Across]) -> Grid:
    """Wilcoxon tests over pairs of task and backbone."""
    rows = []
    for row in across:
        note = "" if row.test.can_conclude else "too few pairs"
        comparison = row.comparison
        rows.append(
            [
                difference_name(comparison.first, comparison.second),
                comparison.protocol, str(len(row.by_pair)),
                f"{row.above} / {row.below}", f"{row.clear[0]} / {row.clear[1]} of {row.settings}",
                points(row.mean, 2), p_value(row.test.p), p_value(row.adjusted), note or DASH,
            ]
        )  # fmt: skip
    columns = [
        "difference", "protocol", "pairs", "above / below", "clearly", "mean, points",
        "p", "p (Holm)", "note",
    ]  # fmt: skip
    return Grid(columns, rows, words=2)


def cost_table(results: Results) -> Grid:
    """Seconds by phase over all splits, pictures per second and memory."""
    settings = results.settings()
    phases = _phases_of(results)
    rows = []
    for setting, cells in settings.items():
        seconds = [sum(c.document["seconds"].get(p) or 0 for c in cells) for p in phases]
        images = sum(c.document.get("images") or 0 for c in cells)
        rates = [r for c in cells if (r := c.document.get("images_per_second"))]
        memory = max(c.document.get("peak_memory_bytes") or 0 for c in cells)
        rows.append(
            [
                " · ".join([setting.protocol, *setting_words(setting)]), str(len(cells)),
                *(f"{s:.1f}" if s else DASH for s in seconds), f"{sum(seconds):.1f}",
                f"{images:,}" if images else "cached", f"{mean(rates):.0f}" if rates else DASH,
                f"{memory / 2**20:,.0f}" if memory else DASH,
            ]
        )  # fmt: skip
    columns = ["setting", "cells", *phases, "total s", "images", "images/s", "peak MiB"]
    return Grid(columns, rows, folded="Seconds per phase, summed over splits")


def phase_table(results: Results) -> Grid:
    """Seconds of each phase over all cells, and its pictures per second where cells tell them."""
    rows = []
    for phase in _phases_of(results):
        spent = [c.document["seconds"].get(phase) for c in results.cells]
        rates = [r for c in results.cells if (r := (c.document.get("rates") or {}).get(phase))]
        seconds = [s for s in spent if s]
        rows.append(
            [
                phase, str(len(seconds)), f"{sum(seconds):,.1f}",
                f"{median(rates):,.0f}" if rates else DASH,
            ]
        )  # fmt: skip
    return Grid(
        ["phase", "cells", "seconds", "images/s"], rows, words=1,
        caption="What the cells of a split share is charged to the first; images/s is the median "
        "over cells of the pictures that a phase goes over.",
    )  # fmt: skip


def _phases_of(results: Results) -> list[str]:
    """The phases there are, in the order of a cell."""
    there = dict.fromkeys(p for cell in results.cells for p in cell.document["seconds"])
    return sorted(there, key=lambda p: PHASES.index(p) if p in PHASES else len(PHASES))


def cost_words(results: Results) -> str:
    """Seconds of each phase over all cells, the longest first."""
    totals: dict[str, float] = {}
    for cell in results.cells:
        for phase, seconds in cell.document["seconds"].items():
            totals[phase] = totals.get(phase, 0.0) + (seconds or 0.0)
    order = sorted(totals, key=lambda phase: -totals[phase])
    shown = ", ".join(f"{phase} {totals[phase]:,.0f} s" for phase in order)
    return f"All {len(results.cells):,} cells together: {shown}."
