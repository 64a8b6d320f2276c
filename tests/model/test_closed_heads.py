"""Kernel and lda heads follow every change to what a fit of the rows would be: plain numpy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.decomposition import TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import rbf_kernel
from support.oracles import as_numpy
from support.pictures import small_model
from support.tiny import pixels, tiny_model
from training.test_trainer import CLASSES, USUAL, cloud, probe

from hf_knn import KnnForImageClassification, KnnTrainer
from hf_knn.core.backbone import KnnHead
from hf_knn.core.config import KnnConfig
from hf_knn.core.votes import ClassWeighting
from hf_knn.fit import ClosedCell, fit_closed, refit
from hf_knn.fit.closed import PrincipalAxes, RandomMap, set_random_map
from hf_knn.fit.lda import fit_lda
from hf_knn.model.export import export_onnx
from hf_knn.model.receipts import Scope
from hf_knn.model.ridge import RidgeState
from hf_knn.model.scatter import Scatter

Floats = NDArray[np.float64]

KERNELS = {"head_features": 32, "head_components": 8}
HEADS: list[dict[str, Any]] = [
    {"head": "kernel", **KERNELS},
    {"head": "kernel", "normalization": "l2", **KERNELS},
    {"head": "kernel", "normalization": "none", "metric": "l2", **KERNELS},
    {"head": "lda"},
    {"head": "lda", "normalization": "none", "metric": "l2"},
]


def trained(folder: Path, rows: int = 90, class_weights: str = "none", **options: Any) -> Any:
    model = small_model(CLASSES, **options)
    arguments = probe(folder, class_weights=class_weights, **USUAL)
    KnnTrainer(model, arguments, train_dataset=cloud(rows)).train()
    return model.eval()


def seen(model: Any) -> Floats:
    """The stored rows as the classifier sees them."""
    store, config, head = model.datastore, model.config, model.head
    rows = as_numpy(store.features).astype(np.float64)
    if config.normalization == "l2_centered":
        rows = rows - as_numpy(store.mean)
    if config.normalization != "none":
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    if config.head == "lda":
        return rows
    components = rows @ as_numpy(head.axes).T
    components /= np.linalg.norm(components, axis=1, keepdims=True)
    angles = components @ as_numpy(head.directions).T
    if config.head_kernel == "relu":
        return np.hstack([np.maximum(angles, 0) / np.sqrt(config.head_features), rows])
    wide = np.hstack([np.cos(angles), np.sin(angles)]) / np.sqrt(config.head_features / 2)
    return np.hstack([wide, rows])


def discriminants(rows: Floats, labels: Any, regularizer: float, weighting: str) -> Floats:
    """[N, C'] log-probabilities of the rows, by the formula of the book."""
    classes = np.unique(labels)
    means = np.stack([rows[labels == c].mean(0) for c in classes])
    gaps = rows - means[np.searchsorted(classes, labels)]
    scatter = gaps.T @ gaps + regularizer * np.eye(rows.shape[1])
    covariance = scatter / (len(rows) - len(classes))
    shares = np.array([(labels == c).mean() for c in classes])
    prior = shares if weighting == "none" else np.full(len(classes), 1 / len(classes))
    through = np.linalg.solve(covariance, means.T)
    return rows @ through - (means.T * through).sum(0) / 2 + np.log(prior)


def assert_is_refit(model: Any, tolerance: float = 1e-8) -> None:
    """The solution of the kept sums, and the head that was made of it."""
    config, state = model.config, model.memory.tally.state
    rows, labels = seen(model), model.datastore.labels.numpy()
    present = np.unique(labels)
    layer = model.head.classifier
    assert layer.out_features == config.classes
    if config.head == "lda":
        weighting = config.head_class_weighting
        weight, bias = state.solve_discriminants(config.head_regularizer, weighting)
        logits = discriminants(rows, labels, config.head_regularizer, weighting)
    else:
        weight, bias = state.solve(config.head_regularizer)
        targets = (labels[:, None] == present).astype(float)
        fitted = Ridge(config.head_regularizer, solver="cholesky").fit(rows, targets)
        logits = fitted.predict(rows)
    found = rows @ weight.numpy()[present].T + bias.numpy()[present]
    gaps = found - found.mean(1, keepdims=True) - (logits - logits.mean(1, keepdims=True))
    assert np.abs(gaps).max() < tolerance * max(1, np.abs(logits).max())
    said = layer(torch.from_numpy(rows).float()).detach().double().numpy()[:, present]
    wanted = found / config.head_temperature
    assert np.abs(said - wanted).max() < 1e-4 * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_a_head_equals_a_refit_after_every_change(options: dict[str, Any], tmp_path: Path) -> None:
    model = trained(tmp_path, **options)
    more = cloud(12).features + 0.3
    receipt = model.teach(features=more, labels=["fox"] * 8 + [CLASSES[0]] * 4)
    assert receipt.scope == Scope.STORE_AND_HEAD
    assert receipt.new_classes == ["fox"]
    assert_is_refit(model)
    model.relabel(receipt.ids[:3], [CLASSES[1]] * 3)
    assert_is_refit(model)
    model.forget(receipt.ids[2:7])
    assert_is_refit(model)
    for row in range(5):  # one at a time, beside the factor
        model.teach(features=cloud(1, seed=50 + row).features, labels=["elk"])
    assert_is_refit(model)
    model.forget(model.datastore.ids[: len(model.datastore) // 2])
    assert_is_refit(model)
    model.forget(model.datastore.ids[:5], recenter=True)
    assert_is_refit(model)
    model.undo()
    assert_is_refit(model)


@pytest.mark.parametrize("options", HEADS[2:4], ids=str)
def test_a_saved_head_answers_and_follows_as_before(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = trained(tmp_path / "run", **options)
    before = {name: value.clone() for name, value in model.head.state_dict().items()}
    model.teach(features=cloud(3, seed=4).features, labels=["fox"] * 3)
    model.save_pretrained(tmp_path / "model")
    opened: Any = KnnForImageClassification.from_pretrained(tmp_path / "model")
    queries = cloud(20, seed=6).features
    with torch.inference_mode():
        assert torch.equal(opened(features=queries).logits, model(features=queries).logits)
    opened.undo()
    assert_is_refit(opened)
    for name, value in opened.head.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)


def test_refit_makes_the_principal_axes_anew(tmp_path: Path) -> None:
    model = trained(tmp_path, **HEADS[0])
    axes = model.head.axes.clone()
    more = cloud(60, seed=9)
    model.teach(features=more.features + 2, labels=[CLASSES[n] for n in more.labels.tolist()])
    assert torch.equal(model.head.axes, axes)
    fit = refit(model)
    assert not torch.equal(model.head.axes, axes)
    assert fit.regularizer == model.config.head_regularizer
    model.teach(features=cloud(1, seed=3).features, labels=[CLASSES[0]])
    assert_is_refit(model)


@pytest.mark.slow
def test_an_exported_head_answers_alike(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    for options in (HEADS[0], HEADS[3]):
        model: Any = tiny_model("vit", **options)
        model.config.head_regularizer = 1.0
        rows = model(pixel_values=pixels(20, seed=9)).pooler_output.detach()
        if model.head.axes is not None:
            axes = PrincipalAxes.of(model.head, rows, 0)
            set_random_map(model.head, axes, RandomMap("rbf", 0.5, 0.5), 0)
        model.teach(features=rows, labels=["elk", "fox"] * 10)
        folder = tmp_path / options["head"]
        export_onnx(model, folder)
        session = onnxruntime.InferenceSession(next(folder.glob("*.onnx")))
        images = pixels(5, seed=3)
        found = session.run(["head_logits"], {session.get_inputs()[0].name: images.numpy()})[0]
        wanted = model.eval()(pixel_values=images).head_logits.detach().numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


def test_random_features_come_to_their_kernel() -> None:
    head = KnnHead(16, 2, (), True, "rbf", (16, 2**14))
    axes = PrincipalAxes(torch.eye(16).double(), torch.ones(16).double())
    rows = torch.nn.functional.normalize(torch.randn(30, 16, generator=torch.manual_seed(0)), dim=1)
    for sharpness in (0.5, 2.0):
        set_random_map(head, axes, RandomMap("rbf", sharpness, 0.5), seed=1)
        wide = head.prepared(rows.double())[:, : 2**14].numpy()
        assert np.abs(wide @ wide.T - rbf_kernel(rows.numpy(), gamma=sharpness)).max() < 0.03
    assert head.directions is not None
    again = head.directions.clone()
    set_random_map(head, axes, RandomMap("rbf", 2.0, 0.5), seed=1)
    assert torch.equal(again, head.directions)
    set_random_map(head, axes, RandomMap("rbf", 2.0, 0.5), seed=2)
    assert not torch.equal(again, head.directions)


@pytest.mark.parametrize("shape", [(120, 20), (40, 60)], ids=str)
@pytest.mark.parametrize("weighting", ["none", "inverse"])
def test_discriminants_left_out_are_those_of_fits_on_the_others(
    shape: tuple[int, int], weighting: str
) -> None:
    rows, width = shape
    generator = np.random.default_rng(0)
    labels = np.concatenate([np.arange(5).repeat(2), generator.integers(0, 5, rows - 10)])
    features = generator.normal(size=(5, width))[labels] + generator.normal(size=(rows, width)) + 2
    fit = fit_lda(
        torch.from_numpy(features), torch.from_numpy(labels), regularizers=[0.5],
        class_weighting=weighting,
    )  # fmt: skip
    scores = []
    for i in range(rows):
        others = np.arange(rows) != i
        state = RidgeState.from_rows(
            torch.from_numpy(features[others]), torch.from_numpy(labels[others]), 5
        )
        weight, bias = state.solve_discriminants(0.5)
        logits = weight.numpy() @ features[i] + bias.numpy()
        if weighting == "inverse":  # the weights of all rows stay, only the count is one less
            counts = np.bincount(labels)
            logits += -np.log(counts)
        scores.append(logits)
    logits = np.stack(scores) / fit.temperature
    own = logits[np.arange(rows), labels] - np.logaddexp.reduce(logits, axis=1)
    assert fit.table[0].log_likelihood == pytest.approx(own.mean(), abs=1e-8)
    assert fit.table[0].accuracy == pytest.approx((logits.argmax(1) == labels).mean())


def test_discriminants_without_shrinkage_are_those_of_scikit_learn() -> None:
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 4, 300)
    rows = generator.normal(size=(4, 9))[labels] + generator.normal(size=(300, 9))
    state = RidgeState.from_rows(torch.from_numpy(rows), torch.from_numpy(labels))
    weight, bias = state.solve_discriminants(1e-9)
    fitted = LinearDiscriminantAnalysis(solver="lsqr").fit(rows, labels)
    coefficients = fitted.coef_ * (300 - 4) / 300  # of a covariance over N, ours is over N - C
    gaps = weight.numpy() - weight.numpy().mean(0) - (coefficients - coefficients.mean(0))
    assert np.abs(gaps).max() < 1e-8
    at_mean = rows.mean(0) @ weight.numpy().T + bias.numpy()
    means = np.stack([rows[labels == c].mean(0) for c in range(4)]) - rows.mean(0)
    wanted = np.log(fitted.priors_) - (means * weight.numpy()).sum(1) / 2
    np.testing.assert_allclose(at_mean, wanted, atol=1e-8)


@pytest.mark.parametrize("kind", ["ridge", "kernel", "lda"])
def test_a_cell_is_taken_instead_of_chosen(kind: str) -> None:
    rows = cloud(60)
    chosen = fit_closed(kind, rows.features, rows.labels, 3)
    taken = fit_closed(kind, rows.features, rows.labels, 3, cell=chosen.cell)
    assert taken.cell == chosen.cell
    queries = cloud(20, seed=2).features
    torch.testing.assert_close(taken.log_probs(queries), chosen.log_probs(queries))
    other = fit_closed(
        kind, rows.features, rows.labels, 3, cell=chosen.cell._replace(regularizer=1e3)
    )
    assert not torch.allclose(other.log_probs(queries), chosen.log_probs(queries))
    probs = chosen.log_probs(queries).exp()
    torch.testing.assert_close(probs.sum(1), torch.ones(20))


def test_many_rows_choose_on_a_sample_and_come_close_to_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, queries = cloud(400), cloud(200, seed=5)
    whole = fit_closed("kernel", rows.features, rows.labels, 3)
    monkeypatch.setattr("hf_knn.fit.closed._MOST_LEFT_OUT", 150)
    monkeypatch.setattr("hf_knn.fit.closed.HEAD_FEATURES", 256)
    sampled = fit_closed("kernel", rows.features, rows.labels, 3)
    assert 2 <= len(sampled.fit.table) < len(whole.fit.table)
    best = max(sampled.fit.table, key=lambda score: score.log_likelihood)
    assert best.regularizer == sampled.fit.regularizer
    for fit in (whole, sampled):
        answers = fit.log_probs(queries.features)
        assert (answers.argmax(1) == queries.labels).double().mean() > 0.6


def test_class_weights_of_a_kernel_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'none' for a kernel head.*'inverse'"):
        trained(tmp_path, class_weights="inverse", **HEADS[0])
    model = trained(tmp_path, class_weights="inverse", **HEADS[3])
    assert model.config.head_class_weighting == "inverse"
    model.teach(features=cloud(3, seed=1).features, labels=["fox"] * 3)
    assert_is_refit(model)


@pytest.mark.parametrize(
    "values",
    [
        {"head": "kernel", "head_features": 7}, {"head": "kernel", "head_features": -2},
        {"head": "kernel", "head_components": 2**20}, {"head": "ridge", "head_features": 8},
        {"head": "kernel", "head_kernel": "poly"}, {"head": "forest"},
    ],
    ids=str,
)  # fmt: skip
def test_bad_widths_and_kernels_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Expected `head"):
        KnnConfig(feature_dim=16, **values)


@pytest.mark.parametrize("rows", [200, 12])
def test_components_are_those_of_scikit_learn(rows: int) -> None:
    head = KnnHead(16, 2, (), False, "rbf", (8, 32))
    features = torch.randn(rows, 16, generator=torch.manual_seed(0)) * torch.linspace(0.1, 3, 16)
    axes = PrincipalAxes.of(head, features, 0)
    fitted = TruncatedSVD(8, algorithm="arpack").fit(features.double().numpy())
    turned = np.abs(axes.vectors.numpy() @ fitted.components_.T)
    np.testing.assert_allclose(turned, np.eye(8), atol=1e-6)
    np.testing.assert_allclose(axes.variances.numpy() * rows, fitted.singular_values_**2, rtol=1e-8)
    set_random_map(head, axes, RandomMap("rbf", 0.5, 0.5), 0)
    assert head.axes is not None
    spread = (features.double() @ head.axes.double().T).square().mean(0)
    torch.testing.assert_close(spread, torch.ones(8).double(), rtol=1e-4, atol=1e-4)


def test_widths_left_open_are_filled_in() -> None:
    config = KnnConfig(feature_dim=100, head="kernel")
    assert (config.head_features, config.head_components) == (4096, 100)
    assert KnnConfig(feature_dim=100).head_features == 0


def test_a_row_of_which_nothing_is_left_needs_a_new_factor() -> None:
    rows = torch.eye(6, dtype=torch.float64) * 1e4
    scatter = Scatter(6)
    scatter.add(rows, 1)
    assert scatter.factorize(1e-3)
    sides = torch.ones(6, 1, dtype=torch.float64)
    assert scatter.solve(sides) is not None
    scatter.add(rows[:1], -1)
    assert scatter.solve(sides) is None
    scatter.drop_factor()
    assert scatter.factorize(1e-3)
    found = scatter.solve(sides)
    assert found is not None
    torch.testing.assert_close(found[0, 0], torch.tensor(1e3, dtype=torch.float64))


def test_a_cell_says_what_a_head_was_fitted_with() -> None:
    rows = cloud(60)
    fit = fit_closed("kernel", rows.features, rows.labels, 3)
    assert isinstance(fit.cell, ClosedCell)
    assert fit.cell.map is not None
    assert fit.cell.map.kernel in ("rbf", "relu")
    assert fit.cell.temperature == fit.fit.temperature > 0
    assert fit_closed("lda", rows.features, rows.labels, 3).cell.map is None
    with pytest.raises(ValueError, match=r"`kind` to be one of .*linear"):
        fit_closed("linear", rows.features, rows.labels, 3)
    with pytest.raises(ValueError, match="inverse"):
        fit_closed("kernel", rows.features, rows.labels, 3, class_weighting=ClassWeighting.INVERSE)
