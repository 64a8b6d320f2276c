"""Compares two folders of results, cell by cell, on the same test items."""

from dataclasses import dataclass

import numpy as np

from reporting.build import facts_of
from reporting.cells import Cell, Results, Setting
from reporting.document import Block, Bullets, Grid, Report, Section, Text
from reporting.pairs import nll_of, shared_arms
from reporting.statistics import METHOD, Interval, Split, paired_bootstrap
from reporting.tables import setting_words, with_interval
from reporting.words import arm_name, plural, points, signed

_OTHER_ITEMS = "other test items"


@dataclass(frozen=True)
class Change:
    """An arm of a setting, now against then.

    Attributes:
        setting: that both folders have.
        arm: likewise.
        seeds: of the splits that both have.
        top1: now minus then; above 0 is better.
        nll: likewise; below 0 is better.
    """

    setting: Setting
    arm: str
    seeds: int
    top1: Interval
    nll: Interval


def compare(new: Results, old: Results) -> tuple[list[Change], list[str]]:
    """How each arm of each setting changed.

    Args:
        new: what is looked at.
        old: what it is measured against.

    Returns:
        The changes, and what could not be compared, one line each.

    Raises:
        ValueError: for tasks whose revisions differ.
    """
    refuse_mixed_tasks(new, old)
    before = old.settings()
    changes, left_out = [], []
    for setting, cells in new.settings().items():
        words = " · ".join([setting.protocol, *setting_words(setting)])
        pairs = _pairs(cells, before.pop(setting, []))
        alike = [pair for pair in pairs if _same_items(*pair)]
        if len(alike) < len(pairs):
            left_out.append(f"{words}: {len(pairs) - len(alike)} splits with {_OTHER_ITEMS}")
        if not pairs:
            left_out.append(f"{words}: not in the baseline")
        if alike:
            changes += _changes(setting, alike)
    left_out += [
        f"{' · '.join([setting.protocol, *setting_words(setting)])}: in the baseline only"
        for setting in before
    ]
    return changes, left_out


def refuse_mixed_tasks(new: Results, old: Results) -> None:
    """Refuses folders whose tasks are of different revisions; models may differ, that is the point.

    Raises:
        ValueError: naming the task and both revisions.
    """
    revisions = {cell.setting.task: cell.document["task"].get("revision") for cell in old.cells}
    for cell in new.cells:
        task, found = cell.setting.task, cell.document["task"].get("revision")
        if str(revisions.get(task, found)) != str(found):
            raise ValueError(
                f"Expected task {task} of one revision in both folders, but got {found!r} in "
                f"{new.folder} and {revisions[task]!r} in {old.folder}; their numbers are of "
                "different data: do run one of them anew."
            )


def _pairs(new: list[Cell], old: list[Cell]) -> list[tuple[Cell, Cell]]:
    by_seed = {cell.seed: cell for cell in old}
    return [(cell, by_seed[cell.seed]) for cell in new if cell.seed in by_seed]


def _same_items(new: Cell, old: Cell) -> bool:
    return np.array_equal(np.sort(new.arrays["ids"]), np.sort(old.arrays["ids"]))


def _changes(setting: Setting, pairs: list[tuple[Cell, Cell]]) -> list[Change]:
    arms = shared_arms([cell for pair in pairs for cell in pair])
    if not arms:
        return []
    found = paired_bootstrap([_split(*pair, arms) for pair in pairs])
    return [
        Change(setting, arm, len(pairs), found[i], found[len(arms) + i])
        for i, arm in enumerate(arms)
    ]


def _split(new: Cell, old: Cell, arms: list[str]) -> Split:
    """Differences item by item, in the order of ids."""
    now, then = (np.argsort(cell.arrays["ids"], kind="stable") for cell in (new, old))
    right = [new.correct(arm)[now] * 1.0 - old.correct(arm)[then] for arm in arms]
    loss = [nll_of(new, arm)[now] - nll_of(old, arm)[then] for arm in arms]
    return Split(np.stack([*right, *loss], axis=1), new.clusters()[now])


def baseline_report(new: Results, old: Results) -> Report:
    """What changed between two folders; same errors as `compare`."""
    changes, left_out = compare(new, old)
    blocks: list[Block] = [facts_of(new)]
    blocks.append(Bullets([("", line) for line in _lines(changes)]))
    rest: list[Block] = [Bullets([("", line) for line in left_out])] if left_out else []
    sections = [
        Section("In short", blocks),
        Section("Cell by cell", [_table(new, changes)] if changes else []),
        Section("Not compared", rest),
        Section("How it was measured", [Text(METHOD)]),
    ]
    lead = [
        f"{new.folder.name} against {old.folder.name}: the same splits and test items, "
        "item by item. Above 0 points, the new results are better."
    ]
    return Report(f"Benchmark: {new.folder.name} against {old.folder.name}", lead, sections)


def _lines(changes: list[Change]) -> list[str]:
    if not changes:
        return ["Nothing could be compared."]
    better = [c for c in changes if c.top1.sign > 0]
    worse = [c for c in changes if c.top1.sign < 0]
    same = [c for c in changes if c.top1 == (0, 0, 0)]
    count = len(changes)
    lines = [
        f"Of {count} {plural(count, 'arm')} in their settings, {len(better)} are clearly better, "
        f"{len(worse)} clearly worse and {len(same)} are right on the same items as before."
    ]
    mean = float(np.mean([c.top1.mean for c in changes]))
    return [*lines, f"The mean change of top-1 is {points(mean, 2)} points."]


def _table(new: Results, changes: list[Change]) -> Grid:
    rows: list[list[str]] = []
    good: set[tuple[int, int]] = set()
    bad: set[tuple[int, int]] = set()
    for number, change in enumerate(changes):
        nll = [signed(value, 3) for value in change.nll]
        words = " · ".join([change.setting.protocol, *setting_words(change.setting)])
        rows.append(
            [
                words, arm_name(change.arm), str(change.seeds), with_interval(change.top1),
                f"{nll[0]} [{nll[1]}, {nll[2]}]",
            ]
        )  # fmt: skip
        for column, sign in ((3, change.top1.sign), (4, -change.nll.sign)):
            if sign:
                (good if sign > 0 else bad).add((number, column))
    return Grid(
        ["setting", "arm", "splits", "top-1, points", "NLL"], rows, words=2, good=frozenset(good),
        bad=frozenset(bad), strong=frozenset(good | bad),
        caption="New minus baseline, mean [95 % interval]; bold where the interval excludes 0.",
    )  # fmt: skip
