"""Why a blend gains: both decompositions are identities, and each term is said beside the gain."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import permutation_test, spearmanr
from sklearn.metrics import log_loss
from support.benchmark_cells import Plan, terms, write_run

from reporting.cells import Results, load_results
from reporting.complement import (
    PREDICTORS,
    complement_line,
    complement_section,
    complements_of,
)
from reporting.document import Figures, Grid
from reporting.statistics import permuted_correlation
from study.arms import Arm, mixed
from study.cells import FLOOR
from study.terms import terms_of


def voice(rows: int, classes: int, seed: int, spread: float) -> Arm:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return Arm(None, logits.log_softmax(1), {})


def labels_of(rows: int, classes: int) -> torch.Tensor:
    return torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(9))


@settings(deadline=None, max_examples=40)  # a busy machine is no defect
@given(st.integers(1, 60), st.integers(2, 9), st.integers(0, 5), st.floats(0.1, 8), st.floats(0, 1))
def test_both_decompositions_are_identities(rows, classes, seed, spread, weight):
    labels = labels_of(rows, classes)
    found = terms_of(
        mixed(voice(rows, classes, seed, spread), voice(rows, classes, seed + 1, 2.0), weight),
        labels,
    )
    mean_of_voices = (1 - weight) * found["error_first"] + weight * found["error_second"]
    assert mean_of_voices - found["error"] == pytest.approx(found["ambiguity"], abs=1e-12)
    price = weight * (found["error_second"] - found["error_first"])
    gain_over_head = found["error_first"] - found["error"]
    assert gain_over_head == pytest.approx(found["ambiguity"] - price, abs=1e-12)
    assert found["log_gain"] == pytest.approx(found["log_gain_measured"], abs=1e-12)


def test_terms_are_those_of_numpy_and_scikit_learn():
    labels = labels_of(50, 4)
    first, second = voice(50, 4, 0, 1.0), voice(50, 4, 1, 3.0)
    found = terms_of(mixed(first, second, 0.4), labels)
    answers = [arm.test.exp().numpy() for arm in (first, second)]
    assert found == pytest.approx(terms(answers[0], answers[1], 0.4, labels.numpy()))
    losses = [
        log_loss(labels, p, labels=range(4))
        for p in (answers[0], 0.6 * answers[0] + 0.4 * answers[1])
    ]
    assert found["log_gain"] == pytest.approx(losses[0] - losses[1])


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_voice_alone_has_no_ambiguity(weight):
    labels = labels_of(30, 3)
    found = terms_of(mixed(voice(30, 3, 0, 1.0), voice(30, 3, 1, 1.0), weight), labels)
    assert found["ambiguity"] == 0
    assert found["error"] == pytest.approx(found["error_second" if weight else "error_first"])
    assert found["disagreement"] > 0


def test_a_class_without_a_vote_costs_what_the_floor_says():
    silent = Arm(None, torch.tensor([[0.0, -torch.inf]], dtype=torch.float64), {})
    sure = Arm(None, torch.tensor([[-torch.inf, 0.0]], dtype=torch.float64), {})
    own = torch.tensor([1])
    for weight, wanted in ((0.5, np.log(0.5 / FLOOR)), (1.0, np.log(1 / FLOOR)), (0.0, 0.0)):
        found = terms_of(mixed(silent, sure, weight), own)
        assert found["log_gain"] == pytest.approx(wanted)
        assert found["log_gain_measured"] == pytest.approx(wanted)
    found = terms_of(mixed(sure, silent, 1.0), own)
    assert found["log_gain"] == pytest.approx(np.log(FLOOR)) == found["log_gain_measured"]


# ---- the report ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    protocols = ("knn", "complementarity", "lowdata", "heads", "lowdata_heads")
    plan = Plan(protocols=protocols, seeds=(0, 1), shots=(1, 4))
    return load_results(write_run(tmp_path_factory.mktemp("run") / "results", plan))


def test_every_head_beside_the_neighbours_counts_once(results):
    found = complements_of(results)
    keys = [(c.setting.pair, c.setting.shots, c.voice) for c in found]
    assert len(keys) == len(set(keys)) == 4 * 3 * 4  # pairs, numbers of pictures, heads
    for c in found:  # the linear head is that of the protocols that have no other
        own = {"linear": ("complementarity", "lowdata")}.get(c.voice, ("heads", "lowdata_heads"))
        assert c.setting.protocol in own
        assert c.measured == pytest.approx(c.ambiguity, abs=1e-12)
        blend = "blend" if c.voice == "linear" else f"blend:{c.voice}+knn"
        head = "head" if c.voice == "linear" else c.voice
        cells = results.settings()[c.setting]
        gains = [x.correct(blend).mean() - x.correct(head).mean() for x in cells]
        assert c.gain == pytest.approx(np.mean(gains))


def test_results_without_terms_have_no_such_section(results, tmp_path):
    plain = load_results(write_run(tmp_path / "run", Plan(protocols=("linear",), seeds=(0,))))
    assert complement_section(plain).blocks == []
    assert complement_line(plain) == ""


def test_the_section_says_terms_beside_what_was_measured(results):
    blocks = complement_section(results).blocks
    groups, predictors, each = (block for block in blocks if isinstance(block, Grid))
    assert [row[0] for row in groups.rows] == [
        "1 per class", "4 per class", "all pictures", "head: linear", "head: ridge",
        "head: kernel", "head: shrinkage LDA",
    ]  # fmt: skip
    for row in (*groups.rows, *each.rows):
        assert row[3] == row[4]  # the ambiguity and the gain that was measured
        assert row[6] == row[7]
    assert [row[0] for row in predictors.rows] == list(PREDICTORS)
    found = complements_of(results)
    rho = spearmanr([c.ambiguity for c in found], [c.gain for c in found]).statistic
    assert float(predictors.rows[0][1].replace("\u2212", "-")) == pytest.approx(rho, abs=0.005)
    assert predictors.rows[0][1] in complement_line(results)
    (figures,) = (block for block in blocks if isinstance(block, Figures))
    assert figures.figures[0].alt.count("settings, mean") == 4


def test_a_permutation_p_is_that_of_scipy():
    rng = np.random.default_rng(0)
    first = rng.normal(size=12)
    second = 0.5 * first + rng.normal(size=12)
    rho, p = permuted_correlation(first.tolist(), second.tolist())
    wanted = permutation_test(
        (second,), lambda y: spearmanr(first, y).statistic, permutation_type="pairings",
        n_resamples=9_999, rng=np.random.default_rng(1),
    )  # fmt: skip
    assert rho == pytest.approx(wanted.statistic)
    assert p == pytest.approx(wanted.pvalue, abs=0.02)
    assert permuted_correlation([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8])[1] < 0.001
    assert permuted_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])[1] != 0
