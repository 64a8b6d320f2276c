"""Heads compared on rows held out: the rule by hand, planted traps, and what is left alone."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_knn import Datastore, Neighbors
from hf_knn.data.splits import Fold, stratified_folds
from hf_knn.fit import LabelledRows, compare_heads
from hf_knn.fit import choice as choice_module
from hf_knn.fit.blend import Cell, TuneResult, untuned
from hf_knn.fit.choice import FIXED_CELL, HEADS, HeadChoice, HeadScore, best_of, has_too_few
from hf_knn.fit.held_out import (
    FEW_KNN_WEIGHTS,
    Answer,
    Blended,
    BlendOf,
    Fit,
    HeldOut,
    ask,
    judged_by_halves,
    parts_of,
)

CLASSES = 4
FAST = ("linear", "ridge", "lda")
"""A kernel head has thousands of features, so that it takes seconds; one test has it."""


def rows_of(count: int = 200, seed: int = 0, spread: float = 1.5) -> LabelledRows:
    """Overlapping clouds, four classes, eight dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    centres = torch.randn(CLASSES, 8, generator=torch.Generator().manual_seed(99))
    features = centres[labels] + spread * torch.randn(count, 8, generator=generator)
    return LabelledRows(features, features, labels)


def folds_of(rows: LabelledRows, count: int = 5) -> list[Fold]:
    return stratified_folds(rows.labels, count, 0, rows.groups)


def counted_searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each search asks about."""
    asked: list[int] = []
    real = Datastore.search

    def search(self: Datastore, queries: Any, *args: Any, **options: Any) -> Any:
        asked.append(len(queries))
        return real(self, queries, *args, **options)

    monkeypatch.setattr(Datastore, "search", search)
    return asked


def with_planted(monkeypatch: pytest.MonkeyPatch, name: str, plant: Fit) -> None:
    """Puts something else in the place of a head."""
    real = choice_module.fit_of

    def fit_of(head: str, *args: Any, **options: Any) -> Fit:
        return plant if head == name else real(head, *args, **options)

    monkeypatch.setattr(choice_module, "fit_of", fit_of)


def keys(features: Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in features]


# ---- the rule -----------------------------------------------------------------------------------


def score(head: str, accuracy: float, likelihood: float, weight: float = 0.5) -> HeadScore:
    best = Cell(20, 0.14, weight, accuracy, accuracy, likelihood)
    return HeadScore(head, best._replace(knn_weight=0.0), best)


def test_of_those_within_one_standard_error_the_likeliest() -> None:
    table = [score("linear", 0.80, -0.9), score("ridge", 0.78, -0.7), score("lda", 0.60, -0.1)]
    # s.e. of 0.8 on 100 rows is 0.04, on 1,000 it is 0.0126
    assert best_of(table, 100).head == "ridge"
    assert best_of(table, 1000).head == "linear"
    assert best_of([table[0], score("lda", 0.80, -0.9)], 100).head == "linear"  # the first
    better = score("lda", 0.80, -0.9)
    better = better._replace(alone=better.alone._replace(log_likelihood=-0.1))
    assert best_of([table[0], better], 100).head == "lda"  # where the neighbours speak in full


def test_the_choice_is_that_of_its_table() -> None:
    chosen = set()
    for seed, spread in ((0, 0.5), (1, 1.5), (2, 3.0)):
        rows = rows_of(240, seed, spread)
        found = compare_heads(rows, folds_of(rows), CLASSES, heads=FAST)
        assert [each.head for each in found.table] == list(FAST)
        assert found.rows == 120  # a half: thresholds are found on the other
        top = max(each.best.accuracy for each in found.table)
        error = math.sqrt(top * (1 - top) / found.rows)
        near = [each for each in found.table if each.best.accuracy >= top - error]
        likeliest = max(each.best.log_likelihood for each in near)
        equal = [each for each in near if each.best.log_likelihood == likeliest]
        assert found.head == max(equal, key=lambda each: each.alone.log_likelihood).head
        own = next(each for each in found.table if each.head == found.head)
        assert own.best[:3] == (found.result.k, found.result.temperature, found.result.knn_weight)
        assert own.alone == found.result.head
        assert found.answers is not None
        assert len(found.answers.labels) == 240
        chosen.add(found.head)
    assert chosen <= set(FAST)


def test_every_head_is_asked_about_the_same_rows() -> None:
    """Each number of the table by hand: a fit without the fold, asked about the fold."""
    rows = rows_of(120)
    folds = folds_of(rows, 3)
    found = compare_heads(rows, folds, CLASSES, heads=["ridge"], criterion="log_likelihood")
    assert found.answers is not None
    at = torch.cat([torch.from_numpy(fold.held_out) for fold in folds])
    assert torch.equal(found.answers.labels, rows.labels[at])
    first = next(iter(parts_of(rows, folds)))
    store = Datastore.from_features(first.fitted.store, first.fitted.labels)
    near = store.search(first.held_out.store, found.answers.neighbors.labels.shape[1])
    count = len(first.held_out.labels)
    assert torch.equal(found.answers.neighbors.labels[:count], near.labels)
    half, _ = found.answers.halves()
    right = half.head_log_probs.argmax(1) == half.labels
    assert found.table[0].alone.accuracy == pytest.approx(float(right.double().mean()))


def test_a_kernel_wins_where_no_plane_parts_the_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(240, 3, generator=generator), dim=1)
    labels = (directions[:, 0] * directions[:, 1] > 0).long()
    rows = LabelledRows(directions, directions, labels)
    found = compare_heads(rows, stratified_folds(labels, 2, 0), 2)
    assert [each.head for each in found.table] == list(HEADS)
    alone = {each.head: each.alone.accuracy for each in found.table}
    assert alone["kernel"] > alone["linear"] + 0.1
    assert found.head == "kernel"


def test_a_validation_set_takes_the_place_of_folds() -> None:
    rows, others = rows_of(120), rows_of(90, seed=5)
    found = compare_heads(rows, others, CLASSES, heads=["ridge", "lda"])
    assert found.answers is not None
    assert torch.equal(found.answers.labels, others.labels)
    assert found.rows == 45


# ---- nobody has seen what it is asked about ------------------------------------------------------


def test_a_head_that_remembers_what_it_saw_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is always right about rows that it was made from, and guesses about others."""

    def remember(fitted: LabelledRows) -> Answer:
        known = dict(zip(keys(fitted.head), fitted.labels.tolist(), strict=True))

        def answer(features: Tensor) -> Tensor:
            said = torch.full((len(features), CLASSES), -math.log(CLASSES))
            for row, key in enumerate(keys(features)):
                if key in known:
                    said[row] = -1e4
                    said[row, known[key]] = 0.0
            return said

        return answer

    with_planted(monkeypatch, "lda", remember)
    rows = rows_of()
    found = compare_heads(rows, folds_of(rows), CLASSES, heads=FAST)
    remembers = next(each for each in found.table if each.head == "lda")
    assert remembers.alone.accuracy < 0.5
    assert found.head != "lda"
    leaked = ask(rows, rows, {"lda": remember}, lambda some: _store(some), 5).of("lda")
    assert (leaked.head_log_probs.argmax(1) == rows.labels).all()  # the trap works


def _store(rows: LabelledRows) -> Datastore:
    return Datastore.from_features(rows.store, rows.labels)


def test_nothing_is_made_from_rows_that_it_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is fitted sees the training part: heads and the datastore, whose mean is its own."""
    rows = rows_of(60)
    folds, made = folds_of(rows, 3), []

    def watch(name: str) -> Callable[..., Any]:
        real = getattr(choice_module, name)

        def fit(*args: Any, **options: Any) -> Any:
            features = next(part for part in args if isinstance(part, Tensor))
            made.append((name, set(keys(features))))
            return real(*args, **options)

        return fit

    for name in ("fit_linear", "fit_closed"):
        monkeypatch.setattr(choice_module, name, watch(name))
    stores: list[set[bytes]] = []

    def store(some: LabelledRows) -> Datastore:
        stores.append(set(keys(some.store)))
        return _store(some)

    compare_heads(rows, folds, CLASSES, heads=FAST, store=store)
    assert len(made) == 3 * len(folds)
    assert len(stores) == len(folds)
    for number, fold in enumerate(folds):
        held_out = set(keys(rows.head[torch.from_numpy(fold.held_out)]))
        assert stores[number] == set(keys(rows.head)) - held_out
        for _, seen in made[3 * number : 3 * number + 3]:
            assert seen == stores[number]


def test_heads_are_chosen_on_one_half_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that is right on the other half alone, where thresholds are found, is not chosen."""
    rows = rows_of()
    folds = folds_of(rows)
    plain = compare_heads(rows, folds, CLASSES, heads=["ridge"])
    assert plain.answers is not None
    features = torch.cat([rows.head[torch.from_numpy(fold.held_out)] for fold in folds])
    numbered = plain.answers._replace(head_log_probs=torch.arange(len(features)).unsqueeze(1))
    _, fresh = numbered.halves()
    kept = {keys(features)[int(row)] for row in fresh.head_log_probs}
    label_of = dict(zip(keys(rows.head), rows.labels.tolist(), strict=True))

    def know_the_other_half(_: LabelledRows) -> Answer:
        def answer(asked: Tensor) -> Tensor:
            right = torch.tensor([label_of[key] for key in keys(asked)])
            wrong = torch.tensor([key not in kept for key in keys(asked)])
            said = torch.full((len(asked), CLASSES), -9.0)
            return said.scatter(1, ((right + wrong) % CLASSES).unsqueeze(1), 0.0).log_softmax(1)

        return answer

    with_planted(monkeypatch, "lda", know_the_other_half)
    found = compare_heads(rows, folds, CLASSES, heads=["lda", "ridge"])
    assert next(each for each in found.table if each.head == "lda").alone.accuracy == 0
    assert found.head == "ridge"


def test_neighbours_are_searched_once_for_all_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = counted_searches(monkeypatch)
    rows = rows_of(100)
    compare_heads(rows, folds_of(rows), CLASSES, heads=FAST)
    assert asked == [20] * 5


# ---- few labels, class weights, refused ---------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "few"),
    [([2, 2, 2, 2], True), ([3, 3, 3, 3], False), ([1, 1, 1, 1], True), ([2, 30, 30, 30], False),
     ([0, 2, 2, 3], True), ([0, 0, 3, 3], False)],
)  # fmt: skip
def test_below_three_labels_a_class_nothing_is_compared(counts: Sequence[int], few: bool) -> None:
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    assert has_too_few(labels) == few
    if few:
        features = torch.randn(len(labels), 8)
        rows = LabelledRows(features, features, labels)
        folds = [Fold(labels.numpy()[1:], labels.numpy()[:1])]
        found = compare_heads(rows, folds, 4)
        fixed = FIXED_CELL if max(counts) == 1 else None
        assert (found.head, found.fixed, found.table) == ("ridge", fixed, ())
        assert ("(leave-one-out)" in found.say()) == (fixed is None)
        assert (found.result.k, found.result.temperature, found.result.knn_weight) == (20, 0.14, 0)
        assert "Too few labels" in found.say()
        assert "the head answers alone (λ = 0)" in found.result.say("rows held out")


def test_few_labels_fix_k_and_temperature_but_not_head_and_weight() -> None:
    rows = rows_of(4 * 8, spread=0.5)
    found = compare_heads(rows, folds_of(rows), CLASSES, heads=FAST)
    assert (found.result.k, found.result.temperature) == (20, 0.14)
    assert {cell.knn_weight for cell in found.result.table} == set(FEW_KNN_WEIGHTS)
    assert len(found.table) == 3
    fixed = compare_heads(rows, folds_of(rows), CLASSES, heads=FAST, criterion="fixed")
    assert (fixed.result.criterion, fixed.result.knn_weight) == ("fixed", 0.5)


def test_without_rows_to_hold_out_nothing_is_compared() -> None:
    rows = rows_of(40)
    choice = compare_heads(rows, [], CLASSES)
    assert (choice.head, choice.fixed, choice.table) == ("ridge", None, ())


def test_a_kernel_is_left_out_where_classes_are_weighted() -> None:
    rows = rows_of(80)
    heads = ["ridge", "kernel"]
    found = compare_heads(rows, folds_of(rows, 2), CLASSES, heads=heads, class_weighting="inverse")
    assert [each.head for each in found.table] == ["ridge"]
    assert list(found.left_out) == ["kernel"]
    assert found.as_json()["left_out"] == {"kernel": "it takes no class weights"}


def test_what_is_no_head_to_compare_is_refused() -> None:
    rows = rows_of(40)
    with pytest.raises(ValueError, match=r"'linear', 'ridge', 'kernel', 'lda'.*\['mlp'\]"):
        compare_heads(rows, folds_of(rows), CLASSES, heads=["mlp"])


def test_groups_stay_on_one_side_of_the_halves() -> None:
    rows = rows_of(120)._replace(groups=torch.arange(120) // 6)
    found = compare_heads(rows, folds_of(rows), CLASSES, heads=["ridge"])
    assert found.answers is not None
    first, second = found.answers.halves()
    assert first.groups is not None
    assert second.groups is not None
    assert not set(first.groups.tolist()) & set(second.groups.tolist())


def test_a_choice_says_what_it_is() -> None:
    alone = score("ridge", 0.8, -0.5, weight=0.0)
    found = HeadChoice("ridge", (alone, score("lda", 0.7, -0.9)), 50)
    assert found.say() == "Best of 2 heads on 50 rows held out: ridge alone."
    report = found.as_json()
    assert report["chosen"] == "ridge"
    assert report["table"][1]["with_neighbors"]["knn_weight"] == 0.5


def test_nothing_that_a_half_is_judged_by_has_seen_it() -> None:
    """Labels of one half that are changed leave what is said of the other half as it was."""
    near = Neighbors(torch.rand(20, 4), torch.arange(80).view(20, 4) % 3, torch.zeros(20, 4).long())
    generator = torch.Generator().manual_seed(0)
    said = {
        head: torch.randn(20, 3, generator=generator).mul(scale).log_softmax(1)
        for head, scale in (("sure", 4.0), ("unsure", 0.2))
    }
    labels = torch.arange(20) % 3
    seen: list[Tensor] = []

    def choose(heads: Mapping[str, HeldOut]) -> tuple[str, TuneResult]:
        right = {name: rows.head_log_probs.argmax(1) == rows.labels for name, rows in heads.items()}
        seen.append(next(iter(heads.values())).labels)
        best = max(right, key=lambda name: float(right[name].double().mean()))
        return best, replace(untuned(), knn_weight=float(right[best].double().mean()))

    def judged(labels: Tensor) -> Blended:
        heads = {name: HeldOut(near, rows, labels) for name, rows in said.items()}
        return judged_by_halves(heads, choose, BlendOf(3))

    plain = judged(labels)
    first, second = HeldOut(near, torch.arange(20).unsqueeze(1), labels).halves()
    changed = labels.clone()
    changed[second.head_log_probs[:, 0]] += 1
    other = judged(changed % 3)
    assert torch.equal(plain.log_probs[:10], other.log_probs[:10])  # by what the first half chose
    assert not torch.equal(plain.log_probs[10:], other.log_probs[10:])
    assert torch.equal(plain.labels, torch.cat([second.labels, first.labels]))
    assert [len(rows) for rows in seen] == [10] * 4


def test_what_the_first_half_chose_is_not_chosen_again() -> None:
    near = Neighbors(torch.rand(20, 1), torch.zeros(20, 1).long(), torch.zeros(20, 1).long())
    rows = HeldOut(near, torch.randn(20, 2).log_softmax(1), torch.arange(20) % 2)
    asked: list[Tensor] = []

    def choose(heads: Mapping[str, HeldOut]) -> tuple[str, TuneResult]:
        asked.append(heads["ridge"].labels)
        return "ridge", replace(untuned(), knn_weight=0.0)

    known = "ridge", replace(untuned(), knn_weight=0.0)
    judged = judged_by_halves({"ridge": rows}, choose, BlendOf(2), known)
    plain = judged_by_halves({"ridge": rows}, choose, BlendOf(2))
    assert torch.equal(judged.log_probs, plain.log_probs)
    assert [len(labels) for labels in asked] == [10, 10, 10]
    assert torch.equal(asked[0], rows.halves()[1].labels)


@pytest.mark.parametrize("count", [1, 2])
def test_the_fewest_rows_are_judged(count: int) -> None:
    near = Neighbors(
        torch.rand(count, 1), torch.zeros(count, 1).long(), torch.zeros(count, 1).long()
    )
    rows = HeldOut(near, torch.zeros(count, 2).log_softmax(1), torch.zeros(count).long())
    judged = judged_by_halves(
        {"ridge": rows}, lambda heads: (next(iter(heads)), untuned()), BlendOf(2)
    )
    assert judged.log_probs.shape == ((0, 2) if count == 1 else (2, 2))
