"""What the speed scripts measured, as Markdown tables with rounded numbers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

_SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def fact_tables(facts: Mapping[str, Any]) -> Iterator[str]:
    """Lines of Markdown: a table for the single values, and one for each group of the others.

    Args:
        facts: by name; a value, a mapping of values, a mapping of such, or a list of mappings.
            Mappings with the same names stand side by side in one table.
    """
    single = {name: value for name, value in facts.items() if not _is_group(value)}
    if single:
        yield from _table(["", ""], [[words(n), shown(v, n)] for n, v in single.items()])
    columns: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    for name, value in facts.items():
        if _holds_groups(value):
            rows = value.items() if isinstance(value, Mapping) else enumerate(value)
            yield from _matrix(words(name), dict(rows), isinstance(value, Mapping))
        elif _is_group(value):
            columns.setdefault(tuple(value), {})[name] = value
    for names, groups in columns.items():
        lines = [[words(n), *(shown(group[n], n, title) for title, group in groups.items())]
                 for n in names]  # fmt: skip
        yield from _table(["", *map(words, groups)], lines)


def timing_table(timings: Sequence[Mapping[str, Any]], peer: str) -> Iterator[str]:
    """Lines of Markdown: seconds and ratios of what took turns.

    Args:
        timings: what `harness.compare` returned, as mappings.
        peer: the name that ratios refer to.
    """
    rows = [
        [timing["name"], shown(median_of(timing), "seconds"), *_ratio_of(timing, peer)]
        for timing in timings
    ]
    yield from _table(["", "median s", f"times as fast as {peer}", "over the rounds"], rows)


def headline_table(claims: Iterable[tuple[str, str, Mapping[str, Any]]]) -> Iterator[str]:
    """Lines of Markdown: one claim per line.

    Args:
        claims: title of the run, name of the peer, and one timing as a mapping.
    """
    rows = [
        [f"{title}: {timing['name']}", peer, *_ratio_of(timing, peer)]
        for title, peer, timing in claims
    ]
    yield from _table(["claim", "peer", "ratio", "over the rounds"], rows)


def shown(value: Any, *names: str) -> str:
    """A value for readers: three digits, thousands with commas, bytes with their unit.

    Args:
        value: a number, a truth, or a text.
        names: what it is called; `bytes` in one of them makes it a size.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).replace("|", "\\|")
    if any("bytes" in name for name in names):
        factor, unit = next((s for s in _SIZES if abs(value) >= s[0]), (1.0, "bytes"))
        return f"{value / factor:.3g} {unit}"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def words(name: Any) -> str:
    """A name of a fact as it is read; names of functions stay."""
    text = str(name)
    return text.replace("_", " ") if text.isidentifier() else text


def median_of(timing: Mapping[str, Any]) -> float:
    """The middle of the rounds, in seconds."""
    ordered = sorted(timing["seconds"])
    middle = len(ordered) // 2
    return float((ordered[middle] + ordered[-middle - 1]) / 2)


def _ratio_of(timing: Mapping[str, Any], peer: str) -> list[str]:
    if timing["name"] == peer:
        return ["1", ""]
    low, high = shown(timing["ratio_low"]), shown(timing["ratio_high"])
    spread = "once" if len(timing["seconds"]) == 1 else f"{low} to {high}"
    return [shown(timing["ratio"]), spread]


def _is_group(value: Any) -> bool:
    return isinstance(value, Mapping) or _holds_groups(value)


def _holds_groups(value: Any) -> bool:
    entries = value.values() if isinstance(value, Mapping) else value
    return isinstance(value, Mapping | list) and all(isinstance(e, Mapping) for e in entries)


def _matrix(title: str, rows: Mapping[Any, Mapping[str, Any]], is_named: bool) -> Iterator[str]:
    """A line per row, a column per name that occurs."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = []
    for label, row in rows.items():
        cells = [shown(row[name], name) if name in row else "" for name in names]
        lines.append([words(label), *cells] if is_named else cells)
    yield from _table([title, *map(words, names)] if is_named else list(map(words, names)), lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""
