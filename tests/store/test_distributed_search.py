"""Two ranks with a part of the rows each answer as one that has all of them, bit for bit.

With approximate indexes they miss as much as they say.
"""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.forks import Errand
from support.oracles import assert_nearest
from support.two_shards import (
    ASKED,
    BY_OWN_ROWS,
    LISTS,
    MANY,
    NAMES,
    Rows,
    cases_of,
    rows_named,
    scattered_rows,
    work_as,
)
from torch import Tensor

from hf_knn import Datastore
from hf_knn.core.search import Neighbors
from hf_knn.store import ShardedDatastore


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what both ranks answered; they are started once."""
    folder = tmp_path_factory.mktemp("ranks")
    started = [Errand.start(partial(work_as, rank, 2, folder)) for rank in range(2)]
    assert [child.outcome() for child in started] == ["", ""]
    return folder


def whole(rows: Rows) -> Datastore:
    return Datastore.from_features(*rows[:3], index="flat", **rows.options)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_answer_as_one(name: str, ranks: Path) -> None:
    answers = [load_file(ranks / f"answers-{rank}.safetensors") for rank in range(2)]
    rows = rows_named(name)
    store = whole(rows)

    def both(key: str) -> Tensor:
        return torch.cat([answer[f"{name}/{key}"] for answer in answers])

    assert [torch.equal(answer[f"{name}/mean"], store.mean) for answer in answers] == [True, True]
    for number, case in enumerate(cases_of(rows)):
        wanted = store.search(case.queries, case.k, case.excluded)
        found = Neighbors(*(both(f"{number}/{field}") for field in Neighbors._fields))
        for mine, theirs in zip(found, wanted, strict=True):
            assert torch.equal(mine, theirs), (number, case.k)
        excluded = None if case.excluded is None else case.excluded.numpy()
        assert_nearest(found, store, case.queries, case.k, excluded)


def test_a_mistake_of_one_rank_is_an_error_on_both(ranks: Path) -> None:
    texts = [(ranks / f"mistakes-{rank}.txt").read_text().splitlines() for rank in range(2)]
    wanted = [
        "rank 1: Expected `features` to be finite", "Expected ids that one rank has",
        "rows of one width", "shards of one mean, but", "shards of one index asked for, but",
        "shards of one index asked for, but", "rank 1: Expected",
        "rank 1: Expected `queries` to have width 5", "Expected one `k`, but got [3, 4]",
        "rank 0: Expected `k` to be a whole number",
    ]  # fmt: skip
    for text in texts:
        assert len(text) == len(wanted)
        for line, part in zip(text, wanted, strict=True):
            assert part in line


@pytest.mark.parametrize("index", [LISTS, BY_OWN_ROWS])
def test_what_two_ranks_miss_together_is_stated(index: str, ranks: Path) -> None:
    """The oracle searches all rows exactly, with other queries than were measured."""
    facts = [json.loads((ranks / f"approximate-{rank}.json").read_text())[index] for rank in (0, 1)]
    found = torch.cat(
        [load_file(ranks / f"approximate-{rank}.safetensors")[f"{index}/ids"] for rank in (0, 1)]
    )
    rows = scattered_rows()
    store = Datastore.from_features(rows.features[:MANY], rows.labels[:MANY], rows.ids)
    wanted = store.search(rows.features[MANY:], 20).ids
    recall = float((found[:, :, None] == wanted[:, None, :]).any(2).double().mean())
    stated = facts[0]["recalls"]
    assert min(stated["rows"], stated["perturbed rows"]) >= 0.9
    assert recall == pytest.approx(stated["rows"], abs=0.08)
    assert facts[0]["recall"] == stated[facts[0]["measured_on"]] == min(stated.values())
    for name in ("recalls", "recall", "measured_on"):
        assert facts[1][name] == facts[0][name]
    assert len(facts[0]["said"]) == 1
    assert f"{MANY} rows on all ranks: recall@20 {stated['rows']:.4f}" in facts[0]["said"][0]
    assert facts[1]["said"] == []  # once, not by each rank
    is_small_exact = index == BY_OWN_ROWS
    assert [fact["spec"] == "flat" for fact in facts] == [is_small_exact, False]


def test_a_rank_is_asked_about_the_queries_of_all_in_even_blocks(ranks: Path) -> None:
    """50 and 100 queries, at most 64 of a rank at once: two calls on each rank, of one length."""
    for rank in (0, 1):
        facts = json.loads((ranks / f"approximate-{rank}.json").read_text())[LISTS]
        assert facts["calls"] == [ASKED // 2, ASKED // 2]


def test_without_ranks() -> None:
    with pytest.raises(RuntimeError, match="init_process_group first"):
        ShardedDatastore(whole(rows_named("even")))
