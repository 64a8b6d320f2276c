"""When a head and the neighbours complement each other: the terms of a blend's gain beside it.

What the terms are is said in `study.terms`; here they are averaged over the splits of a setting.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from reporting.cells import Cell, Results, Setting
from reporting.document import Block, Figures, Grid, Section, Text
from reporting.figures import Spot, gains
from reporting.statistics import Interval, permuted_correlation
from reporting.tables import setting_words
from reporting.words import DASH, MINUS, arm_name, p_value, p_words, points, signed

HEADING = "When do neighbours complement a head?"
DISAGREEMENT = f"E|p_knn {MINUS} p_head|²"
AMBIGUITY = f"λ(1{MINUS}λ)·{DISAGREEMENT}"
PREDICTORS: dict[str, Callable[["Complement"], float]] = {
    f"ambiguity, {AMBIGUITY}": lambda c: c.ambiguity,
    "ambiguity less price": lambda c: c.ambiguity - c.price,
    f"disagreement alone, {DISAGREEMENT}": lambda c: c.disagreement,
    "log-likelihood gain": lambda c: c.log_gain,
    "top-1 of the head": lambda c: c.head,
    "top-1 of k-NN minus that of the head": lambda c: c.knn - c.head,
}
"""What may tell how much accuracy a blend gains."""

_AMBIGUITY, _NET, _, _, _HEAD, _LEAD = PREDICTORS
_SAID = {
    _AMBIGUITY: "the ambiguity", _NET: "the ambiguity less its price",
    _HEAD: "the accuracy of the head", _LEAD: "the accuracy of k-NN minus that of the head",
}  # fmt: skip
_BLENDS = {"complementarity": "blend", "lowdata": "blend"}
"""The blend with the linear head, of protocols that have no other head."""

_HEADS = ("heads", "lowdata_heads")
_OTHERS = ("ridge", "kernel", "lda")
"""The heads that are taken from these."""

_ALL = "all pictures"
_FEWEST = 5  # settings for a correlation
_SCALE = "Squared errors are of probability vectors, times 100."
_ABOUT = (
    f"A blend is p = (1{MINUS}λ)·p_head + λ·p_knn. By the ambiguity decomposition its squared "
    f"error is below the weighted mean of its voices' by exactly {AMBIGUITY}, the ambiguity. "
    "Against the head alone a price is to be paid for it: λ·(squared error of k-NN "
    f"{MINUS} that of the head). The log-likelihood gain over the head is "
    f"E log((1{MINUS}λ) + λ·p_knn(y)/p_head(y)). Each term stands beside what the blend's answers "
    "on the test pictures say. " + _SCALE
)


class Complement(NamedTuple):
    """A blend of a setting: means over its splits.

    Attributes:
        setting: of the cells.
        voice: the head in it.
        weight: λ.
        gain: top-1 of the blend minus that of the head.
        head: top-1 of the head.
        knn: top-1 of the neighbours at the blend's k and temperature.
        ambiguity: λ (1 - λ) times the disagreement.
        disagreement: E|p_knn - p_head|².
        measured: how far the blend's squared error is below the weighted mean of both voices'.
        price: λ times what the squared error of the neighbours is above that of the head.
        log_gain: of the log-likelihood over the head, by the formula.
        log_measured: likewise, of the blend's answers.
    """

    setting: Setting
    voice: str
    weight: float
    gain: float
    head: float
    knn: float
    ambiguity: float
    disagreement: float
    measured: float
    price: float
    log_gain: float
    log_measured: float


def complements_of(results: Results) -> list[Complement]:
    """Every head beside the neighbours, each once, of the settings that hold the terms."""
    found: dict[tuple[str, str, int | None, str], Complement] = {}
    for setting, cells in results.settings().items():
        for arm in cells[0].arms:
            voice = _voice_of(setting.protocol, arm)
            held = [cell for cell in cells if (cell.arms.get(arm) or {}).get("terms")]
            if voice and len(held) == len(cells):
                key = (*setting.pair, setting.shots, voice)
                found.setdefault(key, _mean(setting, voice, arm, cells))
    return list(found.values())


def _voice_of(protocol: str, arm: str) -> str:
    """The head of a blend with the neighbours; empty for any other arm."""
    if arm == _BLENDS.get(protocol):
        return "linear"
    named = {f"blend:{head}+knn": head for head in _OTHERS}
    return named.get(arm, "") if protocol in _HEADS else ""


def _mean(setting: Setting, voice: str, arm: str, cells: Sequence[Cell]) -> Complement:
    rows = []
    for cell in cells:
        t = cell.arms[arm]["terms"]
        mean_error = (1 - t["weight"]) * t["error_first"] + t["weight"] * t["error_second"]
        rows.append(
            [
                t["weight"], cell.arms[arm]["test"]["top1"] - t["top1_first"], t["top1_first"],
                t["top1_second"], t["ambiguity"], t["disagreement"], mean_error - t["error"],
                t["weight"] * (t["error_second"] - t["error_first"]),
                t["log_gain"], t["log_gain_measured"],
            ]
        )  # fmt: skip
    return Complement(setting, voice, *map(float, np.mean(rows, axis=0)))


def complement_section(results: Results) -> Section:
    """Tables of the terms, what goes with the gain, and a drawing; empty without terms."""
    found = complements_of(results)
    if not found:
        return Section(HEADING, [])
    blocks: list[Block] = [Text(_ABOUT), _groups_grid(found)]
    if len(found) >= _FEWEST:
        blocks += [_predictors_grid(found), _figure(found)]
    return Section(HEADING, [*blocks, _settings_grid(found)])


def complement_line(results: Results) -> str:
    """The open question of the paper, answered with numbers; empty with too few settings."""
    found = complements_of(results)
    if len(found) < _FEWEST:
        return ""
    said = []
    for name, words in _SAID.items():
        rho, p = permuted_correlation(*_against(found, name))
        if rho == rho:
            said.append(f"{words} {signed(rho, 2)} ({p_words(p)})")
    if not said:
        return ""
    silent = sum(c.weight == 0 for c in found)
    return (
        f"Over {len(found)} settings (task, backbone, head, pictures per class) the gain in "
        f"accuracy over the head has these rank correlations: with {', with '.join(said)}; p by "
        f"permutation of settings, as if they were independent. λ is 0 in {silent} of them."
    )


def _against(found: Sequence[Complement], name: str) -> tuple[list[float], list[float]]:
    """A predictor, and the gain in accuracy."""
    return [PREDICTORS[name](c) for c in found], [c.gain for c in found]


def _shots_words(shots: int | None) -> str:
    return _ALL if shots is None else f"{shots} per class"


def _groups_grid(found: Sequence[Complement]) -> Grid:
    """Means over settings, by pictures per class and by head."""
    groups: dict[str, list[Complement]] = defaultdict(list)
    for c in sorted(found, key=lambda c: c.setting.shots or np.inf):
        groups[_shots_words(c.setting.shots)].append(c)
    for c in found:
        groups[f"head: {arm_name(c.voice)}"].append(c)
    rows = [[name, str(len(some)), *_terms_words(some)] for name, some in groups.items()]
    return Grid(["settings", "number", *_TERMS], rows, caption="Means over settings.")


_TERMS = (
    "λ", "ambiguity", "… measured", "price", "log-likelihood gain", "… measured",
    "top-1 gain, points",
)  # fmt: skip


def _terms_words(some: Sequence[Complement]) -> list[str]:
    def mean(value: Callable[[Complement], float]) -> float:
        return float(np.mean([value(c) for c in some]))

    squared = [mean(lambda c: c.ambiguity), mean(lambda c: c.measured), mean(lambda c: c.price)]
    logs = [mean(lambda c: c.log_gain), mean(lambda c: c.log_measured)]
    return [
        f"{mean(lambda c: c.weight):.2f}",
        *(points(value, 2) for value in squared),
        *(signed(value, 3) for value in logs),
        points(mean(lambda c: c.gain), 2),
    ]


def _predictors_grid(found: Sequence[Complement]) -> Grid:
    rows = []
    for name in PREDICTORS:
        rho, p = permuted_correlation(*_against(found, name))
        rows.append(
            [name, signed(rho, 2) if rho == rho else DASH, p_value(p), _within(found, name)]
        )
    caption = (
        f"Spearman's rank correlation with the gain in top-1, over {len(found)} settings; p by "
        "10,000 permutations of the settings, which share pictures and backbones, so that it is "
        "rather too small. Within tasks: the mean of each task's own correlation."
    )
    return Grid(["with", "correlation", "p", "within tasks"], rows, caption=caption)


def _within(found: Sequence[Complement], name: str) -> str:
    by_task: dict[str, list[Complement]] = defaultdict(list)
    for c in found:
        by_task[c.setting.task].append(c)
    each = [permuted_correlation(*_against(some, name), draws=0)[0] for some in by_task.values()]
    each = [rho for rho in each if rho == rho]
    return signed(float(np.mean(each)), 2) if each else DASH


def _figure(found: Sequence[Complement]) -> Figures:
    spots = [
        Spot(c.ambiguity, Interval(c.gain, c.gain, c.gain), f"{arm_name(c.voice)} + k-NN")
        for c in found
    ]
    alt = "Gain of a blend in top-1 against its ambiguity: " + "; ".join(
        f"{group} {len(some)} settings, mean {points(float(np.mean(some)), 2)}"
        for group, some in _by_series(spots).items()
    )
    figure = gains(
        "complement", "Gain of a blend against its ambiguity", spots, alt,
        x=f"ambiguity, {AMBIGUITY} times 100", y=f"top-1 of blend {MINUS} head, points",
    )  # fmt: skip
    return Figures([figure], wide=True)


def _by_series(spots: Sequence[Spot]) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for spot in spots:
        groups[spot.series].append(spot.gain.mean)
    return groups


def _settings_grid(found: Sequence[Complement]) -> Grid:
    rows = [
        [" · ".join(setting_words(c.setting)), arm_name(c.voice), *_terms_words([c])] for c in found
    ]
    return Grid(
        ["setting", "head", *_TERMS], rows, words=2, folded="Every setting, one by one",
        caption="Means over splits. " + _SCALE,
    )  # fmt: skip
