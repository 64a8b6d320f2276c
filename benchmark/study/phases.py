"""What a cell spends its time on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

LOAD, EXTRACT, TRAIN, HEADS = "load", "extract", "train backbone", "fit heads"
STORE, TUNE, PEERS, MEASURE = "build store", "search and tune", "fit peers", "measure"
PHASES = (LOAD, EXTRACT, TRAIN, HEADS, STORE, TUNE, PEERS, MEASURE)
"""In the order of a cell. What the cells of a split share is told by the first that needs it."""


@dataclass
class Phases:
    """Seconds by phase; a phase inside another one is taken out of it.

    Attributes:
        seconds: since they were last taken.
        images: pictures that went through the backbone since then.
        image_seconds: of that alone, without opening models and reading caches.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    images: int = 0
    image_seconds: float = 0.0
    _open: list[str] = field(default_factory=list)
    _since: float = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charges the time of a block to a phase."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def add(self, name: str, seconds: float) -> None:
        """Charges time that was measured elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def take(self) -> tuple[dict[str, float], int, float]:
        """`seconds`, `images` and `image_seconds`, which start anew."""
        taken = self.seconds, self.images, self.image_seconds
        self.seconds, self.images, self.image_seconds = {}, 0, 0.0
        return taken

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.add(self._open[-1], now - self._since)
        self._since = now


def rates_of(seconds: dict[str, float], images: int, sizes: dict[str, int]) -> dict[str, float]:
    """Pictures per second of each phase that has some.

    Args:
        seconds: by phase.
        images: pictures that went through the backbone.
        sizes: pictures for `train`, `validation` and `test`.
    """
    everything, asked = sum(sizes.values()), sizes["validation"] + sizes["test"]
    handled = dict.fromkeys((TRAIN, HEADS, STORE, PEERS), sizes["train"])
    handled |= {LOAD: everything, EXTRACT: images, TUNE: asked, MEASURE: sizes["test"]}
    return {
        name: handled[name] / spent for name, spent in seconds.items() if spent and handled[name]
    }
