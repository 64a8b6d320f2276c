"""Times a few ways to do the same thing, alternately, and reports medians and ratios."""

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Timing:
    """Seconds per round of one contestant, and its ratio to the peer round by round.

    Attributes:
        name: what was timed.
        seconds: one value per round.
        ratio: median over the rounds of peer seconds / own seconds; above 1 is faster.
        ratio_low: the smallest ratio of a round.
        ratio_high: the largest ratio of a round.
    """

    name: str
    seconds: list[float]
    ratio: float
    ratio_low: float
    ratio_high: float


def compare(
    contestants: Mapping[str, Callable[[], object]], peer: str, rounds: int
) -> list[Timing]:
    """Runs all contestants once per round, after one warm-up each.

    Args:
        contestants: what to time, by name.
        peer: the name that ratios refer to.
        rounds: how many rounds, >= 1.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    for _ in range(rounds):
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    timings = []
    for name, own in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds[peer], own, strict=True)]
        timings.append(Timing(name, own, median(ratios), min(ratios), max(ratios)))
    return timings


def report(title: str, timings: list[Timing], peer: str, path: Path, **facts: object) -> None:
    """Prints a table and writes the JSON beside it.

    Args:
        title: of the table.
        timings: what `compare` returned.
        peer: the name that ratios refer to.
        path: the JSON file.
        facts: what else was measured in this run (recall, sizes, …).
    """
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("median s", f"x {peer}", "from", "to"):
        table.add_column(column, justify="right")
    for timing in timings:
        table.add_row(
            timing.name, f"{median(timing.seconds):.3f}", f"{timing.ratio:.2f}",
            f"{timing.ratio_low:.2f}", f"{timing.ratio_high:.2f}",
        )  # fmt: skip
    Console().print(table)
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    document: dict[str, object] = {"title": title, "peer": peer, "machine": machine, "facts": facts}
    document["timings"] = [asdict(timing) for timing in timings]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
