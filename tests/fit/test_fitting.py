"""Heads that are fitted at once: closed form, and the best of many; in the model and its folds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from support.oracles import as_numpy
from support.pictures import NAMES, random_features, small_model
from torch import Tensor
from training.test_trainer import CLASSES, USUAL, arguments, cloud, pictures, probe, tensors

from hf_knn import Datastore, KnnConfig, KnnForImageClassification, KnnTrainer
from hf_knn.data.splits import stratified_folds
from hf_knn.features.extract import ImageFeatures
from hf_knn.fit import choice
from hf_knn.fit import heads as fitting
from hf_knn.fit.grids import ProbeConfig, ProbeGrid, ProbeSettings
from hf_knn.fit.heads import PROBE_GRIDS, Part, fit_closed_form, sweep
from hf_knn.fit.sweep import train_probes

HEADS: dict[str, dict[str, Any]] = {
    "linear": {"head": "linear"},
    "mlp": {"head": "mlp", "head_hidden_sizes": [12, 7]},
    "ridge": {"head": "ridge"},
}


def model_with(head: str, classes: Any = CLASSES, **options: Any) -> KnnForImageClassification:
    return small_model(classes, **HEADS[head], **options)


def make_trainer(head: str, folder: Path, features: ImageFeatures, **options: Any) -> KnnTrainer:
    given = (USUAL if head == "ridge" else {}) | options
    return KnnTrainer(model_with(head), probe(folder, **given), train_dataset=features)


def with_store(model: KnnForImageClassification, features: ImageFeatures) -> Any:
    """The model with a datastore of the rows, which a ridge head is solved on."""
    config = model.config
    model.datastore = Datastore.from_features(
        features.features, features.labels, features.ids,
        metric=config.metric, normalization=config.normalization,
    )  # fmt: skip
    return model


def head_logits(model: KnnForImageClassification, features: Tensor) -> Tensor:
    with torch.no_grad():
        return model(features=features).head_logits


@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_saved_with_its_model(head: str, tmp_path: Path) -> None:
    model = model_with(head)
    features = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for number, value in enumerate(model.head.state_dict().values()):
            value += 0.1 + 0.01 * number
    wanted = head_logits(model, features)
    model.save_pretrained(tmp_path)
    loaded = KnnForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(head_logits(loaded, features), wanted)
    assert loaded.config.head == head
    assert loaded.config.head_hidden_sizes == model.config.head_hidden_sizes


def test_an_mlp_has_the_layers_it_was_asked_for() -> None:
    model = model_with("mlp")
    assert [layer.out_features for layer in model.head.hidden] == [12, 7]
    features = torch.randn(3, 16)
    rows = features
    for layer in model.head.hidden:
        assert isinstance(layer, torch.nn.Linear)
        rows = (rows @ layer.weight.T + layer.bias).clamp(min=0)
    wanted = rows @ model.head.classifier.weight.T + model.head.classifier.bias
    torch.testing.assert_close(head_logits(model, features), wanted)
    assert small_model(CLASSES, head="mlp").config.head_hidden_sizes == [16]  # as wide as a feature


@pytest.mark.parametrize("sizes", [[0], [-1], [1.5], "12", [True], [8, 0]])
def test_bad_widths_are_refused(sizes: Any) -> None:
    with pytest.raises(ValueError, match="`head_hidden_sizes` to be widths >= 1"):
        KnnConfig(head="mlp", head_hidden_sizes=sizes)
    with pytest.raises(ValueError, match="empty unless head='mlp'"):
        KnnConfig(head="linear", head_hidden_sizes=[4])


# ridge


@pytest.mark.parametrize("normalization", ["l2_centered", "l2", "none"])
def test_a_ridge_head_is_that_of_sklearn(normalization: str) -> None:
    metric = "l2" if normalization == "none" else "cosine"
    features = cloud(90)
    model = with_store(model_with("ridge", normalization=normalization, metric=metric), features)
    fit = fit_closed_form(model, features)
    rows = as_numpy(features.features.half())  # as they are stored
    if normalization == "l2_centered":
        rows = rows - rows.mean(axis=0)
    if normalization != "none":
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    oracle = RidgeClassifier(alpha=fit.regularizer).fit(rows, features.labels.numpy())
    # scikit-learn has targets of -1 and 1
    wanted = (oracle.decision_function(rows) + 1) / 2 / fit.temperature
    found = head_logits(model, features.features)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-3)
    assert (found.argmax(1) == features.labels).float().mean() > 0.6


def test_a_class_without_rows_is_impossible_not_nan() -> None:
    features = cloud(60, classes=2)
    model = with_store(model_with("ridge"), features)
    fit_closed_form(model, features)
    p = head_logits(model, features.features).softmax(1)
    assert (p[:, 2] == 0).all()
    assert p.isfinite().all()


def test_a_ridge_head_is_trained_tuned_and_measured(tmp_path: Path) -> None:
    trainer = make_trainer("ridge", tmp_path, cloud(90))
    output = trainer.train()
    assert output.global_step == 0
    assert output.metrics["train_regularizer"] > 0
    assert output.metrics["train_temperature"] > 0
    result = trainer.tune()
    assert 0 <= result.knn_weight <= 1
    metrics = trainer.evaluate(cloud(60, seed=1))
    assert metrics["eval_head_top1"] > 0.5
    trainer.save_model(str(tmp_path / "saved"))
    loaded = KnnForImageClassification.from_pretrained(tmp_path / "saved")
    rows = cloud(9, seed=2).features
    assert torch.equal(head_logits(loaded, rows), head_logits(trainer.model, rows))


@pytest.mark.parametrize("head", ["ridge", "linear"])
def test_folds_have_heads_of_their_own(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = cloud(60)
    seen: list[set[bytes]] = []
    name = "fit_closed" if head == "ridge" else "fit_linear"
    real = getattr(choice, name)

    def spied(*args: Any, **options: Any) -> Any:
        rows = next(part for part in args if isinstance(part, Tensor))
        seen.append({row.numpy().tobytes() for row in rows})
        return real(*args, **options)

    monkeypatch.setattr(choice, name, spied)
    trainer = make_trainer(head, tmp_path, features, **USUAL)
    trainer.train()
    trainer.tune()
    folds = stratified_folds(features.labels, trainer.args.tune_folds, trainer.args.seed)
    rows = [row.numpy().tobytes() for row in features.features]
    assert seen == [{rows[row] for row in fold.fitted} for fold in folds]


def test_class_weights_reach_a_ridge_head(tmp_path: Path) -> None:
    labels = [0] * 80 + [1] * 6 + [2] * 6
    features = random_features(labels, spread=2.5)
    recalls = []
    for weighting in ("none", "inverse"):
        trainer = make_trainer("ridge", tmp_path / weighting, features, class_weights=weighting)
        trainer.train()
        guesses = head_logits(trainer.model, features.features).argmax(1)
        recalls.append(float((guesses[80:] == features.labels[80:]).float().mean()))
    assert recalls[1] > recalls[0]


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        ("ridge", {"knn_loss_alpha": 0.1}, "no `knn_loss_alpha` for a ridge head"),
        ("ridge", {"probe_grid": "small"}, "no `probe_grid` for a ridge head"),
        ("ridge", {"freeze_backbone": False}, "`freeze_backbone` to be True"),
        ("linear", {"probe_grid": "large"}, r"`probe_grid` to be one of \['small'"),
        ("linear", {"probe_grid": "small", "freeze_backbone": False}, "`freeze_backbone` to be"),
        ("linear", {"probe_grid": "small", "knn_loss_alpha": 0.1}, "alphas of its own"),
    ],
)
def test_what_does_not_go_together_is_refused(
    head: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    def run() -> None:
        usual = USUAL if head == "ridge" else {}
        args = arguments(tmp_path, **{"freeze_backbone": True} | usual | options)
        KnnTrainer(model_with(head), args, train_dataset=pictures()).train()

    with pytest.raises(ValueError, match=message):
        run()


# the best of many


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> ProbeGrid:
    """A grid with one configuration that learns, and some that do not."""
    grid = ProbeGrid((1e-7, 0.02), (0.0, 1e-4), (0.0, 0.5))
    monkeypatch.setitem(PROBE_GRIDS, "small", (grid, ProbeSettings(epochs=20, batch_size=16)))
    return grid


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("held_out", [None, 30])
def test_the_best_of_a_grid_is_chosen_on_rows_held_out(
    head: str, held_out: int | None, few: ProbeGrid, tmp_path: Path
) -> None:
    trainer = make_trainer(head, tmp_path, cloud(90), probe_grid="small")
    if head == "mlp":
        trainer.model = model_with("mlp")
        trainer.model.config.head_hidden_sizes = [12, 12]
        trainer.model.head = type(trainer.model.head).from_config(trainer.model.config)
    if held_out:
        trainer.eval_dataset = cloud(held_out, seed=5)
    before = tensors(trainer.model)
    output = trainer.train()
    choice = trainer.probe_choice
    assert choice is not None
    assert len(choice.table) == len(few.configs()) == 8
    assert choice.score.config.learning_rate == 0.02
    highest, count = max(row.accuracy for row in choice.table), held_out or 90
    near = highest - (highest * (1 - highest) / count) ** 0.5
    likelihoods = [row.log_likelihood for row in choice.table if row.accuracy >= near]
    assert choice.score.log_likelihood == max(likelihoods)
    assert output.metrics["train_held_out_accuracy"] == choice.score.accuracy
    assert not torch.equal(before["head.classifier.weight"], trainer.model.head.classifier.weight)
    assert trainer.evaluate(cloud(60, seed=1))["eval_head_top1"] > 0.5


def test_pooled_scores_are_those_of_all_rows_held_out(few: ProbeGrid, tmp_path: Path) -> None:
    features, model = cloud(50), model_with("linear")
    folds = stratified_folds(features.labels, 3, 0)
    configs = [ProbeConfig(0.3), ProbeConfig(0.1)]
    settings = ProbeSettings(epochs=5)
    parts = [
        Part(features.select(fold.fitted), features.select(fold.held_out), None) for fold in folds
    ]
    found = sweep(iter(parts), model, configs, settings, False)
    correct, total = np.zeros(2), 0
    for part in parts:
        heads = train_probes(part.fitted.features, part.fitted.labels, 3, configs, settings)
        guesses = heads.logits(part.held_out.features).argmax(-1)
        correct += (guesses == part.held_out.labels).sum(1).numpy()
        total += len(part.held_out)
    assert [row.accuracy for row in found.table] == pytest.approx((correct / total).tolist())


def test_folds_of_a_sweep_train_the_chosen_head_only(
    few: ProbeGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    real = fitting.train_probes

    def spied(
        rows: Tensor, labels: Tensor, classes: int, grid: Any, *args: Any, **options: Any
    ) -> Any:
        counts.append(len(grid.configs() if isinstance(grid, ProbeGrid) else grid))
        return real(rows, labels, classes, grid, *args, **options)

    monkeypatch.setattr(fitting, "train_probes", spied)
    trainer = make_trainer("linear", tmp_path, cloud(60), probe_grid="small")
    trainer.train()
    assert counts == [8] * 5 + [1]
    counts.clear()
    trainer.tune()
    assert counts == [1] * 5


def test_the_names_of_the_grids() -> None:
    assert set(PROBE_GRIDS) == {"small", "paper", "paper_self_supervised"}
    assert len(PROBE_GRIDS["paper"][0].configs()) == 8 * 4 * 4
    assert len(NAMES) > 3
