"""What each rank does in store/test_distributed_search.py: searches over shards, written down."""

import json
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from hf_knn import Datastore
from hf_knn.store import ShardedDatastore
from hf_knn.store import index as indexes
from hf_knn.store import sharded as distributed_search

DIM = 5


class Rows(NamedTuple):
    """Rows of one datastore, how they are compared, and where the first rank's end."""

    features: Tensor
    labels: Tensor
    ids: Tensor
    cut: int
    options: dict[str, Any]


class Case(NamedTuple):
    """Queries of both ranks."""

    queries: Tensor
    k: int
    excluded: Tensor | None
    cut: int


def rows_named(name: str) -> Rows:
    """The rows of a case; coarse, so that many are equal or equally near, on both ranks."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    count, cut = {"uneven": (61, 47), "empty shard": (40, 40), "few": (7, 5)}.get(name, (60, 30))
    features = torch.randint(-2, 3, (count, DIM), generator=generator).float()
    if name == "fine":
        features = torch.randn(count, DIM, generator=generator)
    if name == "float32":  # only the second rank's rows need it
        features[-1] = 1e6
    if name == "offset":  # float16 would tell only some of them apart
        features = 100 + features / 64
    if name == "equal":
        features = torch.ones(count, DIM)
    ids = torch.randperm(5 * count, generator=generator)[:count]
    labels = torch.randint(0, 4, (count,), generator=generator)
    options = {"metric": "l2", "normalization": "none"} if name == "l2" else {}
    return Rows(features, labels, ids, cut, options)


NAMES = ["even", "uneven", "empty shard", "few", "fine", "float32", "offset", "equal", "l2"]


def cases_of(rows: Rows) -> list[Case]:
    """With and without exclusion, few and many neighbours, also a rank without queries."""
    noise = torch.randn(6, DIM, generator=torch.Generator().manual_seed(3))
    queries = torch.cat([rows.features[:5], rows.features[-3:], torch.zeros(1, DIM), noise])
    own = torch.cat([rows.ids[:5], rows.ids[-3:], torch.full((7,), -1)])
    own[9] = rows.ids[3]
    kinds = [(3, None), (3, own), (20, own), (len(rows.ids), own), (10_000, None)]
    cases = [Case(queries, k, excluded, 6) for k, excluded in kinds]
    return [*cases, Case(queries, 4, own, 15), Case(queries, 4, own, 0)]


def mine(values: Tensor | None, cut: int, rank: int) -> Tensor | None:
    return None if values is None else (values[:cut] if rank == 0 else values[cut:])


def refused(action: Callable[[], Any]) -> str:
    """What an action that must fail says."""
    try:
        action()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def answer_all(rank: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in NAMES:
        rows = rows_named(name)
        features, labels, ids = (mine(values, rows.cut, rank) for values in rows[:3])
        assert features is not None
        assert labels is not None
        assert ids is not None
        sharded = ShardedDatastore.from_features(features, labels, ids, **rows.options)
        assert sharded.count() == len(rows.ids)
        assert len(sharded.shard) == len(ids)
        found[f"{name}/mean"] = sharded.mean
        for number, case in enumerate(cases_of(rows)):
            own = mine(case.excluded, case.cut, rank)
            queries = mine(case.queries, case.cut, rank)
            assert queries is not None
            hits = sharded.search(queries, case.k, own)
            for field, value in hits._asdict().items():
                found[f"{name}/{number}/{field}"] = value.contiguous()
    return found


def mistakes(rank: int) -> list[str]:
    """Bad arguments of one rank are errors on both, and nobody waits for ever."""
    rows = rows_named("even")
    part = [mine(values, rows.cut, rank) for values in rows[:3]]
    features, labels, ids = (value for value in part if value is not None)
    make = ShardedDatastore.from_features
    good = make(features, labels, ids)
    bad_row = features.clone()
    bad_row[0, 0] = torch.nan if rank == 1 else 0.0
    doubled = ids.clone()
    doubled[-1] = rows.ids[0] if rank == 1 else ids[-1]
    own_mean = Datastore.from_features(features, labels, ids)
    lists = Datastore(
        good.shard.features, labels, ids, good.mean, index="flat" if rank else "IVF2,Flat"
    )
    numbered = make(features, labels)
    assert numbered.shard.ids.tolist() == list(range(30 * rank, 30 * rank + 30))
    wide = torch.zeros(1, DIM + rank)
    return [
        refused(lambda: make(bad_row, labels, ids)),
        refused(lambda: make(features, labels, doubled)),
        refused(lambda: make(features[:, : DIM - rank], labels, ids)),
        refused(lambda: ShardedDatastore(own_mean)),
        refused(lambda: ShardedDatastore(lists)),
        refused(lambda: make(features, labels, ids, index="IVF16,Flat" if rank else "flat")),
        refused(lambda: make(features, labels, ids, index="IVF999,Flat")),
        refused(lambda: good.search(wide, 3)),
        refused(lambda: good.search(features, 3 + rank)),
        refused(lambda: good.search(features, 0 if rank == 0 else 3)),
    ]


MANY, WIDE, ASKED = 4000, 4, 150


def scattered_rows() -> Rows:
    """Rows and, behind them, queries; the first rank has a fifth."""
    generator = torch.Generator().manual_seed(7)
    centers = torch.randn(40, WIDE, generator=generator)
    which = torch.randint(0, 40, (MANY + ASKED,), generator=generator)
    features = centers[which] + torch.randn(MANY + ASKED, WIDE, generator=generator)
    ids = torch.randperm(5 * MANY, generator=generator)[:MANY]
    return Rows(features, which, ids, MANY // 5, {})


LISTS, BY_OWN_ROWS = "IVF16,Flat", "auto"


class Said(logging.Handler):
    """What was said about all ranks."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def approximate(rank: int, index: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Answers of shards with indexes, and what is stated about them."""
    rows, said = scattered_rows(), Said()
    logger = logging.getLogger("hf_knn.store.sharded")
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    features, labels, ids = (mine(v[:MANY], rows.cut, rank) for v in rows[:3])
    assert features is not None
    assert labels is not None
    assert ids is not None
    sharded = ShardedDatastore.from_features(features, labels, ids, index=index, min_recall=0.9)
    logger.removeHandler(said)
    facts: dict[str, Any] = {
        "recall": sharded.recall, "measured_on": sharded.measured_on, "recalls": sharded.recalls,
        "said": said.lines, "spec": sharded.shard.index.spec, "calls": [],
    }  # fmt: skip
    nearest = Datastore.nearest

    def counted(self: Datastore, queries: Any, k: int, exclude_ids: Any = None) -> Any:
        facts["calls"].append(len(queries))
        return nearest(self, queries, k, exclude_ids)

    Datastore.nearest = counted  # type: ignore[method-assign]
    queries = mine(rows.features[MANY:], ASKED // 3, rank)
    assert queries is not None
    own = torch.full((len(queries),), -1)
    found = sharded.search(queries, 20, own)
    Datastore.nearest = nearest  # type: ignore[method-assign]
    return {f"{index}/{name}": value.contiguous() for name, value in found._asdict().items()}, facts


def approximate_all(rank: int, folder: Path) -> None:
    """By a kind that is named, and by what pays for the rows of each rank."""
    faiss.omp_set_num_threads(1)  # two ranks of many threads wait for one another
    distributed_search.QUERY_BLOCK = 64
    answers, facts = approximate(rank, LISTS)
    home = sys.modules[indexes.choose_index.__module__]
    home.LARGEST_EXACT = 1000  # type: ignore[attr-defined]
    more, facts_of_auto = approximate(rank, BY_OWN_ROWS)
    save_file(answers | more, folder / f"approximate-{rank}.safetensors")
    said = {LISTS: facts, BY_OWN_ROWS: facts_of_auto}
    (folder / f"approximate-{rank}.json").write_text(json.dumps(said))


def work_as(rank: int, world: int, folder: Path) -> None:
    """What one rank does, in a process of its own; it waits for the other at most a minute."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # nothing of the tests' own time limit
    signal.alarm(60)
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    distributed_search.QUERY_BLOCK = 4
    distributed_search._ID_BLOCK = 16
    save_file(answer_all(rank), folder / f"answers-{rank}.safetensors")
    (folder / f"mistakes-{rank}.txt").write_text("\n".join(mistakes(rank)))
    approximate_all(rank, folder)
    dist.destroy_process_group()
