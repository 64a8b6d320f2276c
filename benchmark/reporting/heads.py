"""Which head: every head beside the others, and how well `auto` chooses among them."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from reporting.cells import Cell, Results
from reporting.document import Block, Grid, Text
from reporting.tables import values_of
from reporting.words import MINUS, arm_name, percent, plural, points

HEADS = ("linear", "ridge", "kernel", "lda")
AUTO, KNN, ALWAYS = "auto", "knn", "blend:ridge+knn"
TRIALS, TODAY = "trials", "blend:trials+knn"
"""The linear head of the other protocols and its blend, which was the default up to version 0.2."""

FEW_BEST = (TRIALS, "linear", "ridge", KNN, TODAY, "blend:linear+knn")
"""What auto must keep up with where pictures are few."""

EARLIER = ("efficientnet-lite0", "efficientnet-lite0-random", "tiny-vit")
"""The backbones of the reports up to version 0.2, so that means can be compared with them."""

ALL_SHOTS = "all pictures"
_ORACLE = "best arm of each setting, chosen on test"
_LEAST = 0.005
"""How far a blend may be below the better of its voices, on average."""

Settings = Sequence[list[Cell]]
"""The cells of each setting."""


def head_blocks(results: Results, protocol: str) -> list[Block]:
    """Means over settings, what auto chose, and what a blend costs; empty without cells."""
    settings = list(results.settings(protocol).values())
    if not settings:
        return []
    groups = _by_backbone(settings) if protocol == "heads" else _by_shots(settings)
    found: list[Block] = [_means_grid(groups), _choice_grid(groups)]
    words = auto_words(settings) if protocol == "heads" else few_words(settings)
    return [*found, Text(words), _blend_grid(groups)]


def auto_line(results: Results) -> str:
    """How well auto chooses among heads; empty without its cells."""
    settings = list(results.settings("heads").values())
    return auto_words(settings) if settings else ""


def few_line(results: Results) -> str:
    """How well auto chooses where pictures are few; empty without its cells."""
    settings = list(results.settings("lowdata_heads").values())
    return few_words(settings) if settings else ""


def blend_line(results: Results) -> str:
    """Whether a blend is ever worse than the better of its voices; empty without its cells."""
    gaps: dict[tuple[str, str], float] = {}
    for protocol in ("heads", "lowdata_heads"):
        groups = _by_shots(list(results.settings(protocol).values()))
        for shots, settings in groups.items():
            gaps |= {(shots, head): _mean(settings, _blend_gap(head)) for head in HEADS}
    if not gaps:
        return ""
    (shots, head), least = min(gaps.items(), key=lambda item: item[1])
    below = sum(gap < -_LEAST for gap in gaps.values())
    return (
        f"A blend minus the better of its two voices, on average over settings: at least "
        f"{points(least, 2)} points ({arm_name(head)}, {_shots_words(shots)}); below "
        f"{points(-_LEAST)} for {below} of {len(gaps)} pairs of a head and a number of pictures."
    )


def auto_words(settings: Settings) -> str:
    """Auto against the other ways to take a head, in a sentence or two."""
    parts = [_reach(settings, "")]
    earlier = [cells for cells in settings if cells[0].setting.backbone in EARLIER]
    if earlier and len(earlier) < len(settings):
        parts.append(_reach(earlier, " of the three backbones of earlier reports"))
    return " ".join([*parts, _choices_words(settings)])


def _reach(settings: Settings, which: str) -> str:
    auto, always = (_mean(settings, _top1(arm)) for arm in (AUTO, ALWAYS))
    linear, today = (_mean(settings, _top1(arm)) for arm in (TRIALS, TODAY))
    best = _mean(settings, _best(_others(settings)))
    return (
        f"Auto reaches {percent(auto)} % on average over {len(settings)} "
        f"{plural(len(settings), 'setting')}{which}: "
        f"{points(auto - always, 2)} points against always ridge with k-NN ({percent(always)} %), "
        f"{points(auto - best, 2)} against the best arm of each setting chosen on test "
        f"({percent(best)} %), {points(auto - linear, 2)} against always the linear "
        f"head of six trials, {points(auto - today, 2)} against that with k-NN."
    )


def few_words(settings: Settings) -> str:
    """Auto against the best of four simpler ways, by pictures per class."""
    said = []
    for shots, some in _by_shots(settings).items():
        auto = _mean(some, _top1(AUTO))
        average = max(_mean(some, _top1(arm)) for arm in FEW_BEST)
        each = _mean(some, _best(FEW_BEST))
        said.append(f"{points(auto - average, 2)} / {points(auto - each, 2)} at {shots}")
    named = ", ".join(map(arm_name, FEW_BEST))
    return (
        f"Auto minus the best of {named}, by pictures per class, mean points over settings (the "
        "best on average / the best of each setting, chosen on test): "
        f"{', '.join(said)}. {_choices_words(settings)}"
    )


def _choices_words(settings: Settings) -> str:
    chosen = choices_of(settings)
    splits = sum(chosen.values())
    shown = ", ".join(f"{arm_name(head)} {chosen[head]}" for head in HEADS if chosen[head])
    beside = sum(_weight(cell) > 0 for cells in settings for cell in cells)
    return f"Of {splits} splits it chose {shown}; in {beside} with neighbours (λ > 0)."


def choices_of(settings: Iterable[Sequence[Cell]]) -> Counter[str]:
    """How often auto chose each head."""
    return Counter(str(cell.arms[AUTO]["chosen"]["head"]) for cells in settings for cell in cells)


def _weight(cell: Cell) -> float:
    return float(cell.arms[AUTO]["chosen"]["knn_weight"])


# ---- means over settings ------------------------------------------------------------------------


def _top1(arm: str) -> Callable[[Sequence[Cell]], float]:
    return lambda cells: float(np.mean(values_of(cells, arm, "top1")))


def _best(arms: Sequence[str]) -> Callable[[Sequence[Cell]], float]:
    """The best arm of a setting, chosen on test."""
    return lambda cells: max(_top1(arm)(cells) for arm in arms)


def _blend_gap(head: str) -> Callable[[Sequence[Cell]], float]:
    """A blend minus the better of its voices."""
    return lambda cells: _top1(f"blend:{head}+{KNN}")(cells) - _best((head, KNN))(cells)


def _mean(settings: Settings, value: Callable[[Sequence[Cell]], float]) -> float:
    return float(np.mean([value(cells) for cells in settings]))


def _others(settings: Settings) -> list[str]:
    return [arm for arm in settings[0][0].arms if arm != AUTO]


def _by_shots(settings: Settings) -> dict[str, Settings]:
    found: dict[str, list[list[Cell]]] = defaultdict(list)
    for cells in sorted(settings, key=lambda cells: cells[0].setting.shots or 0):
        shots = cells[0].setting.shots
        found[ALL_SHOTS if shots is None else str(shots)].append(cells)
    return dict(found)


def _shots_words(shots: str) -> str:
    return shots if shots == ALL_SHOTS else f"{shots} per class"


def _by_backbone(settings: Settings) -> dict[str, Settings]:
    """By backbone; all of them, and those of earlier reports, where there are others too."""
    found: dict[str, list[list[Cell]]] = defaultdict(list)
    for cells in settings:
        found[cells[0].setting.backbone].append(cells)
    if len(found) == 1:
        return dict(found)
    earlier = [cells for name in EARLIER for cells in found.get(name, [])]
    more = {"earlier three": earlier} if 0 < len(earlier) < len(settings) else {}
    return {**found, **more, "all": list(settings)}


# ---- tables -------------------------------------------------------------------------------------


def _means_grid(groups: Mapping[str, Settings]) -> Grid:
    first = next(iter(groups.values()))
    arms = list(first[0][0].arms)
    values = {arm: [_mean(some, _top1(arm)) for some in groups.values()] for arm in arms}
    best = [max(values[arm][n] for arm in arms) for n in range(len(groups))]
    strong = {
        (row, column + 1)
        for row, arm in enumerate(arms)
        for column, value in enumerate(values[arm])
        if value >= best[column] - 1e-12
    }
    rows = [[arm_name(arm), *map(percent, values[arm])] for arm in arms]
    oracle = [_mean(some, _best(_others(some))) for some in groups.values()]
    rows.append([_ORACLE, *map(percent, oracle)])
    always = zip(values[AUTO], values[ALWAYS], strict=True)
    rows.append([f"auto {MINUS} ({arm_name(ALWAYS)})", *(points(a - b, 2) for a, b in always)])
    gaps = zip(values[AUTO], oracle, strict=True)
    rows.append([f"auto {MINUS} best arm", *(points(a - b, 2) for a, b in gaps)])
    counts = ", ".join(f"{name}: {len(some)}" for name, some in groups.items())
    caption = f"Top-1 on test in %, mean over settings ({counts}); the best arm is bold."
    return Grid(["arm", *groups], rows, caption=caption, strong=frozenset(strong))


def _choice_grid(groups: Mapping[str, Settings]) -> Grid:
    counts = [choices_of(some) for some in groups.values()]
    rows = [[arm_name(head), *(str(found[head]) for found in counts)] for head in HEADS]
    beside = [[_weight(cell) for cells in some for cell in cells] for some in groups.values()]
    shares = [f"{sum(w > 0 for w in found)} of {len(found)}" for found in beside]
    rows.append(["… with neighbours, λ > 0", *shares])
    rows.append(["mean λ", *(f"{np.mean(found):.2f}" for found in beside)])
    return Grid(["auto chose", *groups], rows, caption="How often, over settings and splits.")


def _blend_grid(groups: Mapping[str, Settings]) -> Grid:
    rows, bad = [], set()
    for number, head in enumerate(HEADS):
        gaps = [_mean(some, _blend_gap(head)) for some in groups.values()]
        rows.append([f"{arm_name(head)} + {arm_name(KNN)}", *(points(gap, 2) for gap in gaps)])
        bad |= {(number, column + 1) for column, gap in enumerate(gaps) if gap < -_LEAST}
    return Grid(
        ["blend", *groups], rows, bad=frozenset(bad),
        caption="Top-1 of a blend minus that of the better of its two voices, in points, mean "
        f"over settings; coloured where it is below {points(-_LEAST)}.",
    )  # fmt: skip
