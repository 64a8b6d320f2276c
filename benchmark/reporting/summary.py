"""What a report says in words; every sentence is put together from numbers."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from reporting.cells import Results
from reporting.complement import HEADING, complement_line
from reporting.heads import auto_line, blend_line, few_line
from reporting.pairs import (
    BESIDE_HEAD,
    Across,
    Comparison,
    Difference,
    reference_voice,
    second_voices,
    shared_arms,
)
from reporting.statistics import rank_correlation
from reporting.words import arm_name, p_words, plural, points, signed

_MOST_NAMED = 6
_ALPHA = 0.05
_LEADS = {
    ("knn", "blend", "head"): "Does the blend help?",
    ("knn", "knn", "head"): "Do neighbours alone beat the head?",
    ("knn", "blend", "fixed"): "Does tuning pay?",
    ("finetune", "blend", "head"): "After fine-tuning?",
    ("lowdata", "blend", "head"): "With few pictures per class?",
    ("lowdata", "knn", "head"): "Neighbours alone, with few?",
    ("linear", "reweighted", "plain"): "Does the reweighted loss help?",
    ("linear", "reweighted", "shuffled"): "More than with shuffled factors?",
    ("linear", "reweighted", "constant"): "More than with a constant factor?",
    ("robustness", "blend", "head"): "On shifted pictures?",
}
_ASKED_WHERE = (("blend", "head"), ("reweighted", "plain"))

Name = Callable[[tuple[str, str]], str]
Line = tuple[str, str]
"""A question, and its answer in numbers."""


def summary_lines(
    results: Results, differences: Sequence[Difference], across: Sequence[Across]
) -> list[Line]:
    """The report in a few sentences.

    Args:
        results: of a run.
        differences: of its arms.
        across: tests over its pairs of task and backbone.
    """
    by_comparison = {row.comparison: row for row in across}

    def name(pair: tuple[str, str]) -> str:
        return " with ".join(pair)

    lines = []
    for key, lead in _LEADS.items():
        row = by_comparison.get(Comparison(*key))
        if row is not None:
            rest = f" {where_not(row, name)}" if key[1:] in _ASKED_WHERE else ""
            lines.append((lead, (across_line(row) + rest).rstrip()))
    said = {
        "Does auto choose well?": auto_line(results),
        "… with few pictures per class?": few_line(results),
        "Is a blend ever worse than the better of its voices?": blend_line(results),
        "How does the gain go with the number of pictures?": shots_line(differences),
        "… and with the accuracy of the head?": accuracy_line(results, differences),
        "Is it k-NN, or any second voice?": peers_line(results, differences),
        "Is it near duplicates?": duplicates_line(results, differences),
        "Could a better blend do more?": oracle_line(results),
        HEADING: complement_line(results),
    }
    return lines + [(lead, text) for lead, text in said.items() if text]


def across_line(row: Across) -> str:
    """How often and by how much an arm is above another."""
    pairs, comparison = len(row.by_pair), row.comparison
    first, second = arm_name(comparison.first), arm_name(comparison.second)
    ties = pairs - row.above - row.below
    equal = f" (equal in {ties})" if ties else ""
    line = (
        f"{first} is above {second} in {row.above} of {pairs} task-backbone "
        f"{plural(pairs, 'pair')}{equal}, mean {points(row.mean, 2)} points; "
        f"{_clear_words(row)}"
    )
    line = line[0].upper() + line[1:] if not line.startswith("k-NN") else line
    if row.test.can_conclude:
        return f"{line}. Wilcoxon {p_words(row.test.p)}, Holm-adjusted {p_words(row.adjusted)}."
    return f"{line}. Too few pairs differ ({row.test.pairs}) for a signed rank test."


def _clear_words(row: Across) -> str:
    up, down = row.clear
    settings = f"{row.settings} {plural(row.settings, 'setting')}"
    if not up and not down:
        return f"the interval excludes 0 in none of {settings}"
    return f"the interval excludes 0 in {up} of {settings} above and in {down} below"


def where_not(row: Across, name: Name) -> str:
    """The pairs where an arm does not help, worst first; empty if there are none."""
    worse = sorted((value, pair) for pair, value in row.by_pair.items() if value <= 0)
    if not worse:
        return ""
    shown = [f"{name(pair)} ({points(value, 2)})" for value, pair in worse[:_MOST_NAMED]]
    more = f", and {len(worse) - _MOST_NAMED} more" if len(worse) > _MOST_NAMED else ""
    return f"Where it does not help: {', '.join(shown)}{more}."


def shots_line(differences: Sequence[Difference]) -> str:
    """How the gain of the blend changes with the number of pictures per class."""
    gains: dict[int, list[float]] = defaultdict(list)
    for difference in _chosen(differences, "lowdata", "blend", "head"):
        if difference.setting.shots is not None:
            gains[difference.setting.shots].append(difference.top1.mean)
    if len(gains) < 2:
        return ""
    shown = [f"{points(float(np.mean(gains[shots])), 2)} at {shots}" for shots in sorted(gains)]
    return f"Mean points of the blend over the head, by pictures per class: {', '.join(shown)}."


def accuracy_line(results: Results, differences: Sequence[Difference]) -> str:
    """How the gain of the blend goes with the accuracy of the head."""
    found = [d for d in differences if d.comparison[1:] == ("blend", "head")]
    accuracy = [head_accuracy(results, d) for d in found]
    rho, p = rank_correlation(accuracy, [d.top1.mean for d in found])
    if rho != rho:
        return ""
    tendency = "falls" if rho < 0 else "rises"
    said = f"{tendency} as the head gets better" if p < _ALPHA else "shows no clear trend"
    return (
        f"The gain of the blend {said}: Spearman's rank correlation {signed(rho, 2)} over "
        f"{len(found)} settings ({p_words(p)}, taking settings of one task as independent)."
    )


def head_accuracy(results: Results, difference: Difference) -> float:
    """Mean test top-1 of the head in the cells of a difference."""
    cells = results.settings()[difference.setting]
    return float(np.mean([cell.arms["head"]["test"]["top1"] for cell in cells]))


def peers_line(results: Results, differences: Sequence[Difference]) -> str:
    """Whether it is k-NN that helps beside the head, or any second voice."""
    cells = [cell for cell in results.cells if cell.setting.protocol == "peers"]
    if not cells:
        return ""
    arms = shared_arms(cells)
    reference = reference_voice(arms)
    blends = {"knn": reference} | {x: BESIDE_HEAD + x for x in second_voices(arms)}
    found = {v: _chosen(differences, "peers", arm, "head") for v, arm in blends.items()}
    gains = {v: float(np.mean([d.top1.mean for d in ds])) for v, ds in found.items() if ds}
    if "knn" not in gains or len(gains) < 2:
        return ""
    order = sorted(gains, key=lambda voice: -gains[voice])
    shown = ", ".join(f"{arm_name(v)} {points(gains[v], 2)}" for v in order)
    against = [d for v in gains for d in _chosen(differences, "peers", blends[v], reference)]
    more = sum(d.top1.mean > 0 for d in against)
    clearly = sum(d.top1.sign > 0 for d in against)
    return (
        f"Mean points that a second voice adds to the head: {shown}. k-NN is number "
        f"{order.index('knn') + 1} of {len(order)}; another voice adds more in {more} of "
        f"{len(against)} comparisons with it, clearly more in {clearly}."
    )


def duplicates_line(results: Results, differences: Sequence[Difference]) -> str:
    """What becomes of the gain without near duplicates."""
    gains = [d for d in _chosen(differences, "knn", "blend", "head") if d.clean is not None]
    if not gains:
        return ""
    cells = [c for c in results.cells if c.setting.protocol == "knn"]
    near = sum(int(c.arrays["near_duplicate"].sum()) for c in cells)
    total = sum(len(c.arrays["ids"]) for c in cells)
    before = float(np.mean([d.top1.mean for d in gains]))
    after = float(np.mean([d.clean.mean for d in gains if d.clean is not None]))
    return (
        f"{near / total:.1%} of test items have a near duplicate in training. Without them the "
        f"mean gain of the blend over the head is {points(after, 2)} points, with them "
        f"{points(before, 2)}, over {len(gains)} {plural(len(gains), 'setting')} with any."
    )


def oracle_line(results: Results) -> str:
    """How much of what the neighbours know beyond the head the blend makes use of."""
    cells = [c for c in results.cells if c.setting.protocol == "complementarity"]
    cells = [c for c in cells if c.document.get("extra") and {"head", "blend"} <= c.arms.keys()]
    if not cells:
        return ""
    only = float(np.mean([c.document["extra"]["only_knn"] for c in cells]))
    gain = float(np.mean([c.correct("blend").mean() - c.correct("head").mean() for c in cells]))
    return (
        f"Neighbours alone are right, and the head wrong, on {only:.1%} of test items: that is "
        f"what a perfect choice between the two would add. The blend adds {points(gain, 2)} points."
    )


def _chosen(differences: Sequence[Difference], *key: str) -> list[Difference]:
    return [d for d in differences if d.comparison == Comparison(*key)]
