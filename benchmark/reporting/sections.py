"""Chapters of a report with figures; those that have nothing to show are empty."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from reporting.cells import Cell, Results, Setting
from reporting.document import Block, Figure, Figures, Grid, Section, Text
from reporting.figures import Curve, Row, Spot, curves, forest, gains, heat, reliability
from reporting.pairs import (
    BESIDE_HEAD,
    Difference,
    reference_voice,
    shared_arms,
)
from reporting.statistics import mean_and_std, reliability_bins
from reporting.summary import head_accuracy
from reporting.tables import setting_words, values_of, with_interval
from reporting.words import DASH, MINUS, arm_name, difference_name, percent, points

_MOST_ROWS = 40
MOST_PANELS = 60
"""Drawings of a kind; more would make the page too large to open."""
_FEWEST = 10  # items of a bin that is drawn
_SERIES = {
    "knn": "all training pictures", "lowdata": "few pictures per class", "finetune": "fine-tuned",
    "robustness": "shifted pictures",
}  # fmt: skip
_RELIABLE = ("head", "plain", "knn", "blend", "fixed")


def forest_block(
    differences: Sequence[Difference], first: str, second: str, name: str
) -> list[Block]:
    """A forest plot of one comparison; split into several when there are many settings."""
    found = [d for d in differences if d.comparison[1:] == (first, second)]
    title = difference_name(first, second)
    drawn = []
    for start in range(0, len(found), _MOST_ROWS):
        part = found[start : start + _MOST_ROWS]
        rows = [Row(" · ".join(setting_words(d.setting)), d.top1) for d in part]
        alt = f"{title}: " + "; ".join(f"{r.label} {with_interval(r.interval)}" for r in rows)
        drawn.append(forest(f"{name}-{start // _MOST_ROWS + 1}", title, rows, alt))
    return [Figures(drawn, wide=True)] if drawn else []


def lowdata_blocks(results: Results) -> list[Block]:
    """Accuracy against pictures per class, per task and backbone."""
    by_pair: dict[tuple[str, str], list[list[Cell]]] = defaultdict(list)
    for setting, cells in results.settings("lowdata").items():
        if setting.shots is not None:
            by_pair[setting.pair].append(cells)
    drawn = []
    for pair, groups in list(by_pair.items())[:MOST_PANELS]:
        title = " · ".join(pair)
        arms: dict[str, Curve] = {}
        for arm in shared_arms([cell for cells in groups for cell in cells]):
            stats = [mean_and_std(values_of(cells, arm, "top1")) for cells in groups]
            shots = [cells[0].setting.shots or 0 for cells in groups]
            means, stds = zip(*stats, strict=True)
            arms[arm] = Curve(shots, means, stds)
        alt = f"Low-data curves of {title}: " + "; ".join(
            f"{arm} {percent(c.means[0])} to {percent(c.means[-1])} %" for arm, c in arms.items()
        )
        drawn.append(curves(f"lowdata-{'-'.join(pair)}", title, arms, alt))
    words = "Mean over splits; the band is ± 1 standard deviation."
    text = Text(words + _left_out(len(by_pair)), soft=True)
    return [Figures(drawn), text] if drawn else []


def gain_section(results: Results, differences: Sequence[Difference]) -> Section:
    """Gain of the blend against the accuracy of the head."""
    found = [d for d in differences if d.comparison[1:] == ("blend", "head")]
    spots = [
        Spot(
            head_accuracy(results, d),
            d.top1,
            _SERIES.get(d.comparison.protocol, d.comparison.protocol),
        )
        for d in found
    ]
    if len(spots) < 2:
        return Section("Gain and head accuracy", [])
    alt = "Gain of the blend over the head against the accuracy of the head: " + "; ".join(
        f"{percent(s.place)} % → {points(s.gain.mean)} points" for s in spots
    )
    figure = gains(
        "gain", "Where the blend helps", spots, alt,
        x="top-1 of the head, %", y=f"{difference_name('blend', 'head')}, points",
    )  # fmt: skip
    text = Text("One point per setting; whiskers are the 95 % intervals of the gain.", soft=True)
    return Section("Gain and head accuracy", [text, Figures([figure], wide=True)])


def heat_section(results: Results) -> Section:
    """Heat maps, k x T, of k-NN alone on validation."""
    with_maps = {
        setting: [cell.document["heat"] for cell in cells if cell.document.get("heat")]
        for setting, cells in results.settings("knn").items()
    }
    found = [(setting, maps) for setting, maps in with_maps.items() if maps]
    if not found:
        return Section("k and temperature", [])
    left_out = [
        f"{' · '.join(setting_words(setting))} ({len(maps) - len(_alike(maps))} of {len(maps)})"
        for setting, maps in found
        if len(_alike(maps)) < len(maps)
    ]
    words = "Top-1 of k-NN alone on validation, in %, mean over splits; the ring is the best cell."
    if left_out:
        shown = ", ".join(left_out)
        words += f" Splits whose grid differs from that of the first are left out: {shown}."
    text = Text(words + _left_out(len(found)), soft=True)
    return Section("k and temperature", [text, Figures([_heat(*f) for f in found[:MOST_PANELS]])])


def _alike(maps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those with the grid of the first."""
    grid = maps[0]["k"], maps[0]["temperature"]
    return [m for m in maps if (m["k"], m["temperature"]) == grid]


def _heat(setting: Setting, maps: list[dict[str, Any]]) -> Figure:
    title = " · ".join(setting_words(setting))
    ks, temperatures = maps[0]["k"], maps[0]["temperature"]
    top1 = np.mean([np.asarray(m["top1"], np.float64) for m in _alike(maps)], axis=0)
    k, t = np.unravel_index(np.nanargmax(top1), top1.shape)
    best = f"best {percent(float(top1[k, t]))} % at k {ks[k]}, T {temperatures[t]:g}"
    alt = f"Validation accuracy of k-NN over k and T, {title}: {best}"
    name = f"heat-{'-'.join(setting.pair)}-{setting.detail}"
    return heat(name, f"{title}\n{best}", ks, temperatures, top1, alt)


def _left_out(count: int) -> str:
    """A sentence about drawings beyond the most that are shown; empty if all are."""
    return f" The first {MOST_PANELS} of {count} are drawn." if count > MOST_PANELS else ""


def reliability_section(results: Results) -> Section:
    """How sure the arms are, and how often right."""
    found = list(results.settings("knn").items())
    words = (
        f"Ten bins of equal width, all splits pooled, those of fewer than {_FEWEST} items left "
        "out; a dot is as large as its bin. On the dotted line an arm is right as often as it is "
        "sure; below it, it is too sure." + _left_out(len(found))
    )
    drawn = [_reliability(*each) for each in found[:MOST_PANELS]]
    return Section("Reliability", [Text(words, soft=True), Figures(drawn)] if drawn else [])


def _reliability(setting: Setting, cells: list[Cell]) -> Figure:
    arms = {}
    for arm in (a for a in _RELIABLE if a in shared_arms(cells)):
        confidence = np.concatenate([c.arrays[f"confidence/{arm}"] for c in cells])
        correct = np.concatenate([c.correct(arm) for c in cells])
        bins = reliability_bins(confidence.astype(np.float64), correct)
        arms[arm] = bins[bins[:, 2] >= _FEWEST]
    title = " · ".join(setting_words(setting))
    alt = f"Reliability of {title}: " + "; ".join(
        f"{arm} sure by {percent(float(np.average(b[:, 0], weights=b[:, 2])))} % on average, "
        f"right in {percent(float(np.average(b[:, 1], weights=b[:, 2])))} %"
        for arm, b in arms.items()
        if len(b)
    )
    name = f"reliability-{'-'.join(setting.pair)}-{setting.detail}"
    return reliability(name, title, arms, alt)


def complementarity_blocks(results: Results) -> list[Block]:
    """How often only one of the voices is right."""
    names = {
        "both_right": "both right", "only_head": "only head", "only_knn": "only k-NN",
        "neither": "neither", "oracle": "oracle",
    }  # fmt: skip
    rows = []
    for setting, cells in results.settings("complementarity").items():
        extras = [cell.document.get("extra") or {} for cell in cells]
        row = [" · ".join(setting_words(setting)), str(len(cells))]
        for name in names:
            values = [extra[name] for extra in extras if extra.get(name) is not None]
            row.append(percent(*mean_and_std(values)) if values else DASH)
        blend = values_of(cells, "blend", "top1")
        rows.append([*row, percent(*mean_and_std(blend)) if blend else DASH])
    if not rows:
        return []
    caption = (
        "Share of test items in %, mean ± std over splits. The oracle picks the right voice "
        "wherever one is right; a blend of probabilities can be above it only by a third class."
    )
    columns = ["setting", "splits", *names.values(), "blend"]
    return [Grid(columns, rows, caption=caption)]


def peers_blocks(results: Results, differences: Sequence[Difference]) -> list[Block]:
    """Peers alone and as second voices, averaged over pairs of task and backbone."""
    settings = results.settings("peers")
    if not settings:
        return []
    arms = shared_arms([cell for cells in settings.values() for cell in cells])
    reference = reference_voice(arms)
    rows, strong = [], set()
    for voice in [a for a in arms if not a.startswith("blend")]:
        beside = {"knn": reference, "knn_grid": "blend"}.get(voice, f"{BESIDE_HEAD}{voice}")
        row = [arm_name(voice), _over_settings(settings.values(), voice)]
        row.append(_over_settings(settings.values(), beside) if beside in arms else DASH)
        row.append(_over_settings(settings.values(), f"blend:{voice}+knn"))
        against_head = _mean_difference(differences, beside, "head")
        against_knn = _mean_difference(differences, beside, reference)
        rows.append([*row, against_head, against_knn])
        if voice == "knn":
            strong |= {(len(rows) - 1, column) for column in range(len(row) + 2)}
    columns = [
        "voice",
        "alone",
        "head + it",
        "it + k-NN",
        f"head + it {MINUS} head",
        f"… {MINUS} (head + k-NN)",
    ]
    caption = (
        f"Top-1 on test in %, mean over {len(settings)} settings; differences in points, and in "
        "how many settings they are clearly above / below 0. The DINO vote has no settings; k-NN "
        "with the whole grid of k, T and λ had some hundreds of them, every other voice four."
    )
    grid = Grid(columns, rows, caption=caption, strong=frozenset(strong))
    return [grid, *_pairs_block(list(settings.values()))]


def _pairs_block(settings: Sequence[Sequence[Cell]]) -> list[Block]:
    """Every two voices as one, beside the better of both alone."""
    pairs: dict[tuple[str, str], list[float]] = defaultdict(list)
    held = [[cell for cell in cells if cell.document.get("pairs")] for cells in settings]
    held = [cells for cells in held if cells]  # older results have none
    for cells in held:
        for name in cells[0].document["pairs"]:
            first, second = name.split("+")
            both = float(np.mean([cell.document["pairs"][name] for cell in cells]))
            alone = (float(np.mean(values_of(cells, voice, "top1"))) for voice in (first, second))
            pairs[first, second].append(both - max(alone))
    if not pairs:
        return []
    voices = list(dict.fromkeys(voice for pair in pairs for voice in pair))
    gains = {frozenset(pair): float(np.mean(values)) for pair, values in pairs.items()}
    rows = [
        [arm_name(a), *(points(gains[frozenset((a, b))]) if a != b else DASH for b in voices)]
        for a in voices
    ]
    caption = (
        "Every two voices as one, the weight chosen on validation: test top-1 minus that of the "
        f"better of both alone, in points, mean over {len(held)} settings."
    )
    return [Grid(["voice", *map(arm_name, voices)], rows, caption=caption)]


def _over_settings(settings: Iterable[list[Cell]], arm: str) -> str:
    means = [float(np.mean(v)) for cells in settings if (v := values_of(cells, arm, "top1"))]
    return percent(float(np.mean(means))) if means else DASH


def _mean_difference(differences: Sequence[Difference], first: str, second: str) -> str:
    found = [
        d for d in differences if d.comparison.protocol == "peers"
        and d.comparison[1:] == (first, second)
    ]  # fmt: skip
    if not found:
        return DASH
    signs = [d.top1.sign for d in found]
    mean = float(np.mean([d.top1.mean for d in found]))
    return f"{points(mean, 2)} ({signs.count(1)} / {signs.count(-1)})"
