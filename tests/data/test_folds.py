import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedKFold

from hf_knn.data.splits import few_rows, few_shots, split_rows, stratified_folds

LABELS = torch.tensor([0] * 30 + [1] * 17 + [2] * 9 + [3])


def test_folds_are_those_of_scikit_learn():
    usable = LABELS[:-1]
    wanted = StratifiedKFold(4, shuffle=True, random_state=3).split(usable, usable)
    for fold, (fitted, held_out) in zip(stratified_folds(usable, 4, 3), wanted, strict=True):
        np.testing.assert_array_equal(fold.fitted, fitted)
        np.testing.assert_array_equal(fold.held_out, held_out)


def test_each_row_is_held_out_once_and_a_lone_one_never():
    folds = stratified_folds(LABELS, 5, 0)
    held_out = np.sort(np.concatenate([fold.held_out for fold in folds]))
    np.testing.assert_array_equal(held_out, np.arange(len(LABELS) - 1))
    for fold in folds:
        assert len(LABELS) - 1 in fold.fitted
        assert not set(fold.fitted) & set(fold.held_out)


@given(
    pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), min_size=2, max_size=80),
    count=st.integers(2, 6),
    seed=st.integers(0, 50),
)
@settings(max_examples=150, deadline=None)
def test_a_group_is_never_on_both_sides(pairs, count, seed):
    labels, groups = (torch.tensor(column) for column in zip(*pairs, strict=True))
    owners = {label: {g for own, g in pairs if own == label} for label, _ in pairs}
    if max(map(len, owners.values())) < 2:
        with pytest.raises(ValueError, match="at least two groups"):
            stratified_folds(labels, count, seed, groups)
        return
    splits = [*stratified_folds(labels, count, seed, groups), split_rows(labels, 0.3, seed, groups)]
    for fold in splits:
        assert not set(groups[fold.fitted].tolist()) & set(groups[fold.held_out].tolist())
        # what is held out can be answered
        assert set(labels[fold.held_out].tolist()) <= set(labels[fold.fitted].tolist())
    seen = np.concatenate([fold.held_out for fold in splits[:-1]])
    assert len(seen) == len(set(seen.tolist()))


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.8])
def test_a_share_of_many_groups_is_met_about(share):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (600,), generator=generator)
    groups = torch.randint(0, 120, (600,), generator=generator)
    fold = split_rows(labels, share, 0, groups)
    assert len(fold.fitted) + len(fold.held_out) == 600
    assert len(fold.held_out) / 600 == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("seed", range(5))
def test_shots_are_nested_and_as_many_as_asked(seed):
    before: set[int] = set()
    for shots in (1, 2, 4, 8, 16):
        rows = few_shots(LABELS, shots, seed)
        counts = torch.bincount(LABELS[rows], minlength=4).tolist()
        assert counts == [min(shots, size) for size in (30, 17, 9, 1)]
        assert before <= set(rows.tolist())
        before = set(rows.tolist())


@pytest.mark.parametrize("seed", range(5))
def test_fractions_are_nested_and_leave_no_class_out(seed):
    before: set[int] = set()
    for fraction in (0.01, 0.1, 0.25, 0.5, 1.0):
        rows = few_rows(LABELS, fraction, seed)
        counts = torch.bincount(LABELS[rows], minlength=4).tolist()
        assert counts == [max(1, round(fraction * size)) for size in (30, 17, 9, 1)]
        assert before <= set(rows.tolist())
        before = set(rows.tolist())
    assert len(before) == len(LABELS)


def test_another_seed_chooses_others():
    assert set(few_shots(LABELS, 4, 0).tolist()) != set(few_shots(LABELS, 4, 1).tolist())
    np.testing.assert_array_equal(few_shots(LABELS, 4, 1), few_shots(LABELS, 4, 1))


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_a_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match=r"`fraction`.*\(0, 1\]"):
        few_rows(LABELS, fraction, 0)


def test_no_shots():
    with pytest.raises(ValueError, match=r"`shots`.*>= 1"):
        few_shots(LABELS, 0, 0)
