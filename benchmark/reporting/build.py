"""Puts a report together."""

from collections.abc import Sequence

from reporting.cells import Results
from reporting.clean import clean_section
from reporting.complement import complement_section
from reporting.document import Block, Bullets, Facts, Grid, Heading, Report, Section, Text
from reporting.heads import head_blocks
from reporting.pairs import Difference, across_pairs, differences_of, shared_arms
from reporting.pictures import Source, galleries
from reporting.protocols import FOREST, PROTOCOLS, protocols_of
from reporting.sections import (
    complementarity_blocks,
    forest_block,
    gain_section,
    heat_section,
    lowdata_blocks,
    peers_blocks,
    reliability_section,
)
from reporting.statistics import METHOD
from reporting.summary import summary_lines
from reporting.tables import (
    across_table,
    all_metrics,
    cost_table,
    cost_words,
    differences_table,
    overview,
    phase_table,
)
from reporting.words import DASH, plural

_WILCOXON = (
    "One difference per pair of task and backbone, the mean over splits, shots and shifts; "
    "Wilcoxon's signed rank test, two-sided, Holm-corrected within the comparisons of the method "
    "and, apart from them, within those of the peers and of auto. “Clearly”: settings whose "
    "bootstrap interval excludes 0. Backbones on one task are not independent of each other, so "
    "that p is rather too small; fewer than six pairs cannot give p < 0.05 whatever they are."
)


def build_report(results: Results, source: Source | None = None) -> Report:
    """The report of a run.

    Args:
        results: of the run.
        source: gives the pictures of galleries; None leaves them out.
    """
    differences = differences_of(results)
    across = across_pairs(differences)
    lines = summary_lines(results, differences, across)
    short: list[Block] = [facts_of(results), Bullets(lines), *_notes(results)]
    sections = [Section("In short", short)]
    sections += [_protocol(results, name, differences) for name in protocols_of(results)]
    if across:
        blocks: list[Block] = [across_table(across), Text(_WILCOXON, soft=True)]
        sections.append(Section("Across tasks", blocks))
    sections += [
        gain_section(results, differences),
        complement_section(results),
        heat_section(results),
        reliability_section(results),
        clean_section(results),
        Section("Repaired and broken answers", galleries(results, source)),
        Section("Cost", [Text(cost_words(results)), phase_table(results), cost_table(results)]),
        Section("What failed", _failures(results)),
        Section("How it was measured", _method(results)),
    ]
    return Report(f"Benchmark: {results.run.get('suite', 'results')}", _lead(results), sections)


def facts_of(results: Results) -> Facts:
    """How much there is."""
    tasks = {cell.setting.task for cell in results.cells}
    backbones = {cell.setting.backbone for cell in results.cells}
    seeds = {cell.seed for cell in results.cells}
    seconds = sum(sum(v or 0 for v in c.document["seconds"].values()) for c in results.cells)
    return Facts(
        [
            (str(len(tasks)), plural(len(tasks), "task")),
            (str(len(backbones)), plural(len(backbones), "backbone")),
            (str(len(seeds)), f"{plural(len(seeds), 'split')} at most"),
            (f"{len(results.cells):,}", "finished cells"),
            (str(len(results.failures)), "failed cells"),
            (f"{seconds / 60:,.1f}", "minutes in all"),
        ]
    )


def _lead(results: Results) -> list[str]:
    times = sorted(str(c.document["provenance"].get("finished", "")) for c in results.cells)
    first, last = (time[:16].replace("T", " ") for time in (times[0], times[-1]))
    when = f"Measured between {first} and {last}." if first else ""
    return [
        "A head on features, their nearest neighbours among the training pictures, and the blend "
        "of both. Differences are paired, test items are touched once, and every number is "
        "a mean over splits.",
        *([when] if when else []),
    ]


def _notes(results: Results) -> list[Block]:
    return [Text(f"Note: {warning}") for warning in results.warnings]


def _protocol(results: Results, protocol: str, differences: Sequence[Difference]) -> Section:
    heading, words = PROTOCOLS.get(protocol, (protocol, ""))
    cells = [cell for cell in results.cells if cell.setting.protocol == protocol]
    own = [d for d in differences if d.comparison.protocol == protocol]
    blocks: list[Block] = [Text(words)] if words else []
    special = _special(results, protocol, own)
    folded = "Top-1 of every arm, in numbers" if special else ""
    blocks += [*special, overview(results, protocol, shared_arms(cells), folded)]
    if protocol in FOREST:
        first, second = FOREST[protocol]
        blocks += forest_block(own, first, second, f"difference-{protocol}")
    if own:
        blocks.append(differences_table(results, own, folded="Paired differences, one by one"))
    return Section(heading, [*blocks, all_metrics(results, protocol)])


def _special(results: Results, protocol: str, own: Sequence[Difference]) -> list[Block]:
    """What only one protocol has."""
    if protocol == "lowdata":
        return lowdata_blocks(results)
    if protocol == "peers":
        return peers_blocks(results, own)
    if protocol in ("heads", "lowdata_heads"):
        return head_blocks(results, protocol)
    return complementarity_blocks(results) if protocol == "complementarity" else []


def _failures(results: Results) -> list[Block]:
    rows = [
        [_cell_words(f.get("cell")), str(f.get("error", "")), str(f.get("message", ""))]
        for f in results.failures
    ]
    return [Grid(["cell", "error", "message"], rows, words=3)] if rows else []


def _cell_words(cell: object) -> str:
    if not isinstance(cell, dict):
        return str(cell)
    numbers = ("seed", "shots")
    said = {name: value for name, value in cell.items() if value is not None}
    return " · ".join(f"{k} {v}" if k in numbers else str(v) for k, v in said.items())


def _method(results: Results) -> list[Block]:
    blocks: list[Block] = [Text(METHOD)]
    blocks.append(
        Text(
            "The blend's, k-NN's and the peers' settings were chosen on validation; the test split "
            "was touched once. A near duplicate is a test item whose picture is nearly that of a "
            "training item; “clean” columns leave such test items out."
        )
    )
    blocks += [Heading("Data"), _data(results), Heading("Models"), _models(results)]
    blocks += [Heading("Machine"), _machine(results)]
    return blocks


def _data(results: Results) -> Grid:
    rows = {}
    for cell in results.cells:
        task, data = cell.document["task"], cell.document["data"]
        if cell.setting.shots is None or cell.setting.task not in rows:
            counts = [f"{data.get(part) or 0:,}" for part in ("train", "validation", "test")]
            rows[cell.setting.task] = [
                cell.setting.task, str(task.get("title") or DASH), str(task.get("licence") or DASH),
                str(task.get("revision")), str(task.get("classes", DASH)), *counts,
                f"{data.get('near_duplicates_in_train') or 0:,}",
            ]  # fmt: skip
    columns = [
        "task", "title", "licence", "revision", "classes", "train", "validation", "test",
        "near duplicates",
    ]  # fmt: skip
    return Grid(columns, list(rows.values()), words=4)


def _models(results: Results) -> Grid:
    rows = {
        cell.setting.backbone: [
            cell.setting.backbone,
            str(cell.document["model"].get("title") or DASH),
            str(cell.document["model"].get("revision")),
        ]
        for cell in results.cells
    }
    return Grid(["backbone", "title", "revision"], list(rows.values()), words=3)


def _machine(results: Results) -> Grid:
    found: dict[str, set[str]] = {}
    for cell in results.cells:
        about = dict(cell.document["provenance"])
        versions = about.pop("versions", {})
        about.pop("finished", None)
        for name, value in (about | versions).items():
            found.setdefault(str(name), set()).add(str(value))
    rows = [[name, ", ".join(sorted(values))] for name, values in found.items()]
    return Grid(["what", "value"], rows, words=2, folded="Machine, versions and commit")
