"""The heads that `--head auto` chooses among: on made-up features, and in a report."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from support.benchmark_cells import Plan, write_run
from support.made_up_study import study_of

from hf_knn import blend_log_probs, knn_log_probs
from hf_knn.fit import LabelledRows, compare_heads, fit_closed, fit_linear
from reporting.cells import Results, load_results
from reporting.document import Grid
from reporting.heads import (
    FEW_BEST,
    HEADS,
    auto_line,
    blend_line,
    choices_of,
    few_line,
    head_blocks,
)
from study.arms_of import Split, Voices
from study.heads import measure_heads
from study.pool import Rows

CLASSES = 4


def rows(count: int, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    features = 2 * torch.eye(CLASSES, 12)[labels] + torch.randn(count, 12, generator=generator)
    return Rows(features.relu(), features.relu(), labels)


@pytest.fixture(scope="module")
def voices() -> Voices:
    return Voices(Split(rows(96, 0), rows(80, 1), rows(120, 2)), CLASSES, 0)


def labelled(part: Rows) -> LabelledRows:
    return LabelledRows(part.head, part.store, part.labels)


def test_every_head_is_measured_alone_and_beside_the_neighbours(voices):
    arms = measure_heads(voices)
    voiced = (*HEADS, "trials")
    assert set(arms) == {*voiced, "knn", "auto", *(f"blend:{head}+knn" for head in voiced)}
    assert torch.equal(arms["trials"].test, voices.head.test)
    labels = voices.split.test.labels
    for name, arm in arms.items():
        total = arm.test.double().exp().sum(1)
        assert torch.allclose(total, torch.ones_like(total), atol=1e-4), name
        assert accuracy_score(labels, arm.test.argmax(1)) > 0.5, name


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_and_its_blend_are_those_of_the_package(kind, voices):
    train, validation, test = voices.split
    arms = measure_heads(voices)
    if kind == "linear":
        answer = fit_linear(train.head, train.labels, CLASSES, seed=0).log_probs
    else:
        answer = fit_closed(kind, train.head, train.labels, CLASSES, seed=0).log_probs
    assert torch.equal(arms[kind].test, answer(test.head))
    choice = compare_heads(labelled(train), labelled(validation), CLASSES, seed=0)
    cell = next(score.best for score in choice.table if score.head == kind)
    near = voices.store.search(test.store, max(1, cell.k))
    votes = knn_log_probs(near.similarities, near.labels, CLASSES, cell.temperature)
    wanted = blend_log_probs(arms[kind].test, votes, cell.knn_weight)
    torch.testing.assert_close(arms[f"blend:{kind}+knn"].test, wanted)


def test_auto_answers_as_the_head_that_was_chosen(voices):
    train, validation, _ = voices.split
    choice = compare_heads(labelled(train), labelled(validation), CLASSES, seed=0)
    assert choice.result is not None
    arms = measure_heads(voices)
    auto = arms["auto"]
    assert (auto.chosen["head"], auto.chosen["knn_weight"]) == (
        choice.head, choice.result.knn_weight,
    )  # fmt: skip
    torch.testing.assert_close(auto.test, arms[f"blend:{choice.head}+knn"].test)


@pytest.mark.parametrize("shots", [1, 2])
def test_with_one_or_two_pictures_nothing_is_compared(shots):
    voices = study_of(1.0).few_voices(0, shots)
    auto = measure_heads(voices)["auto"]
    train, _, test = voices.split
    choice = compare_heads(labelled(train), voices.folds, CLASSES)
    assert (auto.chosen["head"], choice.table) == ("ridge", ())
    fit = fit_closed("ridge", train.head, train.labels, CLASSES, cell=choice.fixed, seed=0)
    cell = choice.result
    near = voices.store.search(test.store, cell.k)
    votes = knn_log_probs(near.similarities, near.labels, CLASSES, cell.temperature)
    wanted = blend_log_probs(fit.log_probs(test.head), votes, cell.knn_weight)
    torch.testing.assert_close(auto.test, wanted)


@pytest.mark.parametrize("shots", [2, 8])
def test_no_head_is_chosen_on_the_test_pictures(shots):
    found = [
        measure_heads(study_of(1.0, shuffle_test=shuffled).few_voices(3, shots))
        for shuffled in (False, True)
    ]
    for name, arm in found[0].items():
        assert arm.chosen == found[1][name].chosen
        assert torch.equal(arm.test, found[1][name].test)


# ---- the report ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    backbones = ("efficientnet-lite0", "efficientnet-lite1", "tiny-vit")
    plan = Plan(
        tasks=("digits", "glyphs"), backbones=backbones, seeds=(0, 1, 2), shots=(1, 4),
        protocols=("heads", "lowdata_heads"), extra_strength={"blend:lda+knn": -2.0},
    )  # fmt: skip
    return load_results(write_run(tmp_path_factory.mktemp("run") / "results", plan))


def top1(cells, arm: str) -> float:
    return float(np.mean([cell.correct(arm).mean() for cell in cells]))


def number(text: str) -> float:
    return float(text.replace("\u2212", "-"))


def test_auto_is_compared_with_the_best_arm_of_each_setting(results):
    means, choices, blends = (b for b in head_blocks(results, "heads") if isinstance(b, Grid))
    settings = list(results.settings("heads").values())
    arms = [arm for arm in settings[0][0].arms if arm != "auto"]
    best = np.mean([max(top1(cells, arm) for arm in arms) for cells in settings])
    auto = np.mean([top1(cells, "auto") for cells in settings])
    always = np.mean([top1(cells, "blend:ridge+knn") for cells in settings])
    assert list(means.columns[-2:]) == ["earlier three", "all"]
    by_name = {row[0]: row for row in means.rows}
    for other, value in (("best arm", best), ("(ridge + k-NN)", always)):
        shown = number(by_name[f"auto \u2212 {other}"][-1])
        assert shown == pytest.approx(100 * (auto - value), abs=6e-3)
    earlier = [c for c in settings if c[0].setting.backbone != "efficientnet-lite1"]
    assert number(by_name["auto"][-2]) == pytest.approx(
        100 * np.mean([top1(cells, "auto") for cells in earlier]), abs=0.051
    )
    line = auto_line(results)
    assert f"Auto reaches {100 * auto:.1f} % on average over 6 settings:" in line
    assert "over 4 settings of the three backbones of earlier reports" in line
    counts = choices_of(settings)
    assert (counts["kernel"], counts["ridge"]) == (12, 6)
    assert "Of 18 splits it chose ridge 6, kernel 12; in 12 with neighbours" in line
    assert [row[-1] for row in choices.rows] == ["0", "6", "12", "0", "12 of 18", "0.33"]
    assert len(blends.rows) == len(HEADS)


def test_few_pictures_are_compared_at_every_number_of_them(results):
    line = few_line(results)
    for shots in (1, 4):
        found = results.settings("lowdata_heads").items()
        some = [cells for setting, cells in found if setting.shots == shots]
        auto = np.mean([top1(cells, "auto") for cells in some])
        average = max(np.mean([top1(cells, arm) for cells in some]) for arm in FEW_BEST)
        each = np.mean([max(top1(cells, arm) for arm in FEW_BEST) for cells in some])
        gaps = [f"{100 * gap:+.2f}".replace("-", "\u2212") for gap in (auto - average, auto - each)]
        assert f"{gaps[0]} / {gaps[1]} at {shots}" in line


def test_a_blend_below_the_better_voice_is_found(results):
    line = blend_line(results)
    assert "(shrinkage LDA, " in line
    assert "of 12 pairs of a head and a number of pictures" in line
    blends = head_blocks(results, "lowdata_heads")[-1]
    assert isinstance(blends, Grid)
    assert {(HEADS.index("lda"), column) for column in (1, 2)} <= blends.bad
    settings = list(results.settings("lowdata_heads").values())
    gaps = [
        top1(c, "blend:lda+knn") - max(top1(c, "lda"), top1(c, "knn"))
        for c in settings if c[0].setting.shots == 4
    ]  # fmt: skip
    shown = number(blends.rows[HEADS.index("lda")][2])
    assert shown == pytest.approx(100 * np.mean(gaps), abs=6e-3)


def test_results_of_before_say_nothing_of_heads(tmp_path):
    plain = load_results(write_run(tmp_path / "run", Plan(protocols=("linear",), seeds=(0,))))
    assert head_blocks(plain, "heads") == []
    assert auto_line(plain) == few_line(plain) == blend_line(plain) == ""
