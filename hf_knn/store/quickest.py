"""Which exact first pass is the fastest on this machine: measured, not assumed.

All give the same answer. They are compared once for rows of about that number and width, for a
single query and for a batch, and what each took is remembered beside the features.
"""

import functools
import json
import logging
import platform
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..core.lazy import Lock
from ..core.plain_json import read_json
from ..core.search import ROW_BLOCK, Floats, Ints, Rows, RowSpace, Singles
from .faiss import FaissFlat, has_faiss, how_to_get_faiss
from .folders import cache_root, short_name, written_whole
from .products import FloatFormat, Int8Format, Products, has_exact_int8, has_fast_bfloat16
from .searcher import GrowingFirstPass

logger = logging.getLogger(__name__)

FEWEST_ROWS = 256
"""Fewer are mostly compared one by one, whatever the first pass."""

_FEWEST_COMPARED, _MOST_VALUES = 1024, 2**24
"""Rows, and values in them, that the first passes are compared with: more than most caches hold."""

_DRAWN_ROWS = 4096
"""So many of them differ."""

_BATCH, _ROUNDS = 64, 5
_FEW_QUERIES = 8
"""So many queries are searched as one is; more are a batch."""

_HOPELESS = 3.0
"""A batch of one that takes so many times as long as the best is tried with few rows only."""

_WORTH_MEMORY = 1.25
"""How much faster one must be to be kept beside the other."""

_K, _ASKED = 20, 32
_FEWEST_EXTRA, _MOST_EXTRA, _ROWS_PER_EXTRA = 44, 256, 300
"""So many rows in doubt are compared in the time that a short number saves for these rows."""

_FLOAT32 = "float32"
_REVISION = 2
"""Of our first passes; what was measured with others is measured again."""

Make = Callable[[Singles], GrowingFirstPass]


class Milliseconds(NamedTuple):
    """What a first pass took.

    Attributes:
        single: one query.
        batch: many at once.
    """

    single: float
    batch: float


Times = dict[str, Milliseconds]

_known: dict[str, Times] = {}
_measuring = Lock()


def contenders() -> dict[str, Make]:
    """The exact first passes that there are here, by name."""
    found: dict[str, Make] = {_FLOAT32: partial(Products, number_format=FloatFormat(torch.float32))}
    if has_fast_bfloat16():
        found["bfloat16"] = partial(Products, number_format=FloatFormat(torch.bfloat16))
    if has_exact_int8():
        found["int8"] = partial(Products, number_format=Int8Format())
    if has_faiss():
        found["faiss"] = FaissFlat
    else:
        _say_once_that_faiss_is_missing()
    return found


def times_of(count: int, width: int) -> Times:
    """What each first pass takes; measured at the first call for so many rows of that width.

    Args:
        count: rows.
        width: of a row.
    """
    rows = max(_FEWEST_COMPARED, 1 << (count - 1).bit_length())
    while rows > _FEWEST_COMPARED and rows * width > _MOST_VALUES:
        rows //= 2
    made = contenders()
    name = short_name([_machine(), sorted(made), rows, width])
    with _measuring:
        if name not in _known:
            place = _place(name)
            times = _read(place, made)
            if times is None:
                times = measure(made, rows, width)
                logger.info("first passes over %d x %d: %s", rows, width, times)
                _remember(place, times, rows, width)
            _known[name] = times
        return _known[name]


def choose(times: Times) -> tuple[str, str]:
    """The first passes for a single query and for a batch; one for both, unless two are worth it.

    Args:
        times: of each.
    """
    single = min(times, key=lambda name: times[name].single)
    batch = min(times, key=lambda name: times[name].batch)
    if times[batch].single <= _WORTH_MEMORY * times[single].single:
        return batch, batch
    if times[single].batch <= _WORTH_MEMORY * times[batch].batch:
        return single, single
    return single, batch


def build_quickest(features: Rows, space: RowSpace) -> "Quickest":
    """The fastest for these rows.

    One with short numbers must also leave few rows in doubt: that depends on how near to each other
    the rows lie, and is tried out with some of them.

    Args:
        features: [N, D] stored raw features.
        space: how they are compared.
    """
    made = contenders()
    if len(features) < FEWEST_ROWS:
        return Quickest({_FLOAT32: _filled(made[_FLOAT32], features, space)}, _FLOAT32, _FLOAT32)
    times = dict(times_of(len(features), space.width + space.is_l2))
    built: dict[str, GrowingFirstPass] = {}
    while True:
        names = choose(times)
        for name in set(names) - set(built):
            first_pass = _filled(made[name], features, space)
            extra = extra_needed(first_pass, features, space)
            if extra is None and name != _FLOAT32:
                logger.info("the rows lie too near to each other for the first pass %s", name)
                del times[name]
                break
            first_pass.extra = max(extra or 0, first_pass.extra)
            built[name] = first_pass
        else:
            return Quickest({name: built[name] for name in names}, *names)


class Quickest:
    """One or two first passes over the same rows.

    Args:
        inside: the first passes, by name.
        few: the name of that for few queries at once.
        many: the name of that for more.
    """

    def __init__(self, inside: dict[str, GrowingFirstPass], few: str, many: str) -> None:
        self.inside, self.few, self.many = inside, few, many
        self.extra = max(first_pass.extra for first_pass in inside.values())

    def __repr__(self) -> str:
        if self.few == self.many:
            return self.few
        return f"{self.few} for up to {_FEW_QUERIES} queries, {self.many} for more"

    def add(self, rows: Singles) -> None:
        """See `GrowingFirstPass.add`."""
        for first_pass in self.inside.values():
            first_pass.add(rows)

    def candidates(self, queries: Singles, count: int) -> tuple[Ints, Floats]:
        """See `FirstPass.candidates`."""
        chosen = self.few if len(queries) <= _FEW_QUERIES else self.many
        return self.inside[chosen].candidates(queries, count)


def extra_needed(first_pass: GrowingFirstPass, features: Rows, space: RowSpace) -> int | None:
    """How many candidates beyond k nearly every query needs; None if that is too many.

    Args:
        first_pass: over the rows.
        features: [N, D] stored raw features, some of which are searched for.
        space: how they are compared.
    """
    most = max(_FEWEST_EXTRA, min(len(features) // _ROWS_PER_EXTRA, _MOST_EXTRA))
    count = min(len(features), _K + most)
    asked = np.linspace(0, len(features) - 1, _ASKED).astype(np.int64)
    queries = space.normalize(features[asked])
    scaled, length = space.first_pass_queries(queries)
    positions, reach = first_pass.candidates(scaled, count)
    best = min(_K, count)
    lowest = np.empty(len(asked))
    for number, query in enumerate(queries):
        rows = space.normalize(features[positions[number, :best]])
        lowest[number] = space.compare(rows, query).min()
    in_doubt = (reach >= space.as_score(lowest, queries, length)[:, None]).sum(axis=1)
    needed = int(np.quantile(in_doubt, 0.9))
    return None if needed >= count < len(features) else needed - best + 1


def _filled(make: Make, features: Rows, space: RowSpace) -> GrowingFirstPass:
    """One over all rows, without all of them in float32 at once."""
    first_pass = make(space.first_pass_rows(features[:0]))
    for start in range(0, len(features), ROW_BLOCK):
        first_pass.add(space.first_pass_rows(features[start : start + ROW_BLOCK]))
    return first_pass


def measure(made: dict[str, Make], rows: int, width: int) -> Times:
    """Compares first passes with each other.

    Args:
        made: them, by name.
        rows: how many they are over.
        width: of a row.
    """
    drawn_rows = min(rows, _DRAWN_ROWS)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(drawn_rows + _BATCH, width, generator=generator)
    vectors = torch.nn.functional.normalize(drawn).numpy()
    queries, distinct = vectors[:_BATCH], vectors[_BATCH:]
    found = {name: make(distinct) for name, make in made.items()}

    def took(name: str, asked: int) -> float:
        started = time.perf_counter()
        found[name].candidates(queries[:asked], _K + found[name].extra)
        return 1000 * (time.perf_counter() - started)

    for name in found:  # the first calls of a library cost more
        took(name, 1)
        took(name, _BATCH)
    # a batch takes so long that the slow ones are not waited for
    times = rows // drawn_rows
    batch = {name: times * took(name, _BATCH) for name in found}
    fast = [name for name in found if batch[name] <= _HOPELESS * min(batch.values())]
    for first_pass in found.values():
        _repeat(first_pass, distinct, times)
    single = _least(took, list(found), 1)
    batch |= _least(took, fast, _BATCH)
    return {name: Milliseconds(single[name], batch[name]) for name in made}


def _least(took: Callable[[str, int], float], names: list[str], asked: int) -> dict[str, float]:
    """What each took in the best of a few rounds, in which they take turns."""
    rounds = [{name: took(name, asked) for name in names} for _ in range(_ROUNDS)]
    return {name: min(times[name] for times in rounds) for name in names}


def _repeat(first_pass: GrowingFirstPass, rows: Singles, times: int) -> None:
    """Lets one hold its rows so many times: as many bytes are read as of different rows."""
    if isinstance(first_pass, Products):
        first_pass.repeat(times)
        return
    for _ in range(times - 1):
        first_pass.add(rows)


def _machine() -> list[object]:
    """What the times depend on."""
    return [platform.machine(), _processor(), torch.get_num_threads(), *_versions(), _REVISION]


@functools.cache
def _versions() -> tuple[str, ...]:
    found = []
    for package in ("torch", "numpy", "faiss-cpu", "faiss-gpu"):
        try:
            found.append(version(package))
        except PackageNotFoundError:
            found.append("")
    return tuple(found)


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), platform.processor())


def _place(name: str) -> Path | None:
    try:
        return cache_root() / "search" / f"{name}.json"
    except RuntimeError:  # nobody's home
        return None


def _read(place: Path | None, made: dict[str, Make]) -> Times | None:
    """What was measured of all of them; None if nothing was, or the file is damaged."""
    try:
        measured = read_json(place)["milliseconds"] if place is not None else {}
        found = {str(name): Milliseconds(*map(float, pair)) for name, pair in measured.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    values = np.array(list(found.values()))
    is_sound = set(found) == set(made) and bool((np.isfinite(values) & (values > 0)).all())
    return found if is_sound else None


def _remember(place: Path | None, times: Times, rows: int, width: int) -> None:
    if place is None:
        return
    document = {"rows": rows, "width": width, "milliseconds": times}
    try:
        with written_whole(place) as temporary:
            temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    except OSError as error:  # it is measured again in the next process
        logger.info("What first passes take is not remembered: %s", error)


@functools.cache
def _say_once_that_faiss_is_missing() -> None:
    logger.warning("faiss is not installed, searching with torch; %s.", how_to_get_faiss())
