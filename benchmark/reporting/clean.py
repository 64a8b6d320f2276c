"""Everything once more without test items that have a near duplicate in training."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from reporting.cells import Cell, Results
from reporting.document import Block, Figures, Grid, Heading, Section, Text
from reporting.pairs import differences_of, shared_arms
from reporting.protocols import FOREST, PROTOCOLS, protocols_of
from reporting.sections import forest_block, gain_section, lowdata_blocks, reliability_section
from reporting.tables import overview

_HEADING = "The same without near duplicates"
_ABOUT = (
    "The tables and drawings of test items above, without the test items that have a near "
    "duplicate in training. What was chosen stays as it was."
)


def without_near_duplicates(results: Results) -> Results:
    """The results on the other test items; cells without any are left out.

    Args:
        results: of a run.

    Returns:
        Results whose `test` metrics are the run's `test_clean`, with the answers to match.
    """
    cells = [_clean_cell(cell) for cell in results.cells if (~_near(cell)).any()]
    return replace(results, cells=cells)


def clean_section(results: Results) -> Section:
    """The drawings of a report on these items; empty if no item has a near duplicate."""
    if not any(_near(cell).any() for cell in results.cells):
        return Section(_HEADING, [])
    rest = without_near_duplicates(results)
    if not rest.cells:
        return Section(_HEADING, [Text("Every test item has a near duplicate in training.")])
    differences = differences_of(rest)
    blocks: list[Block] = [Text(_ABOUT)]
    for protocol in protocols_of(rest):
        cells = [cell for cell in rest.cells if cell.setting.protocol == protocol]
        blocks.append(Heading(PROTOCOLS.get(protocol, (protocol, ""))[0]))
        if protocol == "lowdata":
            blocks += lowdata_blocks(rest)
        blocks.append(_folded(overview(rest, protocol, shared_arms(cells))))
        if protocol in FOREST:
            own = [d for d in differences if d.comparison.protocol == protocol]
            blocks += forest_block(own, *FOREST[protocol], f"difference-{protocol}")
    for section in (gain_section(rest, differences), reliability_section(rest)):
        blocks += [Heading(section.heading), *section.blocks] if section.blocks else []
    return Section(_HEADING, _renamed(blocks))


def _near(cell: Cell) -> Any:
    return cell.arrays["near_duplicate"].astype(bool)


def _clean_cell(cell: Cell) -> Cell:
    kept = ~_near(cell)
    arrays = {name: array[kept] for name, array in cell.arrays.items()}
    found = replace(cell, arrays=arrays)
    arms = {
        arm: entry | {"test": (entry.get("test_clean") or {}) | _top1(found, arm)}
        for arm, entry in cell.arms.items()
    }
    return replace(found, document=cell.document | {"arms": arms})


def _top1(cell: Cell, arm: str) -> dict[str, float]:
    return {"top1": float(cell.correct(arm).mean())}


def _folded(grid: Grid) -> Grid:
    return replace(grid, folded="Top-1 of every arm, in numbers")


def _renamed(blocks: Sequence[Block]) -> list[Block]:
    """Their files must not be those of the drawings above."""
    return [
        replace(block, figures=[replace(f, name=f"clean-{f.name}") for f in block.figures])
        if isinstance(block, Figures)
        else block
        for block in blocks
    ]
