"""Heads trained together against plain loops with torch.optim, and scikit-learn's optimum."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from support.probe_rows import clusters, votes
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup

from hf_knn.core.backbone import KnnHead
from hf_knn.fit import sweep as probe
from hf_knn.fit.grids import ProbeConfig, ProbeGrid, ProbeSettings
from hf_knn.fit.sweep import (
    Layer,
    ProbeChoice,
    ProbeHeads,
    choose_probe,
    initial_layers,
    score_probes,
    train_probes,
)
from hf_knn.fit.weights import class_weights, loss_factors

INF = math.inf


def plain_loop(
    features: Tensor,
    labels: Tensor,
    classes: int,
    config: ProbeConfig,
    settings: ProbeSettings,
    factors: Tensor | None = None,
) -> nn.Module:
    """One head by modules, autograd, torch.optim and the schedule of transformers."""
    standard = KnnHead(features.shape[1], classes)
    standard.standardize(features)
    inputs = (features - standard.mean) / standard.scale
    start = train_probes(
        features, labels, classes, [config._replace(alpha=0, gamma=0)],
        ProbeSettings(
            epochs=0, hidden_layers=settings.hidden_layers, hidden_width=settings.hidden_width,
            seed=settings.seed,
        ),
    )  # fmt: skip
    head = as_module(start)
    size = min(settings.batch_size, len(labels))
    rate = config.learning_rate
    if settings.rate_batch:
        rate = rate * size / settings.rate_batch
    options: dict[str, Any] = {"lr": rate, "weight_decay": config.weight_decay}
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(head.parameters(), **options)
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(head.parameters(), momentum=settings.momentum, **options)
    per_epoch = math.ceil(len(labels) / size)
    schedule: LambdaLR = get_cosine_schedule_with_warmup(
        optimizer, round(settings.warmup_epochs * per_epoch), settings.epochs * per_epoch
    )
    weights = class_weights(labels, classes, settings.class_weighting)[labels]
    weights = weights if factors is None else weights * factors
    for epoch in range(settings.epochs):
        generator = torch.Generator().manual_seed(settings.seed * 2**20 + 2 + epoch)
        for batch in torch.randperm(len(labels), generator=generator).split(size):
            losses = nn.functional.cross_entropy(
                head(inputs[batch]), labels[batch], reduction="none",
                label_smoothing=settings.label_smoothing,
            )  # fmt: skip
            optimizer.zero_grad()
            (weights[batch] * losses).mean().backward()
            optimizer.step()
            schedule.step()
    return head


def as_module(heads: ProbeHeads) -> nn.Sequential:
    """The first head as modules on standardised features."""
    modules: list[nn.Module] = []
    for weight, bias in heads.layers:
        linear = nn.Linear(weight.shape[2], weight.shape[1])
        linear.weight.data.copy_(weight[0])
        linear.bias.data.copy_(bias[0])
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def assert_same_head(heads: ProbeHeads, index: int, module: nn.Module, atol: float = 1e-6) -> None:
    found = [part[0] for layer in heads.select(index).layers for part in layer]
    wanted = list(module.parameters())
    assert len(found) == len(wanted)
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other.detach(), rtol=1e-5, atol=atol)


# one head is a plain loop


@pytest.mark.parametrize("hidden_layers", [0, 1, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1, "class_weighting": "inverse_sqrt"},
        {"batch_size": 1000, "rate_batch": 64},
        {"batch_size": 32, "rate_batch": 64, "warmup_epochs": 0, "seed": 5},
        {"warmup_epochs": 1.5, "momentum": 0.5, "class_weighting": "inverse"},
    ],
)
def test_one_head_equals_a_plain_loop(
    options: dict[str, Any], optimizer: str, hidden_layers: int
) -> None:
    features, labels = clusters()
    values: dict[str, Any] = {"epochs": 8, "batch_size": 20, "warmup_epochs": 2} | options
    values["hidden_width"] = 9 if hidden_layers else None
    settings = ProbeSettings(optimizer=optimizer, hidden_layers=hidden_layers, **values)
    # a class without rows; AdamW would blow up what its gradients lack to 0 by rounding
    classes = 5 if optimizer == "sgd" else 4
    config = ProbeConfig(0.1 if optimizer == "sgd" else 0.01, 0.01)
    heads = train_probes(features, labels, classes, [config], settings)
    module = plain_loop(features, labels, classes, config, settings)
    assert_same_head(heads, 0, module)
    standard = KnnHead(7, classes)
    standard.standardize(features)
    torch.testing.assert_close(heads.mean, standard.mean)
    torch.testing.assert_close(heads.scale, standard.scale)
    with torch.no_grad():
        wanted = module((features - standard.mean) / standard.scale)
    torch.testing.assert_close(heads.logits(features)[0], wanted, rtol=1e-4, atol=1e-4)
    assert heads.logits(features).shape == (1, 90, classes)


@pytest.mark.parametrize("normalize", ["none", "mean"])
@pytest.mark.parametrize("control", ["none", "shuffled", "constant"])
@pytest.mark.parametrize(("alpha", "gamma"), [(0.3, 0.0), (0.0, 2.0), (0.1, 0.5)])
def test_a_reweighted_head_equals_a_plain_loop(
    alpha: float, gamma: float, control: str, normalize: str
) -> None:
    features, labels = clusters()
    settings = ProbeSettings(
        epochs=6, batch_size=25, warmup_epochs=1, knn_loss_clamp=5.0, knn_loss_normalize=normalize,
        class_weighting="inverse",
    )  # fmt: skip
    config = ProbeConfig(0.1, 1e-3, alpha, gamma, control)
    log_probs = votes(labels)
    # the formulas of method.md 4 on plain probabilities
    probs = log_probs.exp()
    factors = (1 + alpha * (-log_probs).clamp(max=5)) * (1 - probs) ** gamma
    if normalize == "mean":
        factors = factors / factors.mean()
    if control == "constant":
        factors = torch.full_like(factors, float(factors.mean()))
    found = loss_factors(log_probs, config, settings)
    torch.testing.assert_close(found.sort().values, factors.sort().values)
    if control == "shuffled":
        assert (found != factors).sum() > 70
        factors = found
    torch.testing.assert_close(found, factors)
    heads = train_probes(features, labels, 4, [config], settings, log_probs)
    assert_same_head(heads, 0, plain_loop(features, labels, 4, config, settings, factors))


# many heads are as many single ones


@pytest.mark.parametrize("hidden_layers", [0, 1])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_each_head_comes_out_as_alone(
    optimizer: str, hidden_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = clusters()
    grid = ProbeGrid((0.003, 0.03), (0.0, 0.1), (0.0, 0.2), (0.0, 1.0), ("none", "shuffled"))
    settings = ProbeSettings(
        epochs=5, batch_size=32, warmup_epochs=1, optimizer=optimizer, hidden_layers=hidden_layers
    )
    log_probs = votes(labels)
    heads = train_probes(features, labels, 4, grid, settings, log_probs)
    configs = grid.configs()
    assert heads.configs == configs
    assert len(heads) == len(configs) == 2 * 2 * (1 + 2 + 2 + 2)
    logits = heads.logits(features)
    for i in (0, 5, 17, len(configs) - 1):
        alone = train_probes(features, labels, 4, [configs[i]], settings, log_probs)
        for mine, other in zip(heads.select(i).layers, alone.layers, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
        assert alone.configs == heads.select(i).configs == [configs[i]]
        torch.testing.assert_close(heads.select(i).logits(features)[0], logits[i])
    differ = itertools.pairwise(logits)
    assert all((a - b).abs().max() > 1e-4 for a, b in differ)  # every option does something
    monkeypatch.setattr(probe, "_LARGEST_CHUNK", 3000)  # a few heads at a time
    monkeypatch.setattr(probe, "_LARGEST_BLOCK", 200)
    monkeypatch.setattr(probe, "_ROW_BLOCK", 10)
    parts = train_probes(features, labels, 4, grid, settings, log_probs)
    torch.testing.assert_close(parts.logits(features), logits, rtol=1e-4, atol=1e-4)


def test_many_heads_are_split_by_memory() -> None:
    head = initial_layers(384, 1000, ProbeSettings(), torch.device("cpu"))
    chunks = probe._chunks(128, head, 2048, ProbeSettings())
    assert [i for chunk in chunks for i in chunk] == list(range(128))
    assert len(chunks) > 1
    assert max(len(c) for c in chunks) * (3 * 385_000 + 3 * 2048 * 1000) <= probe._LARGEST_CHUNK


def test_the_same_call_gives_the_same_heads() -> None:
    features, labels = clusters()
    grid = ProbeGrid((0.1, 0.01), alphas=(0.1,), controls=("shuffled",))
    settings = ProbeSettings(epochs=3, batch_size=16, hidden_layers=1)
    first = train_probes(features, labels, 4, grid, settings, votes(labels))
    torch.rand(7)  # the global generator does not matter
    again = train_probes(features, labels, 4, grid, settings, votes(labels))
    assert torch.equal(first.logits(features), again.logits(features))
    for seed in (1, -1):
        other = ProbeSettings(epochs=3, batch_size=16, hidden_layers=1, seed=seed)
        heads = train_probes(features, labels, 4, grid, other, votes(labels))
        assert not torch.equal(first.logits(features), heads.logits(features))


def test_callers_modes_do_not_matter() -> None:
    features, labels = clusters()
    settings = ProbeSettings(epochs=3, hidden_layers=1)
    plain = train_probes(features, labels, 4, ProbeGrid((0.1,)), settings)
    with torch.inference_mode(), torch.autocast("cpu"):
        inside = train_probes(features, labels, 4, ProbeGrid((0.1,)), settings)
    tracked = train_probes(features.requires_grad_(), labels, 4, ProbeGrid((0.1,)), settings)
    for heads in (inside, tracked):
        torch.testing.assert_close(heads.layers, plain.layers)
        assert not heads.layers[0].weight.requires_grad
    low = train_probes(features.detach().half(), labels, 4, ProbeGrid((0.1,)), settings)
    same = train_probes(features.detach().half().float(), labels, 4, ProbeGrid((0.1,)), settings)
    torch.testing.assert_close(low.layers, same.layers)


# the optimum


def test_a_converged_head_is_the_logistic_regression() -> None:
    features, labels = clusters(200, 6, 3)
    # sklearn minimises C * sum of CE + ||W||^2 / 2 without a penalty of the intercept; ours is the
    # mean of CE + decay / 2 * (||W||^2 + ||b||^2), so decay = 1 / (C N) and the intercept is a
    # weight of a column of ones
    decay = 0.02
    settings = ProbeSettings(epochs=400, batch_size=1000, warmup_epochs=5)
    heads = train_probes(features, labels, 3, [ProbeConfig(1.0, decay)], settings)
    inputs = ((features - heads.mean) / heads.scale).double().numpy()
    with_ones = np.hstack([inputs, np.ones((200, 1))])
    model = LogisticRegression(C=1 / (decay * 200), fit_intercept=False, tol=1e-10, max_iter=5000)
    model.fit(with_ones, labels.numpy())
    (layer,) = heads.select(0).layers
    found = np.hstack([layer.weight[0].numpy(), layer.bias[0, :, None].numpy()])
    np.testing.assert_allclose(found, model.coef_, atol=2e-4)


def test_adamw_reaches_the_optimum_without_decay() -> None:
    features, labels = clusters(200, 3, 3)
    settings = ProbeSettings(epochs=600, batch_size=1000, warmup_epochs=5, optimizer="adamw")
    heads = train_probes(features, labels, 3, [ProbeConfig(0.2)], settings)
    inputs = ((features - heads.mean) / heads.scale).double().numpy()
    model = LogisticRegression(C=1e8, tol=1e-10, max_iter=5000).fit(inputs, labels.numpy())
    found = heads.logits(features)[0].softmax(1).numpy()
    np.testing.assert_allclose(found, model.predict_proba(inputs), atol=1e-3)


def test_hidden_layers_learn_what_no_line_can() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(400, 2, generator=generator) - 0.5
    labels = (features.prod(dim=1) > 0).long()  # exclusive or
    grid = ProbeGrid((0.3, 0.1), (1e-4,))
    accuracies = []
    for layers in (0, 1, 2):
        width = 16 if layers else None
        settings = ProbeSettings(batch_size=50, hidden_layers=layers, hidden_width=width)
        heads = train_probes(features[:300], labels[:300], 2, grid, settings)
        accuracies.append(choose(heads, features[300:], labels[300:]).score.accuracy)
    assert accuracies[0] < 0.7
    assert min(accuracies[1:]) > 0.9


# the choice


def choose(heads: ProbeHeads, features: torch.Tensor, labels: torch.Tensor) -> ProbeChoice:
    return choose_probe(score_probes(heads, features, labels), len(labels))


def heads_of(logits: Tensor, configs: list[ProbeConfig] | None = None) -> ProbeHeads:
    """Heads whose logits for the row with a 1 in column n are logits[:, n]."""
    count, rows, _ = logits.shape
    configs = configs or [ProbeConfig(0.1)] * count
    layer = Layer(logits.transpose(1, 2).contiguous(), torch.zeros(count, logits.shape[2]))
    return ProbeHeads(configs, torch.zeros(rows), torch.ones(()), [layer])


def test_scores_by_eye() -> None:
    # head 0 is right with 3/4 and wrong with 1/4, head 1 is sure and wrong once
    logits = torch.tensor([[[3.0, 1.0], [3.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]]).log()
    heads = heads_of(logits)
    labels = torch.tensor([0, 1])
    table = score_probes(heads, torch.eye(2), labels)
    assert table[0].accuracy == 0.5
    assert table[0].log_likelihood == pytest.approx(math.log(3 / 16) / 2)
    assert table[1].diverged  # a logit of -inf
    logits = torch.tensor([[[90.0, 0.0], [90.0, 0.0]]])
    (row,) = score_probes(heads_of(logits), torch.eye(2), labels)
    assert row.log_likelihood == pytest.approx(math.log(1e-12) / 2)  # floored
    assert not row.diverged


def test_ties_go_to_the_likelihood_then_to_the_smaller_rate() -> None:
    sure, unsure = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    wrong = torch.tensor([[0.0, 9.0], [0.0, 9.0]])
    labels = torch.tensor([0, 1])
    logits = torch.stack([wrong, unsure, sure, sure, sure])
    rates = [1e-9, 1e-8, 0.5, 0.1, 0.1]
    heads = heads_of(logits, [ProbeConfig(rate) for rate in rates])
    choice = choose(heads, torch.eye(2), labels)
    assert choice.best == 3
    assert choice.score is choice.table[3]
    assert [row.config.learning_rate for row in choice.table] == rates
    assert [row.accuracy for row in choice.table] == [0.5, 1, 1, 1, 1]


def test_a_head_that_diverges_harms_nobody_and_is_never_chosen() -> None:
    features, labels = clusters()
    settings = ProbeSettings(epochs=6, batch_size=16, warmup_epochs=1)
    configs = [ProbeConfig(1e30, 1.0), ProbeConfig(0.1), ProbeConfig(1e38, 1e5), ProbeConfig(0.05)]
    for layers in (0, 1):
        settings = ProbeSettings(epochs=6, batch_size=16, warmup_epochs=1, hidden_layers=layers)
        heads = train_probes(features, labels, 4, configs, settings)
        choice = choose(heads, features, labels)
        assert [row.diverged for row in choice.table] == [True, False, True, False]
        assert math.isnan(choice.table[0].accuracy)
        assert math.isnan(choice.table[2].log_likelihood)
        assert choice.best in (1, 3)
        alone = train_probes(features, labels, 4, [configs[1]], settings)
        torch.testing.assert_close(heads.logits(features)[1], alone.logits(features)[0])
        lost = train_probes(features, labels, 4, configs[::2], settings)
        with pytest.raises(ValueError, match=r"did not diverge, but got 2 that all did.*1e\+30"):
            choose(lost, features, labels)


# edges and what is refused


@pytest.mark.parametrize(
    ("features", "labels", "classes"),
    [
        ([[1.0, 2.0]], [0], 1),
        ([[1.0, 2.0]], [2], 3),
        ([[1.0, 2.0]] * 3, [0, 1, 0], 2),  # all the same
        ([[0.0, 0.0], [1e30, 0.0]], [0, 1], 2),
        ([[0.0, 0.0], [1e-30, 0.0]], [0, 1], 2),
    ],
)
def test_degenerate_rows_train(features: list, labels: list, classes: int) -> None:
    rows, wanted = torch.tensor(features), torch.tensor(labels)
    for layers in (0, 1):
        settings = ProbeSettings(epochs=5, warmup_epochs=0, hidden_layers=layers)
        heads = train_probes(rows, wanted, classes, ProbeGrid((0.1,)), settings)
        assert heads.logits(rows).isfinite().all()
        assert choose(heads, rows, wanted).best == 0
    assert heads.logits(rows[:0]).shape == (1, 0, classes)


def test_progress_is_a_bar(capfd: pytest.CaptureFixture[str]) -> None:
    features, labels = clusters()
    settings = ProbeSettings(epochs=2)
    train_probes(features, labels, 4, ProbeGrid((0.1,)), settings)
    assert capfd.readouterr().err == ""
    train_probes(features, labels, 4, ProbeGrid((0.1,)), settings, progress=True)
    assert "Training heads" in capfd.readouterr().err


def good_call(**changes: Any) -> ProbeHeads:
    features, labels = clusters()
    call: dict[str, Any] = {
        "features": features,
        "labels": labels,
        "num_labels": 4,
        "grid": ProbeGrid((0.1,)),
        "settings": ProbeSettings(epochs=1),
    }
    return train_probes(**(call | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": torch.ones(7)}, r"`features`.*\[N, D\].*\(7,\)"),
        ({"features": torch.ones(0, 7)}, r"`features`.*\(0, 7\)"),
        ({"features": torch.full((90, 7), math.nan)}, "`features`.*finite"),
        ({"features": torch.full((90, 7), INF)}, "`features`.*finite"),
        ({"labels": torch.zeros(89, dtype=torch.int64)}, r"`labels`.*\[90\].*\(89,\)"),
        ({"labels": torch.zeros(90)}, "`labels`.*int64.*float32"),
        ({"num_labels": 3}, r"`labels`.*\[0, 3\).*to 3"),
        ({"grid": ProbeGrid(())}, "at least one configuration"),
        ({"grid": [ProbeConfig(-0.1)]}, "`learning_rate`.*-0.1"),
        ({"grid": [ProbeConfig(math.nan)]}, "`learning_rate`.*nan"),
        ({"grid": [ProbeConfig(0.1, INF)]}, "`weight_decay`.*inf"),
        ({"grid": [ProbeConfig(0.1, alpha=-1.0)]}, "`alpha`.*-1"),
        ({"grid": [ProbeConfig(0.1, control="mixed")]}, "mixed"),
        ({"grid": [ProbeConfig(0.1, alpha=0.1)]}, "`knn_log_probs`.*alpha 0.1.*None"),
        (
            {"grid": [ProbeConfig(0.1, gamma=1.0)], "knn_log_probs": torch.zeros(3)},
            r"`knn_log_probs`.*\[90\].*\(3,\)",
        ),
        (
            {"grid": [ProbeConfig(0.1, gamma=1.0)], "knn_log_probs": torch.ones(90)},
            "`knn_log_probs`.*at most 0",
        ),
        (
            {"grid": [ProbeConfig(0.1, alpha=1.0)], "knn_log_probs": torch.full((90,), math.nan)},
            "`knn_log_probs`.*NaN",
        ),
    ],
)
def test_bad_calls_are_refused(changes: dict[str, Any], message: str) -> None:
    good_call()
    with pytest.raises(ValueError, match=message):
        good_call(**changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda heads, x, y: choose(heads, x[:0], y[:0]), r"`features`.*\(0, 7\)"),
        (lambda heads, x, y: choose(heads, x, y + 1), r"`labels`.*\[0, 4\)"),
        (lambda heads, x, y: choose(heads, x, y[1:]), r"`labels`.*\(89,\)"),
    ],
)
def test_bad_choices_are_refused(call: Callable[..., Any], message: str) -> None:
    features, labels = clusters()
    with pytest.raises(ValueError, match=message):
        call(good_call(), features, labels)
