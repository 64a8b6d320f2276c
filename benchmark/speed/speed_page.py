"""SPEED.md and its plots, from the JSON files that the speed scripts wrote."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from speed_tables import fact_tables, headline_table, timing_table, words

matplotlib.use("Agg")
from matplotlib import pyplot


def write_page(
    page: Path, folder: Path, headlines: Mapping[str, Sequence[str]], missing: Mapping[str, str]
) -> None:
    """Writes the page and one plot per comparison.

    Args:
        page: the Markdown file.
        folder: where the JSON files lie.
        headlines: the scripts in their order, each with the contestants named at the top.
        missing: why a script has no result in this run.
    """
    found = {}
    for name in headlines:
        place = folder / f"{name}.json"
        if name not in missing and place.is_file():
            found[name] = json.loads(place.read_text(encoding="utf-8"))
    lines = [
        "# Speed", "",
        "Written by `make bench`. Each comparison is one run in which all contestants took turns; "
        "a ratio above 1 is faster than the peer.", "",
        *headline_table(_claims(found, headlines)),
        *_machines(found.values()),
    ]  # fmt: skip
    for name in headlines:
        if name in missing:
            lines += [f"## {name}", "", f"{missing[name][0].upper()}{missing[name][1:]}.", ""]
        elif name in found:
            lines += _section(name, found[name], page)
    page.write_text("\n".join(lines), encoding="utf-8")


def _claims(
    found: Mapping[str, dict[str, Any]], headlines: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for name, document in found.items():
        for timing in document.get("timings") or []:
            if timing["name"] in headlines[name]:
                yield str(document["title"]), str(document["peer"]), timing


def _machines(documents: Iterable[dict[str, Any]]) -> Iterator[str]:
    """What it was measured on: one line, unless the files are of several machines."""
    for machine in dict.fromkeys(_machine_of(document) for document in documents):
        yield from (f"Machine: {machine}.", "")


def _machine_of(document: dict[str, Any]) -> str:
    return ", ".join(f"{words(key)} {value}" for key, value in document["machine"].items())


def _section(name: str, document: dict[str, Any], page: Path) -> Iterator[str]:
    yield from (f"## {name}", "", f"{document['title']}.", "")
    timings = document.get("timings") or []
    if timings:
        peer, plot = str(document["peer"]), page.with_name(f"speed-{name}.png")
        yield from timing_table(timings, peer)
        if any(len(timing["seconds"]) > 1 for timing in timings):
            _draw(timings, peer, plot)
            yield from (f"![{name}]({plot.name})", "")
    known = ("title", "peer", "timings", "machine", "facts")
    facts = dict(document.get("facts") or {})
    facts |= {key: value for key, value in document.items() if key not in known}
    yield from fact_tables(facts)


def _draw(timings: Sequence[dict[str, Any]], peer: str, path: Path) -> None:
    """Bars of ratios with their ranges."""
    figure, axes = pyplot.subplots(figsize=(7, 0.5 + 0.4 * len(timings)), layout="constrained")
    ratios = [timing["ratio"] for timing in timings]
    below = [timing["ratio"] - timing["ratio_low"] for timing in timings]
    above = [timing["ratio_high"] - timing["ratio"] for timing in timings]
    axes.barh([t["name"] for t in timings], ratios, xerr=[below, above], color="#4477aa")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"times as fast as {peer}")
    axes.invert_yaxis()
    if max(ratios) > 30 * min(ratios):
        axes.set_xscale("log")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
