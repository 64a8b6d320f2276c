"""SPEED.md and its plots, from the JSON files that the speed scripts wrote."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def write_page(page: Path, folder: Path, names: Sequence[str], missing: Mapping[str, str]) -> None:
    """Writes the page and one plot per comparison.

    Args:
        page: the Markdown file.
        folder: where the JSON files lie.
        names: of the scripts, in their order.
        missing: why a script has no result in this run.
    """
    lines = [
        "# Speed", "",
        "Written by `make bench`. Each table is one run in which all contestants took turns; a "
        "ratio above 1 is faster than the peer, and its range is over the rounds.", "",
    ]  # fmt: skip
    for name in names:
        place = folder / f"{name}.json"
        if name in missing:
            lines += [f"## {name}", "", f"{missing[name][0].upper()}{missing[name][1:]}.", ""]
        elif place.is_file():
            document = json.loads(place.read_text(encoding="utf-8"))
            lines += _section(name, document, page)
    page.write_text("\n".join(lines), encoding="utf-8")


def _section(name: str, document: dict[str, Any], page: Path) -> Iterator[str]:
    yield from (f"## {name}", "", str(document.get("title", "")), "")
    timings = document.get("timings") or []
    if timings:
        yield from _table(timings, str(document["peer"]))
        plot = page.with_name(f"speed-{name}.png")
        _draw(timings, str(document["peer"]), plot)
        yield from ("", f"![{name}]({plot.name})", "")
    known = ("title", "peer", "timings", "machine", "facts")
    facts = dict(document.get("facts") or {})
    facts |= {key: value for key, value in document.items() if key not in known}
    yield from _facts(facts, 0)
    machine = document.get("machine") or {}
    yield from ("", f"Machine: {', '.join(f'{k} {v}' for k, v in machine.items())}.", "")


def _table(timings: Sequence[dict[str, Any]], peer: str) -> Iterator[str]:
    yield f"| | median s | x {peer} | from | to |"
    yield "|---|---|---|---|---|"
    for timing in timings:
        seconds = median(timing["seconds"])
        cells = [timing["name"], f"{seconds:.3g}"]
        cells += [f"{timing[key]:.2f}" for key in ("ratio", "ratio_low", "ratio_high")]
        yield f"| {' | '.join(cells)} |"


def _facts(facts: Mapping[str, Any], depth: int) -> Iterator[str]:
    for key, value in facts.items():
        words = key.replace("_", " ") if key.isidentifier() else key  # not names of functions
        label = f"{'  ' * depth}- {words}"
        if isinstance(value, Mapping):
            yield f"{label}:"
            yield from _facts(value, depth + 1)
        elif isinstance(value, float):
            yield f"{label}: {value:.4g}"
        elif isinstance(value, list) and len(value) > 12:
            yield f"{label}: {len(value)} values, see the JSON"
        else:
            yield f"{label}: {value}"


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
