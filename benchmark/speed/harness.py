"""Times a few ways to do the same thing, alternately, and reports medians and ratios."""

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import faiss
import numpy as np
import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Timing:
    """Seconds per round of one contestant, and its ratio to the peer round by round.

    Attributes:
        name: what was timed.
        seconds: one value per round, for the whole work (slow ones do a part of it).
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
    contestants: Mapping[str, Callable[[], object]],
    peer: str,
    rounds: int,
    shares: Mapping[str, float] | None = None,
) -> list[Timing]:
    """Runs all contestants once per round, after one warm-up each.

    Args:
        contestants: what to time, by name.
        peer: the name that ratios refer to.
        rounds: how many rounds, >= 1.
        shares: the part of the work that a slow contestant does, in (0, 1]; its seconds are divided
            by it. What is not named does all.
    """
    shares = shares or {}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    for _ in range(rounds):
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - started) / shares.get(name, 1.0))
    return timings_of(seconds, peer)


def timings_of(seconds: Mapping[str, list[float]], peer: str) -> list[Timing]:
    """Medians and ratios of what was timed alternately.

    Args:
        seconds: one value per round, by contestant.
        peer: the name that ratios refer to.
    """
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
    document: dict[str, object] = {"title": title, "peer": peer, "facts": facts}
    document["timings"] = [asdict(timing) for timing in timings]
    write(path, document)


def write(path: Path, document: Mapping[str, object]) -> None:
    """Writes a JSON document with the machine in it.

    Args:
        path: where to; folders are made.
        document: what was measured.
    """
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "faiss": faiss.__version__,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**document, "machine": machine}, indent=2) + "\n", "utf-8")


def shared(found: Iterable[Iterable[int]], wanted: Iterable[Iterable[int]], k: int) -> float:
    """Recall: the mean share of the wanted k neighbours that were found."""
    pairs = zip(found, wanted, strict=True)
    return float(np.mean([len(set(mine) & set(theirs)) / k for mine, theirs in pairs]))


def memory(name: str) -> int:
    """Bytes of this process: `VmRSS` now, or `VmHWM` at most so far (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
