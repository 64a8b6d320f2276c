"""What was taught and forgotten, against models fitted from scratch and against scikit-learn."""

import copy
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from support.oracles import as_numpy
from support.pictures import NAMES, picture, small_model
from support.tiny import LABELS, all_files, pixels, tiny_model
from torch import Tensor
from training.test_trainer import CLASSES, USUAL, cloud, probe

from hf_knn import Datastore, KnnForImageClassification, KnnTrainer
from hf_knn.core.config import CLOSED_FORM
from hf_knn.data.decode import BadImageError
from hf_knn.features.extract import ImageFeatures
from hf_knn.fit import refit
from hf_knn.model import teaching as following
from hf_knn.model.classes import check_class_name
from hf_knn.model.receipts import Change, Scope
from hf_knn.store import index as row_index

CONFIGS: list[dict[str, Any]] = [
    {"normalization": "l2_centered", "metric": "cosine"},
    {"normalization": "l2", "metric": "cosine"},
    {"normalization": "none", "metric": "l2"},
]


def trained(head: str, folder: Path, rows: int = 90, **options: Any) -> Any:
    """A small model, trained on a cloud of features."""
    class_weights = options.pop("class_weights", "none")
    model = small_model(CLASSES, head=head, **options)
    usual = USUAL if head in CLOSED_FORM else {}
    arguments = probe(folder, class_weights=class_weights, **usual)
    trainer = KnnTrainer(model, arguments, train_dataset=cloud(rows))
    trainer.train()
    return model.eval()


def answers(model: Any, features: Tensor) -> Any:
    with torch.inference_mode():
        return model(features=features, return_neighbors=True)


def state_of(model: Any) -> dict[str, Any]:
    """Everything that an undone or a failed change must leave as it was."""
    store, config = model.datastore, model.config
    order = store.ids.argsort()
    return {
        "ids": store.ids[order].tolist(), "labels": store.labels[order].tolist(),
        "features": store.features[order].tolist(), "mean": store.mean.tolist(),
        "names": config.class_names, "head": config.num_head_labels, "k": config.k,
        "weight": model.head.classifier.weight.shape, "tuned": config.num_tuned_labels,
    }  # fmt: skip


def refitted(model: Any) -> tuple[Tensor, Tensor]:
    """Weights and biases of scikit-learn's ridge on the rows that the datastore holds."""
    store, config = model.datastore, model.config
    rows = as_numpy(store.features).astype(np.float64)
    if config.normalization == "l2_centered":
        rows = rows - as_numpy(store.mean)
    if config.normalization != "none":
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    labels = store.labels.numpy()
    counts = np.bincount(labels, minlength=config.classes)
    weights = None
    if config.head_class_weighting == "inverse":
        weights = len(labels) / ((counts > 0).sum() * counts[labels])
    oracle = RidgeClassifier(alpha=config.head_regularizer).fit(rows, labels, weights)
    # scikit-learn has targets of -1 and 1
    weight = torch.from_numpy(oracle.coef_) / 2
    bias = (torch.from_numpy(oracle.intercept_) + 1) / 2
    return weight / config.head_temperature, bias / config.head_temperature


def assert_is_refit(model: Any, tolerance: float = 2e-5) -> None:
    weight, bias = refitted(model)
    present = model.datastore.labels.unique()
    found = model.head.classifier
    assert found.out_features == model.config.classes
    torch.testing.assert_close(
        found.weight.double()[present], weight, rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(found.bias.double()[present], bias, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("class_weights", ["none", "inverse"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c["normalization"])
def test_refit_is_a_training_on_the_rows_that_are_stored(
    config: dict[str, Any], class_weights: str, tmp_path: Path
) -> None:
    model = trained("ridge", tmp_path, 30, class_weights=class_weights, **config)
    more = cloud(90, seed=8)
    model.teach(features=more.features + 1.5, labels=[CLASSES[n] for n in more.labels.tolist()])
    model.forget(model.datastore.ids[:12])
    model.config.answer_thresholds = {"0.05": 0.9}
    store, before = model.datastore, (model.config.head_regularizer, model.datastore.mean.clone())
    receipts = model.changes
    fit = refit(model)
    assert fit.regularizer == model.config.head_regularizer != before[0]
    assert not torch.equal(model.datastore.mean, before[1])
    torch.testing.assert_close(
        model.datastore.mean,
        store.features.double().mean(0).to(before[1].dtype),
        rtol=1e-4,
        atol=1e-5,
    )
    assert model.config.answer_thresholds == {}
    assert model.changes == receipts  # no row came or went
    assert model.datastore.ids.tolist() == store.ids.tolist()
    assert_is_refit(model)
    # a training on the rows as they are stored ends with the same
    fresh = small_model(CLASSES, head="ridge", **config)
    kept = model.datastore
    features = ImageFeatures(kept.features.float(), kept.labels, kept.ids, ["" for _ in kept.ids])
    arguments = probe(tmp_path, class_weights=class_weights, **USUAL)
    trainer = KnnTrainer(fresh, arguments, train_dataset=features)
    trainer.train()
    for name in ("head_regularizer", "head_temperature"):
        assert getattr(fresh.config, name) == pytest.approx(getattr(model.config, name), rel=1e-6)
    weights = [one.head.classifier.weight for one in (fresh, model)]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
    # what is stored and what follows go on from there
    model.save_pretrained(tmp_path / "saved")
    found = KnnForImageClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(found.head.classifier.weight, model.head.classifier.weight)
    found.teach(features=more.features[:3] - 1.0, labels=CLASSES[:3])
    assert_is_refit(found)
    found.undo()
    assert_is_refit(found)


def test_only_a_closed_form_head_with_rows_of_its_own_is_fitted_again(tmp_path: Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"head": "linear"}, "a ridge, kernel or lda head to fit again, but got 'linear'"),
        ({"head": "ridge"}, "a datastore with rows in the checkpoint itself, but got none"),
        ({"head": "ridge", "knn_pooling": "mean"}, "pools differently"),
    ]
    for options, message in refused:
        model: Any = small_model(CLASSES, **options)
        weight = model.head.classifier.weight.clone()
        with pytest.raises(ValueError, match=message):
            refit(model)
        assert torch.equal(model.head.classifier.weight, weight)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c["normalization"])
@pytest.mark.parametrize("class_weights", ["none", "inverse"])
def test_a_ridge_head_equals_a_refit_after_every_change(
    config: dict[str, Any], class_weights: str, tmp_path: Path
) -> None:
    model = trained("ridge", tmp_path, class_weights=class_weights, **config)
    assert_is_refit(model)
    more = cloud(12).features + 0.3
    receipt = model.teach(features=more, labels=["fox"] * 8 + [CLASSES[0]] * 4)
    assert receipt.new_classes == ["fox"]
    assert not model.head.classifier.training  # as the model that it came into
    assert model.config.class_names == [*CLASSES, "fox"]
    assert_is_refit(model)
    model.relabel(receipt.ids[:3], [CLASSES[1]] * 3)
    assert_is_refit(model)
    model.forget(receipt.ids[2:7])
    assert_is_refit(model)
    model.forget(model.datastore.ids[:20], recenter=True)
    assert_is_refit(model)
    state = model.memory.tally.state
    weight, _ = state.solve(model.config.head_regularizer)
    wanted, _ = refitted(model)
    assert (weight / model.config.head_temperature - wanted).abs().max() < 1e-8


def test_a_forgotten_row_was_never_seen(tmp_path: Path) -> None:
    model = trained("ridge", tmp_path)
    ids = model.datastore.ids[5:15]
    never = copy.deepcopy(model)
    kept = never.datastore.ids[~torch.isin(never.datastore.ids, ids)]
    never.datastore = never.datastore.subset(kept)
    never.forget(kept[:1])  # one row, so that the head is solved anew on the others
    never.undo()
    model.forget(ids)
    queries = cloud(40).features * 1.1
    found, wanted = answers(model, queries), answers(never, queries)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.neighbors.ids, wanted.neighbors.ids)
    assert_is_refit(model)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_other_heads_stay_and_the_receipt_says_so(head: str, tmp_path: Path) -> None:
    model = trained(head, tmp_path)
    before = {name: value.clone() for name, value in model.head.state_dict().items()}
    new = cloud(6).features.flip(1) * 2
    receipt = model.teach(features=new, labels=["fox"] * 6)
    assert receipt.scope == Scope.STORE
    assert f"the {head} head keeps what it learned" in receipt.notes[0]
    for name, value in model.head.state_dict().items():
        assert torch.equal(value, before[name])
    assert model.config.num_head_labels == len(CLASSES)
    for weight in (0.0, 0.5, 1.0):
        model.config.knn_weight, model.config.k = weight, 5
        found = answers(model, new)
        assert (found.logits.argmax(1) == len(CLASSES)).all()
        p = found.knn_log_probs[:, -1]
        torch.testing.assert_close(found.logits[:, -1], p)  # method.md, section 5
    model.forget(label="fox")
    assert (answers(model, new).logits.exp()[:, -1] < 1e-11).all()


@pytest.mark.parametrize("head", ["linear", "ridge"])
def test_undo_takes_each_change_back(head: str, tmp_path: Path) -> None:
    model = trained(head, tmp_path)
    queries = cloud(30).features
    before, logits = state_of(model), answers(model, queries).logits
    ids = model.datastore.ids[:4]
    changes = [
        lambda: model.teach(features=queries[:3], labels=["fox", "owl", CLASSES[0]]),
        lambda: model.forget(ids),
        lambda: model.relabel(ids, ["fox"] * 4),
        lambda: model.forget(label=CLASSES[1]),
        lambda: model.forget(ids, recenter=True),
        lambda: model.merge(model.datastore.subset(ids)),
    ]
    with pytest.raises(ValueError, match="nothing was changed"):
        model.undo()
    for change in changes:
        first = change()
        assert state_of(model) != before
        last = model.undo()
        assert state_of(model) == before
        assert (last.hash_before, last.hash_after) == (first.hash_after, first.hash_before)
        torch.testing.assert_close(answers(model, queries).logits, logits, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="nothing was changed since the last undo"):
            model.undo()
    assert [receipt.action for receipt in model.changes[1::2]] == [Change.UNDO] * len(changes)


@pytest.mark.parametrize("head", ["linear", "ridge"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.teach(features=torch.zeros(2, 3), labels=["a", "b"]), "`features`"),
        (lambda m: m.teach(features=torch.zeros(2, 16), labels=["a"]), "one label per row"),
        (lambda m: m.teach(features=torch.zeros(2, 16), labels="ab"), "one label per row"),
        (lambda m: m.teach(features=torch.zeros(1, 16), labels=[99]), "a class that the model has"),
        (lambda m: m.teach(features=torch.zeros(1, 16), labels=[True]), "a class that the model"),
        (lambda m: m.teach(features=torch.zeros(1, 16), labels=[" "]), "printable"),
        (lambda m: m.teach(features=torch.full((1, 16), np.nan), labels=["a"]), "finite"),
        (lambda m: m.teach(features=torch.zeros(1, 16), labels=["a"], ids=[0]), "does not have"),
        (lambda m: m.teach([b"no picture"], ["a"]), "picture 0"),
        (lambda m: m.teach([picture(0, 1), b""], ["a", "b"]), "picture 1"),
        (lambda m: m.teach(), "exactly one of"),
        (lambda m: m.forget([123456]), "`ids`"),
        (lambda m: m.forget(label="nobody"), "a class that the model has"),
        (lambda m: m.forget(), "exactly one of"),
        (lambda m: m.forget([1], label=NAMES[0]), "exactly one of"),
        (lambda m: m.relabel([0, 1], ["a"]), "one label per row"),
        (lambda m: m.relabel([123456], ["a"]), "`ids`"),
        (lambda m: m.merge(Datastore.from_features(torch.ones(2, 5), [0, 1])), "dim"),
    ],
)  # fmt: skip
def test_a_change_that_fails_changes_nothing(
    head: str, change: Any, match: str, tmp_path: Path
) -> None:
    model = trained(head, tmp_path)
    before, queries = state_of(model), cloud(20).features
    logits = answers(model, queries).logits
    with pytest.raises(ValueError, match=match):
        change(model)
    assert state_of(model) == before
    assert torch.equal(answers(model, queries).logits, logits)
    assert model.changes == []


def fails_at(call: int, monkeypatch: Any) -> None:
    """The head is solved as always, but for one call, counted from 1."""
    real, calls = following.solve_head, []

    def solve(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            raise torch.linalg.LinAlgError("did not converge")
        return real(*args)

    monkeypatch.setattr(following, "solve_head", solve)


@pytest.mark.parametrize(
    ("change", "call"),
    [
        (lambda m: m.teach(features=cloud(2).features, labels=["owl", "owl"]), 1),
        (lambda m: m.forget([0, 1]), 1),
        (lambda m: m.forget([0, 1], recenter=True), 1),
        (lambda m: m.relabel([0, 1], ["owl", CLASSES[2]]), 1),
        (lambda m: m.undo(), 1),  # the class that was taught goes with its rows
    ],
)
def test_a_change_that_fails_in_the_middle_is_taken_back(
    change: Any, call: int, tmp_path: Path, monkeypatch: Any
) -> None:
    model = trained("ridge", tmp_path)
    model.teach(features=cloud(3).features, labels=["fox"] * 3)
    before, queries, receipts = state_of(model), cloud(20).features, list(model.changes)
    logits = answers(model, queries).logits
    fails_at(call, monkeypatch)
    with pytest.raises(torch.linalg.LinAlgError):
        change(model)
    monkeypatch.undo()
    assert state_of(model) == before
    assert model.changes == receipts
    assert torch.equal(answers(model, queries).logits, logits)
    model.teach(features=queries[:2], labels=["fox", CLASSES[0]])
    assert_is_refit(model)


def test_a_memory_is_a_value_that_a_model_takes_back_at_once(tmp_path: Path) -> None:
    model = trained("ridge", tmp_path)
    queries = cloud(20).features
    before, logits, earlier = state_of(model), answers(model, queries).logits, model.memory
    model.teach(features=queries[:5] + 1, labels=["fox"] * 5)
    model.forget([3, 4], recenter=True)
    later, said = model.memory, answers(model, queries).logits
    assert (len(earlier.receipts), len(later.receipts)) == (0, 2)
    with pytest.raises(FrozenInstanceError):
        later.rows = None
    model.memory = earlier
    assert state_of(model) == before
    assert model.changes == []
    assert torch.equal(answers(model, queries).logits, logits)
    model.memory = later
    assert torch.equal(answers(model, queries).logits, said)
    model.teach(features=queries[:2], labels=["fox", CLASSES[0]])
    assert_is_refit(model)


def test_the_index_moves_along_with_a_change(monkeypatch: Any) -> None:
    """It is built once, however often a model is taught; earlier rows stay what they were."""
    model: Any = tiny_model("vit", k=3)
    earlier, built = copy.copy(model.datastore), []  # its copy has no index yet
    model.datastore = earlier
    build = row_index.build_searcher

    def counting(*args: Any) -> Any:
        built.append(len(args[0]))
        return build(*args)

    monkeypatch.setattr(row_index, "build_searcher", counting)
    wanted = answers(model, earlier.features[:4].float()).neighbors
    for seed, label in enumerate(("fox", LABELS[0], "owl")):
        model.teach(pixels(1, seed), [label])
        model.forget(model.datastore.ids[:1])
        with pytest.raises(ValueError, match="does not have"):
            model.forget([123456])
        answers(model, torch.zeros(1, model.config.feature_dim))
    assert built == [40]
    assert (len(earlier), len(model.datastore)) == (40, 40)
    found = earlier.search(earlier.features[:4].float(), 3)
    assert torch.equal(found.ids, wanted.ids)
    assert built == [40, 40]


def test_a_datastore_that_is_only_searched_is_not_taught() -> None:
    class Searched:
        metric, normalization = "cosine", "l2_centered"

        def __len__(self) -> int:
            return 0

    model: Any = small_model(CLASSES)
    model.datastore = Searched()
    with pytest.raises(ValueError, match="only answers"):
        model.teach(features=torch.zeros(1, 16), labels=["a"])


def test_what_may_show_a_forgotten_picture_goes_with_it(tmp_path: Path) -> None:
    model = trained("linear", tmp_path / "run")
    model.neighbor_picture = b"\x89PNG of training pictures"
    model.teach(features=cloud(1).features, labels=[0])
    assert model.neighbor_picture is not None  # drawn before that row was there
    gone = model.forget([0])
    model.save_pretrained(tmp_path / "model")
    assert "neighbors.png" not in all_files(tmp_path / "model")
    assert any("picture of neighbours" in note for note in gone.notes)
    model.undo()
    assert model.neighbor_picture == b"\x89PNG of training pictures"


def test_a_class_without_rows_keeps_its_name_and_that_is_said(tmp_path: Path) -> None:
    model = trained("linear", tmp_path)
    assert not any("keep their names" in note for note in model.forget([0, 1]).notes)
    notes = model.forget(label=CLASSES[1]).notes
    assert f"classes without rows keep their names: {CLASSES[1]}" in notes


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "a\x00", "\u202eevil", "x" * 201])
def test_names_that_cannot_be_shown_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="printable"):
        check_class_name(name)
    assert check_class_name("<img src=x>") == "<img src=x>"  # text, shown as text


def test_pictures_of_every_kind_are_read_alike() -> None:
    model: Any = tiny_model("vit", k=3)
    image = picture(1, 3, (32, 32))
    array = np.asarray(image)
    pixel_values = model.image_processor(images=image, return_tensors="pt")["pixel_values"]
    model.train()
    model.teach([image, array], ["fox", "fox"], again=True)
    model.teach(pixel_values, ["fox"], again=True)
    assert model.training
    rows = model.datastore.subset(model.datastore.ids[-3:]).features.float()
    torch.testing.assert_close(rows[1], rows[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(rows[2], rows[0], rtol=2e-3, atol=2e-3)
    model.eval()
    found = model(pixel_values=pixel_values)
    assert model.config.class_names[found.logits.argmax()] == "fox"
    with pytest.raises(BadImageError, match="picture 0"):
        model.teach([np.zeros((2, 2, 2, 2))], ["fox"])
    model.image_processor = None
    with pytest.raises(ValueError, match="image_processor"):
        model.teach([image], ["fox"])


def test_other_pooling_for_the_neighbours_leaves_a_ridge_head_alone(tmp_path: Path) -> None:
    model: Any = tiny_model("vit", head="ridge", pooling="cls", knn_pooling="mean", k=3)
    model.config.head_regularizer = 0.1
    receipt = model.teach(pixels(2), ["fox", "fox"])
    assert receipt.scope == Scope.STORE
    assert model.config.num_head_labels == len(LABELS)
    assert model(pixel_values=pixels(2)).logits.argmax(1).tolist() == [len(LABELS)] * 2


@pytest.mark.parametrize("head", ["linear", "ridge"])
def test_changes_survive_a_save_and_leave_no_byte(head: str, tmp_path: Path) -> None:
    model = trained(head, tmp_path / "run")
    model.measured = {"metrics": {"eval_blend_top1": 0.5}, "rows": 3, "note": "By hand."}
    secret = torch.linspace(3, 7, 16).unsqueeze(0)
    taught = model.teach(features=secret, labels=["fox"], paths=["secret/place.png"])
    model.save_pretrained(tmp_path / "model")
    opened = KnnForImageClassification.from_pretrained(tmp_path / "model")
    assert opened.changes == model.changes
    assert opened.config.class_names[-1] == "fox"
    queries = cloud(9).features
    torch.testing.assert_close(answers(opened, queries).logits, answers(model, queries).logits)
    assert "later changes" in opened.measured["note"]
    row = opened.datastore.subset(taught.ids).features.numpy().tobytes()
    assert any(row in data for data in contents(tmp_path / "model"))
    gone = opened.forget(taught.ids)
    opened.save_pretrained(tmp_path / "model")
    assert not any(row in data or b"secret/place" in data for data in contents(tmp_path / "model"))
    again = KnnForImageClassification.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="no byte of them was saved"):
        again.undo()
    assert again.changes[-1] == gone
    assert gone.hash_after == taught.hash_before
    assert any("super_squash_history" in note for note in gone.notes)


def test_an_undo_of_what_was_taught_before_a_save(tmp_path: Path) -> None:
    model = trained("ridge", tmp_path / "run")
    before = state_of(model)
    model.teach(features=cloud(5).features, labels=["fox"] * 5)
    model.save_pretrained(tmp_path / "model")
    opened = KnnForImageClassification.from_pretrained(tmp_path / "model")
    opened.undo()
    assert state_of(opened) == before


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in all_files(folder)]


def test_rows_changed_behind_its_back_are_counted_again(tmp_path: Path) -> None:
    model = trained("ridge", tmp_path)
    model.teach(features=cloud(2).features, labels=[0, 1])
    model.datastore.remove(model.datastore.ids[:10])
    model.teach(features=cloud(1).features, labels=[2])
    assert_is_refit(model)


def test_a_merge_takes_names_and_new_ids(tmp_path: Path) -> None:
    model, other = trained("ridge", tmp_path / "a"), trained("ridge", tmp_path / "b")
    names = [CLASSES[1], "fox", CLASSES[0]]
    receipt = model.merge(other.datastore, names)
    assert receipt.action == Change.MERGE
    assert receipt.new_classes == ["fox"]
    assert len(model.datastore) == 180
    assert not set(receipt.ids) & set(other.datastore.ids.tolist())
    came = model.datastore.subset(receipt.ids)
    assert [model.config.class_names[n] for n in came.labels] == [
        names[n] for n in other.datastore.labels
    ]
    assert_is_refit(model)


def test_a_model_without_a_datastore_says_what_to_do() -> None:
    model = small_model(CLASSES)
    with pytest.raises(ValueError, match="train it first"):
        model.teach(features=torch.zeros(1, 16), labels=["a"])


def test_the_neighbours_speak_for_a_taught_class_until_the_blend_is_tuned(tmp_path: Path) -> None:
    model = trained("ridge", tmp_path / "a")
    model.config.knn_weight = 0.0
    new, queries = cloud(4).features.flip(1), cloud(30).features
    model.teach(features=new, labels=["fox"] * 4)
    found = answers(model, queries)
    p = found.knn_log_probs.exp()
    assert found.head_logits.shape[1] == len(CLASSES) + 1  # the head knows it too
    wanted = (1 - p[:, -1:]) * found.head_logits.softmax(1)  # what the votes for it leave
    wanted[:, -1] += p[:, -1]
    torch.testing.assert_close(found.logits.exp(), wanted.clamp(min=1e-12))
    held_out = torch.cat([queries, new]) + 0.01  # none of them is stored
    labels = torch.tensor([*cloud(30).labels, *[3] * 4])
    rows = ImageFeatures(held_out, labels, torch.arange(34))
    KnnTrainer(model, probe(tmp_path / "b")).tune(rows)
    assert model.config.num_tuned_labels is None
    model.config.knn_weight = 0.0
    found = answers(model, queries)
    torch.testing.assert_close(found.logits, found.head_logits.log_softmax(1).clamp(min=-27.631))


def test_a_taught_class_that_is_not_answered_is_said(tmp_path: Path) -> None:
    model = trained("linear", tmp_path)
    model.config.k, model.config.knn_temperature, model.config.knn_weight = 60, 10.0, 0.0
    receipt = model.teach(features=cloud(4).features.flip(1), labels=["fox"] * 4)
    found = answers(model, cloud(4).features.flip(1))
    missed = int((found.logits.argmax(1) != len(CLASSES)).sum())
    assert missed > 0
    notes = [note for note in receipt.notes if "answered as another class" in note]
    assert model.changes[-1] == receipt
    assert notes[0].startswith(f"{missed} of 4 pictures")
    assert "set `knn_temperature` from 10 to 0.14" in notes[0]
    model.undo()
    model.config.knn_temperature = 0.14
    receipt = model.teach(features=cloud(4).features.flip(1), labels=["fox"] * 4)
    assert not any("answered as another class" in note for note in receipt.notes)


def test_everything_forgotten_and_taught_again(tmp_path: Path) -> None:
    model = trained("ridge", tmp_path)
    model.forget(model.datastore.ids)
    assert answers(model, cloud(3).features).logits.isfinite().all()
    model.teach(features=cloud(60).features, labels=cloud(60).labels.tolist())
    assert_is_refit(model)


def test_rows_of_another_store_are_read_once() -> None:
    """Those of a server may change between two readings."""

    class Elsewhere(Datastore):
        readings = 0

        def blocks(self) -> Any:
            Elsewhere.readings += 1
            return super().blocks()

        @property
        def features(self) -> Any:
            raise AssertionError("all rows were read a second time")

        labels = ids = paths = features

    model: Any = tiny_model("vit")
    other = tiny_model("vit", seed=0).datastore
    assert isinstance(other, Datastore)
    more = Elsewhere.from_features(other.features, other.labels, paths=other.paths)
    before = len(model.datastore)
    model.merge(more)
    assert Elsewhere.readings == 1
    assert len(model.datastore) == before + len(other)
    assert model.datastore.path_of(model.changes[-1].ids[0]) == "train/0/0.png"
