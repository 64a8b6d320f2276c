"""What a report says in words; every sentence is put together from numbers."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from report_cells import Results
from report_pairs import (
    BESIDE_HEAD,
    Across,
    Comparison,
    Difference,
    reference_voice,
    second_voices,
    shared_arms,
)
from report_statistics import rank_correlation
from report_words import arm_name, p_value, plural, points, signed

_MOST_NAMED = 6
_SAID = (
    ("knn", "blend", "head"), ("knn", "knn", "head"), ("knn", "blend", "fixed"),
    ("finetune", "blend", "head"), ("lowdata", "blend", "head"), ("lowdata", "knn", "head"),
    ("linear", "reweighted", "plain"), ("linear", "reweighted", "shuffled"),
    ("linear", "reweighted", "constant"), ("robustness", "blend", "head"),
)  # fmt: skip

Name = Callable[[tuple[str, str]], str]


def summary_lines(
    results: Results, differences: Sequence[Difference], across: Sequence[Across]
) -> list[str]:
    """The report in a few sentences.

    Args:
        results: of a run.
        differences: of its arms.
        across: tests over its pairs of task and backbone.
    """
    by_comparison = {row.comparison: row for row in across}

    def name(pair: tuple[str, str]) -> str:
        return f"{results.title('task', pair[0])} with {results.title('backbone', pair[1])}"

    lines = []
    for key in _SAID:
        row = by_comparison.get(Comparison(*key))
        if row is not None:
            lines.append(across_line(row))
            if key[1:] in (("blend", "head"), ("reweighted", "plain")):
                lines += where_not(row, name)
    lines += shots_lines(differences) + accuracy_lines(results, differences)
    return lines + peers_lines(results, across) + duplicates_lines(results, differences)


def across_line(row: Across) -> str:
    """How often and by how much an arm is above another."""
    pairs, comparison = len(row.by_pair), row.comparison
    first, second = arm_name(comparison.first), arm_name(comparison.second)
    ties = pairs - row.above - row.below
    line = (
        f"{_WHERE.get(comparison.protocol, comparison.protocol)}: {first} is above {second} in "
        f"{row.above} of {pairs} task-backbone {plural(pairs, 'pair')}"
        + (f" (equal in {ties})" if ties else "")
        + f", clearly above in {row.clear[0]} and clearly below in {row.clear[1]}; "
        f"mean {points(row.mean, 2)} points"
    )
    if not row.test.can_conclude:
        counted = row.test.pairs
        verb = "differs is" if counted == 1 else "differ are"
        return (
            f"{line}. {counted} {plural(counted, 'pair')} that {verb} too "
            "few for a signed rank test to conclude anything."
        )
    return f"{line}, Wilcoxon p {_p(row.test.p)}, after Holm p {_p(row.adjusted)}."


_WHERE = {
    "knn": "All training pictures",
    "lowdata": "Few pictures per class",
    "linear": "Loss of the linear head",
    "finetune": "Fine-tuned",
    "robustness": "Shifted test pictures",
    "peers": "Second voices",
}


def where_not(row: Across, name: Name) -> list[str]:
    """The pairs where an arm does not help, worst first."""
    worse = sorted((value, pair) for pair, value in row.by_pair.items() if value <= 0)
    if not worse:
        return []
    shown = [f"{name(pair)} ({points(value, 2)})" for value, pair in worse[:_MOST_NAMED]]
    more = f", and {len(worse) - _MOST_NAMED} more" if len(worse) > _MOST_NAMED else ""
    return [f"Where {arm_name(row.comparison.first)} does not help: {', '.join(shown)}{more}."]


def shots_lines(differences: Sequence[Difference]) -> list[str]:
    """How the gain of the blend changes with the number of pictures per class."""
    gains: dict[int, list[float]] = defaultdict(list)
    for difference in _chosen(differences, "lowdata", "blend", "head"):
        if difference.setting.shots is not None:
            gains[difference.setting.shots].append(difference.top1.mean)
    if len(gains) < 2:
        return []
    shown = [f"{points(float(np.mean(gains[shots])), 2)} at {shots}" for shots in sorted(gains)]
    return [f"Mean gain of the blend over the head by pictures per class: {', '.join(shown)}."]


def accuracy_lines(results: Results, differences: Sequence[Difference]) -> list[str]:
    """How the gain of the blend goes with the accuracy of the head."""
    found = [d for d in differences if d.comparison[1:] == ("blend", "head")]
    accuracy = [head_accuracy(results, d) for d in found]
    rho, p = rank_correlation(accuracy, [d.top1.mean for d in found])
    if rho != rho:
        return []
    tendency = "falls" if rho < 0 else "rises"
    said = f"tends to be such that it {tendency}" if p < 0.05 else "shows no clear trend"
    return [
        f"The gain of the blend {said} as the head gets better: Spearman's rank correlation "
        f"{signed(rho, 2)} over {len(found)} settings (p {_p(p)}, settings of one task taken as "
        "independent)."
    ]


def head_accuracy(results: Results, difference: Difference) -> float:
    """Mean test top-1 of the head in the cells of a difference."""
    cells = results.settings()[difference.setting]
    return float(np.mean([cell.arms["head"]["test"]["top1"] for cell in cells]))


def peers_lines(results: Results, across: Sequence[Across]) -> list[str]:
    """Whether it is k-NN that helps beside the head, or any second voice."""
    cells = [cell for cell in results.cells if cell.setting.protocol == "peers"]
    if not cells:
        return []
    arms = shared_arms(cells)
    reference = reference_voice(arms)
    rows = {row.comparison: row for row in across}
    gains = {}
    for voice, arm in [("knn", reference), *((x, BESIDE_HEAD + x) for x in second_voices(arms))]:
        row = rows.get(Comparison("peers", arm, "head"))
        if row is not None:
            gains[voice] = row.mean
    if "knn" not in gains or len(gains) < 2:
        return []
    order = sorted(gains, key=lambda voice: -gains[voice])
    shown = ", ".join(f"{arm_name(v)} {points(gains[v], 2)}" for v in order)
    against = [rows.get(Comparison("peers", BESIDE_HEAD + v, reference)) for v in gains]
    better = sum(row.above for row in against if row)
    total = sum(len(row.by_pair) for row in against if row)
    return [
        f"Beside the head, by mean gain in points: {shown}. k-NN is number "
        f"{order.index('knn') + 1} of {len(order)} second voices; another one gives more in "
        f"{better} of {total} comparisons with it."
    ]


def duplicates_lines(results: Results, differences: Sequence[Difference]) -> list[str]:
    """What becomes of the gain without near duplicates."""
    gains = [d for d in _chosen(differences, "knn", "blend", "head") if d.clean is not None]
    cells = [c for c in results.cells if c.setting.protocol == "knn"]
    near = sum(int(c.arrays["near_duplicate"].sum()) for c in cells)
    total = sum(len(c.arrays["ids"]) for c in cells)
    if not gains:
        return []
    before = float(np.mean([d.top1.mean for d in gains]))
    after = float(np.mean([d.clean.mean for d in gains if d.clean is not None]))
    return [
        f"Without the {near / total:.1%} of test items that have a near duplicate in training, the "
        f"mean gain of the blend over the head is {points(after, 2)} points instead of "
        f"{points(before, 2)}, in the {len(gains)} {plural(len(gains), 'setting')} that have any."
    ]


def _chosen(differences: Sequence[Difference], *key: str) -> list[Difference]:
    return [d for d in differences if d.comparison == Comparison(*key)]


def _p(p: float) -> str:
    shown = p_value(p)
    return shown if shown.startswith("<") else f"= {shown}"
