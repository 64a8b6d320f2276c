"""Which arms are compared with which, and by how much they differ."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from reporting.cells import Cell, Results, Setting
from reporting.statistics import (
    Floats,
    Interval,
    SignedRank,
    Split,
    holm,
    mean_of,
    paired_bootstrap,
    signed_rank,
)

FLOOR = 1e-12
BESIDE_HEAD = "blend:head+"
_VOICES = (("blend", "head"), ("knn", "head"), ("fixed", "head"), ("blend", "fixed"))
_LOSSES = (
    ("reweighted", "plain"), ("reweighted", "shuffled"), ("reweighted", "constant"),
    ("focal", "plain"), ("shuffled", "plain"), ("constant", "plain"),
)  # fmt: skip
_HEADS = (
    ("auto", "trials"), ("auto", "blend:trials+knn"), ("auto", "ridge"),
    ("auto", "blend:ridge+knn"),
    *((f"blend:{head}+knn", head) for head in ("linear", "ridge", "kernel", "lda")),
    *((head, "trials") for head in ("linear", "ridge", "kernel", "lda")),
)  # fmt: skip
_COMPARED: dict[str, tuple[tuple[str, str], ...]] = {
    "knn": (*_VOICES, ("blend", "knn"), ("dino", "head")),
    "finetune": _VOICES,
    "robustness": _VOICES,
    "linear": (*_LOSSES, ("blend", "plain")),
    "lowdata": (*_VOICES, ("ridge", "head")),
    "heads": _HEADS,
    "lowdata_heads": _HEADS,
    "lowdata_losses": _LOSSES,
}
TESTED = frozenset(
    {("knn", "blend", "head"), ("knn", "knn", "head"), ("knn", "blend", "fixed")}
    | {("linear", "reweighted", arm) for arm in ("plain", "shuffled", "constant")}
    | {("linear", "focal", "plain"), ("finetune", "blend", "head")}
    | {("lowdata", "blend", "head"), ("lowdata", "knn", "head"), ("robustness", "blend", "head")}
    | {("heads", "auto", arm) for arm in ("blend:trials+knn", "blend:ridge+knn")}
)
"""What is asked across tasks, named beforehand: each further test costs the others power."""


class Comparison(NamedTuple):
    """An arm against another of the same cells.

    Attributes:
        protocol: of the cells.
        first: what is looked at.
        second: what it is measured against.
    """

    protocol: str
    first: str
    second: str

    @property
    def family(self) -> str:
        """Tests that are corrected together: `method`, `peers` or `heads`."""
        return self.protocol if self.protocol in ("peers", "heads") else "method"

    @property
    def tested(self) -> bool:
        """Whether it is among what is tested across tasks."""
        if self.protocol == "peers":
            beside = (self.first, self.second)
            own = beside == (f"{BESIDE_HEAD}knn", "head") or beside == ("blend", "head")
            return own or (self.first.startswith(BESIDE_HEAD) and self.second != "head")
        return tuple(self) in TESTED


@dataclass(frozen=True)
class Difference:
    """How two arms differ on the cells of one setting.

    Attributes:
        setting: of the cells.
        comparison: the arms.
        top1: first minus second; above 0 is better.
        nll: likewise; below 0 is better.
        clean: `top1` without test items that have a near duplicate in training; None if no
            item has one, or all have.
        splits: number of cells.
    """

    setting: Setting
    comparison: Comparison
    top1: Interval
    nll: Interval
    clean: Interval | None
    splits: int


@dataclass(frozen=True)
class Across:
    """A comparison across tasks: one difference per pair of task and backbone.

    Attributes:
        comparison: the arms.
        by_pair: mean top-1 difference of each pair, over splits, shots and shifts.
        clear: settings whose interval excludes 0: above, below.
        settings: number of settings.
        test: of the differences.
        adjusted: p after Holm's correction within the family.
    """

    comparison: Comparison
    by_pair: dict[tuple[str, str], float]
    clear: tuple[int, int]
    settings: int
    test: SignedRank
    adjusted: float

    @property
    def mean(self) -> float:
        """Mean over pairs."""
        return float(np.mean(list(self.by_pair.values())))

    @property
    def above(self) -> int:
        """Pairs where the first arm is better."""
        return sum(value > 0 for value in self.by_pair.values())

    @property
    def below(self) -> int:
        """Pairs where the first arm is worse."""
        return sum(value < 0 for value in self.by_pair.values())


def comparisons_of(protocol: str, arms: Sequence[str]) -> list[Comparison]:
    """What is compared within the cells of a protocol, of the arms there are."""
    fixed = list(_COMPARED.get(protocol, ()))
    compared = _peers_compared(arms) if protocol == "peers" else fixed
    return [Comparison(protocol, a, b) for a, b in compared if a in arms and b in arms]


def reference_voice(arms: Sequence[str]) -> str:
    """The arm of the peers that has k-NN as the second voice."""
    named = f"{BESIDE_HEAD}knn"
    return named if named in arms else "blend"


def second_voices(arms: Sequence[str]) -> list[str]:
    """The peers that are blended with the head, k-NN left out."""
    known = reference_voice(arms)
    return [a.removeprefix(BESIDE_HEAD) for a in arms if a.startswith(BESIDE_HEAD) and a != known]


def _peers_compared(arms: Sequence[str]) -> list[tuple[str, str]]:
    reference, blends = reference_voice(arms), [BESIDE_HEAD + x for x in second_voices(arms)]
    found = [(reference, "head"), ("knn_grid", "knn"), ("blend", reference)]
    found += [(blend, other) for blend in blends for other in ("head", reference)]
    return found


def differences_of(results: Results) -> list[Difference]:
    """Every comparison of every setting."""
    found = []
    for setting, cells in results.settings().items():
        found += _of_setting(setting, cells)
    return found


def shared_arms(cells: Iterable[Cell]) -> list[str]:
    """The arms that every cell has, in the order of the first."""
    names = [list(cell.arms) for cell in cells]
    return [arm for arm in names[0] if all(arm in other for other in names)]


def _of_setting(setting: Setting, cells: list[Cell]) -> list[Difference]:
    compared = comparisons_of(setting.protocol, shared_arms(cells))
    if not compared:
        return []
    count = len(compared)
    intervals = paired_bootstrap([_split(cell, compared, clean=False) for cell in cells])
    clean: list[Interval | None] = [None] * count
    kept = [~cell.arrays["near_duplicate"].astype(bool) for cell in cells]
    if any(not mask.all() for mask in kept) and all(mask.any() for mask in kept):
        found = paired_bootstrap([_split(cell, compared, clean=True) for cell in cells])
        clean = list(found[:count])
    return [
        Difference(setting, c, intervals[i], intervals[count + i], clean[i], len(cells))
        for i, c in enumerate(compared)
    ]


def _split(cell: Cell, compared: list[Comparison], clean: bool) -> Split:
    """Differences of correctness, then of NLL, one column per comparison."""
    right = [cell.correct(c.first) * 1.0 - cell.correct(c.second) for c in compared]
    loss = [nll_of(cell, c.first) - nll_of(cell, c.second) for c in compared]
    values, clusters = np.stack([*right, *loss], axis=1), cell.clusters()
    if clean:
        kept = ~cell.arrays["near_duplicate"].astype(bool)
        return Split(values[kept], clusters[kept])
    return Split(values, clusters)


def nll_of(cell: Cell, arm: str) -> Floats:
    """[n] negative log-likelihood of the true class, its probability floored at 1e-12."""
    found: Floats = -np.log(np.maximum(cell.arrays[f"true/{arm}"].astype(np.float64), FLOOR))
    return found


def across_pairs(differences: Sequence[Difference]) -> list[Across]:
    """One signed rank test per tested comparison, Holm-corrected within each family."""
    grouped: dict[Comparison, list[Difference]] = defaultdict(list)
    for difference in differences:
        if difference.comparison.tested:
            grouped[difference.comparison].append(difference)
    tests = {c: signed_rank(list(_by_pair(found).values())) for c, found in grouped.items()}
    adjusted: dict[Comparison, float] = {}
    for family in sorted({c.family for c in grouped}):
        members = [c for c in grouped if c.family == family]
        values = holm([tests[c].p for c in members])
        adjusted |= dict(zip(members, values, strict=True))
    return [
        Across(c, _by_pair(found), _clear(found), len(found), tests[c], adjusted[c])
        for c, found in grouped.items()
    ]


def _by_pair(found: Sequence[Difference]) -> dict[tuple[str, str], float]:
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for difference in found:
        values[difference.setting.pair].append(difference.top1.mean)
    return {pair: mean_of(numbers) for pair, numbers in values.items()}


def _clear(found: Sequence[Difference]) -> tuple[int, int]:
    signs = [difference.top1.sign for difference in found]
    return signs.count(1), signs.count(-1)
