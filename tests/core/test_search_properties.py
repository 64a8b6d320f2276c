"""Search against brute force on everything that can be drawn, and each row of "Numbers"."""

import copy
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.first_passes import FIRST_PASSES, SPACES, forced, placed
from support.oracles import assert_nearest, assert_same_store, assert_sound
from torch import Tensor

from hf_knn.core.search import Neighbors
from hf_knn.core.votes import knn_log_probs
from hf_knn.store import recall
from hf_knn.store.datastore import Datastore

Features = Tensor | NDArray
Generator = np.random.Generator

# what is drawn

CODES = "IVF4,RaBitQfs,Refine(SQfp16)"
LISTED = ("IVF4,Flat", "IVF4,SQ8", "IVF4,SQfp16", CODES)
INDEXES = ("flat", "flat", "flat", *LISTED, "HNSW8")
LISTS = 4
"""An inverted file cannot have fewer rows than this."""

EXTREMES = np.array([0, 0, 1e-45, -1e-45, 1e-30, 1, -1, 2, 1e30, -1e30])
FLOAT16_LIMIT = 6e4

VALUES: dict[str, Callable[[Generator, int, int], NDArray]] = {
    "continuous": lambda generator, count, width: generator.normal(size=(count, width)) + 0.5,
    # ties between rows that are no duplicates, and zero vectors
    "grid": lambda generator, count, width: generator.integers(-2, 3, size=(count, width)) * 1.0,
    "extreme": lambda generator, count, width: generator.choice(EXTREMES, size=(count, width)),
    "500 equal": lambda generator, count, width: np.concatenate(
        [np.ones((min(count, 500), width)), generator.normal(size=(max(0, count - 500), width))]
    ),
}

FORMS: dict[str, Callable[[NDArray], Features]] = {
    "float32": lambda rows: rows.astype(np.float32),
    "float64": lambda rows: rows,
    "float16": lambda rows: rows.clip(-FLOAT16_LIMIT, FLOAT16_LIMIT).astype(np.float16),
    "bfloat16": lambda rows: torch.from_numpy(rows).bfloat16(),
    "strided": lambda rows: torch.from_numpy(np.stack([rows, rows + 1], axis=2)).float()[:, :, 0],
    "transposed": lambda rows: torch.from_numpy(rows.T.copy()).float().T,
    # see test_one_reversed_row for the one that is not drawn
    "reversed": lambda rows: (
        np.flip(np.flip(rows).astype(np.float32)) if min(rows.shape) > 1 else rows
    ),
}

LABELS = {"one class": [3], "a class without rows": [0, 5], "classes": [0, 1, 2, 3]}
NUM_LABELS = 6

K = ("1", "some", "N", "more than N", "enormous")


def k_of(name: str, generator: Generator, count: int) -> int:
    some = int(generator.integers(1, 13))
    return {"1": 1, "N": max(1, count), "more than N": count + 1, "enormous": 10**12}.get(
        name, some
    )


@dataclass(frozen=True)
class Plan:
    """One example: a store, changes of it, searches in between, and a fault at the end."""

    seed: int
    count: int
    width: int
    space: tuple[str, str]
    values: str
    form: str
    doubled: float
    labels: str
    index: str
    first_pass: str
    k: str
    excludes: bool
    changes: list[str]
    fault: str

    @property
    def rows(self) -> int:
        """Rows at the start: as many as the values and the index need."""
        if self.values == "500 equal":
            return 500 + self.count % 50
        return max(self.count, LISTS) if self.index.startswith("IVF") else self.count

    @property
    def is_exact(self) -> bool:
        return self.index == "flat"

    def drawn(self) -> list[str]:
        """What this example covers, in the words of the tables here."""
        words = [self.values, self.form, self.labels, self.index, self.fault, *self.changes]
        words += [*self.space, f"k: {self.k}", f"N: {min(self.rows, 2)}", f"by {self.first_pass}"]
        return [*words, f"excludes: {self.excludes}", f"doubled: {self.doubled}"]


# changes, and what the rows must be after them


class Model:
    """What the store must hold: for each id a row and a label."""

    def __init__(self) -> None:
        self.rows: dict[int, NDArray] = {}
        self.labels: dict[int, int] = {}

    def take(self, store: Datastore, rows: Features, labels: NDArray, ids: NDArray) -> None:
        """Rows that were added, as the store's dtype holds them: the one cast on entry."""
        plain = torch.as_tensor(np.array(rows) if isinstance(rows, np.ndarray) else rows)
        stored = plain.to(getattr(torch, store.dtype)).double().numpy()
        self.rows |= dict(zip(ids.tolist(), stored, strict=True))
        self.labels |= dict(zip(ids.tolist(), labels.tolist(), strict=True))

    def drop(self, ids: NDArray) -> None:
        for number in ids.tolist():
            del self.rows[number], self.labels[number]

    def check(self, store: Datastore) -> None:
        ids = store.ids.tolist()
        assert sorted(ids) == sorted(self.rows)
        assert store.labels.tolist() == [self.labels[number] for number in ids]
        if ids:
            wanted = np.stack([self.rows[number] for number in ids])
            assert np.array_equal(store.features.double().numpy(), wanted)


class Run:
    """A plan that is being carried out."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.model = plan, Model()
        self.generator = np.random.default_rng(plan.seed)
        rows = self.new_rows(plan.rows)
        ids = self.generator.permutation(2000)[: len(rows)]
        self.store = self.build(rows, self.new_labels(len(rows)), ids)

    def build(self, rows: Features, labels: NDArray, ids: NDArray) -> Datastore:
        metric, normalization = self.plan.space
        store = Datastore.from_features(
            rows, labels, ids, metric, normalization, self.plan.index, min_recall=0.3
        )
        self.model.take(store, rows, labels, ids)
        return placed(store, self.plan.first_pass)

    def new_rows(self, count: int) -> Features:
        rows = VALUES[self.plan.values](self.generator, count, self.plan.width)
        copies = self.generator.uniform(size=count) < self.plan.doubled
        if self.plan.values == "extreme" and self.plan.form == "bfloat16":
            rows = rows.astype(np.float32).astype(np.float64)
        rows[copies] = rows[self.generator.integers(0, max(1, count), size=copies.sum())]
        return FORMS[self.plan.form](rows)

    def new_labels(self, count: int) -> NDArray:
        return self.generator.choice(LABELS[self.plan.labels], size=count)

    def new_ids(self, count: int) -> NDArray:
        return int(self.generator.integers(5000, 10**9)) + self.generator.permutation(count)

    def some_ids(self, share: float) -> NDArray:
        ids = self.store.ids.numpy()
        fewest = LISTS if self.plan.index.startswith("IVF") else 0
        count = min(int(share * len(ids)), len(ids) - fewest)
        return self.generator.permutation(ids)[: max(0, count)]

    def stored_rows(self, count: int) -> Tensor:
        picked = self.generator.integers(0, max(1, len(self.store)), size=count)
        return self.store.features[torch.from_numpy(picked[: len(self.store)])]

    def change(self, name: str) -> None:
        store, model = self.store, self.model
        if name in ("add", "add copies"):
            count = int(self.generator.integers(1, 30))
            rows = self.new_rows(count) if name == "add" else self.stored_rows(count)
            ids, labels = self.new_ids(len(rows)), self.new_labels(len(rows))
            if not len(rows):  # see test_nothing_added_to_a_built_store
                return
            assert store.add(rows, labels, ids).tolist() == ids.tolist()
            model.take(store, rows, labels, ids)
        elif name == "merge":
            rows = self.new_rows(8)
            other = self.build(rows, self.new_labels(8), self.new_ids(8))
            store.merge(other)
        elif name in ("remove a few", "remove most"):
            ids = self.some_ids(0.1 if name == "remove a few" else 0.8)
            store.remove(ids)
            model.drop(ids)
        elif name == "relabel":
            ids = self.some_ids(0.5)
            labels = self.new_labels(len(ids))
            store.relabel(ids, labels)
            model.labels |= dict(zip(ids.tolist(), labels.tolist(), strict=True))
        elif name == "recenter":
            store.recenter()
        else:
            with tempfile.TemporaryDirectory() as folder:
                store.save(folder)
                self.store = placed(Datastore.load(folder), self.plan.first_pass)

    def search(self) -> None:
        """Some stored rows and some new ones, against brute force."""
        store, generator = self.store, self.generator
        new = self.new_rows(2)
        plain = torch.as_tensor(np.array(new) if isinstance(new, np.ndarray) else new).double()
        near = self.stored_rows(3)
        queries = torch.cat([near.double(), plain])
        k = k_of(self.plan.k, generator, len(store))
        exclude_ids = None
        if self.plan.excludes:  # perhaps its own, one that is not there, and none
            known = [*store.ids.tolist(), 7000, -1]
            exclude_ids = generator.choice(known, size=len(queries))
        hits = store.search(queries, k, exclude_ids)
        check = assert_nearest if self.plan.is_exact else assert_sound
        check(hits, store, queries, k, exclude_ids)
        self.check_votes(hits)

    def check_votes(self, hits: Neighbors) -> None:
        """No NaN, and nothing for a class without rows: no id or label but the store's."""
        assert hits.similarities.isfinite().all()
        if not hits.ids.shape[1]:
            return
        metric = self.plan.space[0]
        log_probs = knn_log_probs(hits.similarities, hits.labels, NUM_LABELS, 0.14, metric=metric)
        assert not log_probs.isnan().any()
        has_votes = torch.nn.functional.one_hot(hits.labels, NUM_LABELS).amax(dim=1).bool()
        assert (log_probs == -torch.inf)[~has_votes].all()


CHANGES = (
    "add", "add copies", "merge", "remove a few", "remove most", "relabel", "recenter", "reload",
)  # fmt: skip


# "Numbers": what must be refused, and how


def bad_rows(run: Run, value: float) -> Tensor:
    rows = torch.ones(9, run.plan.width)
    rows[[2, 7], 0] = value
    return rows


def add(run: Run, rows: Any, labels: Any = None, ids: Any = None) -> None:
    run.store.add(rows, [0] * len(rows) if labels is None else labels, ids)


def ones(run: Run, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(*shape, run.plan.width).to(dtype)


FAULTS: dict[str, tuple[Callable[[Run], object], str]] = {
    "NaN in features": (
        lambda run: add(run, bad_rows(run, np.nan)),
        r"`features`.*finite.*rows \[2, 7\]",
    ),
    "Inf in features": (
        lambda run: add(run, bad_rows(run, -np.inf).half()),
        r"`features`.*finite.*rows \[2, 7\]",
    ),
    "NaN in a new store": (
        lambda run: Datastore.from_features(bad_rows(run, np.nan).numpy(), [0] * 9),
        r"`features`.*finite.*rows \[2, 7\]",
    ),
    "NaN query": (
        lambda run: run.store.search(bad_rows(run, np.nan), 1),
        r"`queries`.*finite.*rows \[2, 7\]",
    ),
    "Inf query": (
        lambda run: run.store.search(bad_rows(run, np.inf).double(), 1),
        r"`queries`.*finite.*rows \[2, 7\]",
    ),
    "beyond float32": (
        lambda run: add(run, bad_rows(run, 1.0).double() * 1e39),
        r"`features`.*float32's range.*rows \[0, 1, ",
    ),
    "k = 0": (lambda run: run.store.search(ones(run, 1), 0), r"`k`.*>= 1, but got 0"),
    "k negative": (lambda run: run.store.search(ones(run, 1), -7), r"`k`.*>= 1, but got -7"),
    "k no whole number": (
        lambda run: run.store.search(ones(run, 1), 2.0),  # type: ignore[arg-type]
        r"`k`.*whole number.*but got 2\.0",
    ),
    "another width of queries": (
        lambda run: run.store.search(torch.ones(1, run.plan.width + 1), 1),
        r"`queries` to have width \d+.*but got \d+",
    ),
    "another width of features": (
        lambda run: add(run, torch.ones(1, run.plan.width + 1)),
        r"`features` to have width \d+.*but got \d+",
    ),
    "another dimension": (lambda run: run.store.search(ones(run), 1), r"`queries` to be \[N, D\]"),
    "whole features": (
        lambda run: add(run, ones(run, 2, dtype=torch.int64)),
        r"`features`.*float dtype.*int64",
    ),
    "negative label": (lambda run: add(run, ones(run, 2), [0, -1]), r"`labels` to be >= 0.*-1"),
    "float label": (lambda run: add(run, ones(run, 2), [0.0, 1.0]), r"`labels`.*whole numbers"),
    "too few labels": (lambda run: add(run, ones(run, 2), [0]), r"one label.*\(2\).*got 1 labels"),
    "doubled id": (lambda run: add(run, ones(run, 2), None, [6001, 6001]), r"unique.*\[6001\]"),
    "unknown id": (lambda run: run.store.remove([6001]), r"`ids`.*does not have \[6001\]"),
    "too few exclude_ids": (
        lambda run: run.store.search(ones(run, 2), 1, [3]),
        r"`exclude_ids`.*\(2\).*got 1",
    ),
}
"""Each with what it does and what the message must say."""

WRONG_DEVICE = "no data on a device"

PLANS = st.builds(
    Plan,
    seed=st.integers(0, 2**32 - 1),
    # below about 100 rows an index is not asked: comparing with each row is faster
    count=st.sampled_from([0, 1, 2]) | st.integers(3, 60) | st.integers(120, 300),
    width=st.sampled_from([1, 2, 3, 8, 33]),
    space=st.sampled_from(SPACES),
    values=st.sampled_from(["continuous", "grid", "continuous", "grid", "extreme", "500 equal"]),
    form=st.sampled_from(list(FORMS)),
    doubled=st.sampled_from([0.0, 0.3, 1.0]),
    labels=st.sampled_from(list(LABELS)),
    index=st.sampled_from(INDEXES),
    first_pass=st.sampled_from(FIRST_PASSES),
    k=st.sampled_from(K),
    excludes=st.booleans(),
    changes=st.lists(st.sampled_from(CHANGES), max_size=3),
    fault=st.sampled_from([*FAULTS, WRONG_DEVICE]),
)

EVERYTHING = [
    *VALUES, *FORMS, *LABELS, *INDEXES, *FAULTS, WRONG_DEVICE, *CHANGES,
    *(word for space in SPACES for word in space), *(f"k: {name}" for name in K),
    *(f"N: {count}" for count in (0, 1, 2)), *(f"by {name}" for name in FIRST_PASSES),
    *(f"excludes: {value}" for value in (True, False)),
    *(f"doubled: {share}" for share in (0.0, 0.3, 1.0)),
]  # fmt: skip
"""What must have been drawn at least once, or a row of "Numbers" was not tried."""


def carry_out(plan: Plan) -> None:
    run = Run(plan)
    run.model.check(run.store)
    run.search()
    for name in plan.changes:
        run.change(name)
        run.model.check(run.store)
        run.search()
    refuse(run)
    run.search()


def refuse(run: Run) -> None:
    """The fault must be refused with the error named in "Numbers", and nothing be changed."""
    before = copy.deepcopy(run.store)
    if run.plan.fault == WRONG_DEVICE:
        meta = torch.ones(2, run.plan.width, device="meta")
        with pytest.raises((ValueError, NotImplementedError), match=r"meta"):
            run.store.search(meta, 1)
    else:
        act, message = FAULTS[run.plan.fault]
        with pytest.raises(ValueError, match=message):
            act(run)
    assert_same_store(run.store, before)


LONG = [pytest.mark.faults, pytest.mark.timeout(3600)]


# what the plans leave out


@pytest.mark.parametrize("first_pass", ["bfloat16"])
def test_a_row_longer_than_one_in_the_first_pass(first_pass: str) -> None:
    """Row 200 is nearer, but rounding the query costs it more than a row of length 1 can lose."""
    rows = torch.tensor([[15 / 16, 1 / 4]] * 200 + [[1.0, 0.0]] + [[-1.0, 0.0]] * 31)
    query = torch.tensor([[0.501444, 0.00786]], dtype=torch.float64)
    with forced(first_pass):
        store = Datastore.from_features(rows, [0] * 232, None, "l2", "none", "flat")
        assert_nearest(store.search(query, 1), store, query, 1)


@pytest.mark.parametrize(
    "first_pass",
    list(FIRST_PASSES),
)
def test_nothing_added_to_a_built_store(first_pass: str) -> None:
    rows = torch.eye(3).repeat(50, 1)
    with forced(first_pass):
        store = placed(Datastore.from_features(rows, [0] * 150), first_pass)
        wanted = store.search(rows, 2)
        assert store.add(torch.zeros(0, 3), []).shape == (0,)
        assert torch.equal(store.search(rows, 2).ids, wanted.ids)


def test_ids_beyond_the_largest_are_refused() -> None:
    store = Datastore.from_features(torch.eye(2), [0, 1], [5, 2**63 - 1])
    with pytest.raises(ValueError, match="`ids`"):
        store.add(torch.eye(2), [0, 1])


@pytest.mark.parametrize("dtype", [">f4", np.longdouble, object])
def test_other_kinds_of_numbers_are_converted_or_refused_by_name(dtype: Any) -> None:
    store = Datastore.from_features(torch.eye(2), [0, 1])
    try:
        hits = store.search(np.eye(2).astype(dtype), 2)
    except ValueError as error:
        if "`queries`" not in str(error):
            raise
    else:
        assert hits.ids.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("shape", [(1, 3), (3, 1)])
def test_one_reversed_row(shape: tuple[int, int]) -> None:
    rows = np.ones(shape, np.float32)
    turned = np.flip(rows, axis=shape.index(1))
    store = Datastore.from_features(turned, [0] * len(rows))
    assert_nearest(store.search(turned, 2), store, rows, 2)


@pytest.mark.parametrize("examples", [100, pytest.param(10_000, marks=LONG)])
def test_any_search_equals_brute_force(examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "RECALL_SAMPLE", 16)  # what is stated is not the matter here
    drawn: Counter[str] = Counter()

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(plan=PLANS)
    def check(plan: Plan) -> None:
        drawn.update(plan.drawn())
        with forced(plan.first_pass):
            carry_out(plan)

    check()
    # what few examples draw depends on the modules that are loaded: all is for the long run
    missing = set(EVERYTHING) - set(drawn)
    assert len(missing) <= (len(EVERYTHING) // 10 if examples < 1000 else 0), missing
