"""The head of a trainer: chosen where nobody named one, and then by one pass and one search."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pictures import NAMES, dataset_of, random_features, small_model
from torch import Tensor

from hf_knn import Datastore, KnnForImageClassification, KnnTrainer, KnnTrainingArguments
from hf_knn.features.extract import ImageFeatures
from hf_knn.fit import choice as choice_module
from hf_knn.fit import fit_closed, fit_linear
from hf_knn.fit import measure as measure_module
from hf_knn.fit.choice import FIXED_CELL
from hf_knn.fit.heads import with_fresh_head
from hf_knn.fit.held_out import BlendOf, HeldOut
from hf_knn.training import asking
from hf_knn.training.arguments import HEAD
from hf_knn.training.heads import chooses_head
from training.test_trainer import cloud, counting, tensors

CLASSES = NAMES[:3]
QUIET: dict[str, Any] = {"use_cpu": True, "disable_tqdm": True, "report_to": "none"}
"""Nothing that only a head trained by gradients uses."""


@pytest.fixture
def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thousands of features take seconds; one test has it."""
    compare = choice_module.compare_heads

    def fast(*args: Any, **options: Any) -> Any:
        return compare(*args, **{"heads": ("linear", "ridge", "lda")} | options)

    monkeypatch.setattr(asking, "compare_heads", fast)


def arguments(folder: Path, **options: Any) -> KnnTrainingArguments:
    return KnnTrainingArguments(str(folder / "run"), **{"freeze_backbone": True} | QUIET | options)


def trainer_of(
    folder: Path, features: Any = None, model: Any = None, held_out: Any = None, **options: Any
) -> KnnTrainer:
    model = model or small_model(CLASSES)
    rows = cloud(90) if features is None else features
    return KnnTrainer(
        model, arguments(folder, **options), train_dataset=rows, eval_dataset=held_out
    )


def islands(count: int = 240, seed: int = 0) -> ImageFeatures:
    """Two classes that no plane parts, in the dimensions of a small model."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([1.0] * 3 + [0.0] * 13)
    rows = spread * torch.randn(count, 16, generator=generator)
    return ImageFeatures(rows, (rows[:, 0] * rows[:, 1] > 0).long(), torch.arange(count))


# ---- who chooses --------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{}, {"head": None}, {"head": "auto"}])
@pytest.mark.parametrize("made", [{}, {"head": None}, {"head": "auto"}])
def test_a_head_is_chosen_where_nobody_named_one(
    made: dict[str, Any], asked: dict[str, Any], without_kernel: None, tmp_path: Path
) -> None:
    model = small_model(CLASSES, **made)
    assert (model.config.head, model.has_named_head) == ("linear", False)
    trainer = trainer_of(tmp_path, model=model, **asked)
    assert trainer.args.head == "auto"
    trainer.train()
    choice = trainer.head_choice
    assert choice is not None
    assert [score.head for score in choice.table] == ["linear", "ridge", "lda"]
    assert model.config.head == choice.head
    assert model.datastore is not None


def test_the_chosen_head_is_saved_and_is_named_from_then_on(
    without_kernel: None, tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.tune()
    trainer.model.save_pretrained(tmp_path / "model")
    assert trainer.head_choice is not None
    chosen = trainer.head_choice.head
    assert json.loads((tmp_path / "model" / "config.json").read_text())["head"] == chosen
    found = KnnForImageClassification.from_pretrained(tmp_path / "model")
    assert found.has_named_head
    again = trainer_of(tmp_path, model=found)
    again.train()
    assert again.head_choice is None
    assert found.config.head == chosen


def test_what_is_chosen_is_what_naming_it_gives(without_kernel: None, tmp_path: Path) -> None:
    auto = trainer_of(tmp_path)
    auto.train()
    chosen = auto.head_choice
    assert chosen is not None
    by_model = trainer_of(tmp_path, model=small_model(CLASSES, head=str(chosen.head)))
    by_arguments = trainer_of(tmp_path, head=str(chosen.head))
    for named in (by_model, by_arguments):
        named.train()
        assert named.head_choice is None
        assert named.model.config.head == chosen.head
        for name, value in tensors(auto.model.head).items():
            assert torch.equal(tensors(named.model.head)[name], value), name
    cells = []
    for trainer in (auto, by_model, by_arguments):
        trainer.tune()
        config = trainer.model.config
        cells.append((config.k, config.knn_temperature, config.knn_weight))
        assert config.answer_thresholds == auto.model.config.answer_thresholds
    assert len(set(cells)) == 1


def test_a_kernel_is_chosen_where_no_plane_parts_the_classes(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, islands(), small_model(2), tune_folds=2)
    trainer.train()
    trainer.tune()
    assert trainer.head_choice is not None
    assert [score.head for score in trainer.head_choice.table] == [
        "linear", "ridge", "kernel", "lda",
    ]  # fmt: skip
    assert trainer.model.config.head == "kernel"
    assert trainer.model.config.head_features > 0
    metrics = trainer.evaluate(islands(200, seed=9))
    assert metrics["eval_head_top1"] > 0.8


@pytest.mark.parametrize("named", ["linear", "mlp", "ridge", "lda"])
@pytest.mark.parametrize("by", ["model", "arguments"])
def test_a_named_head_is_trained_and_no_other(named: str, by: str, tmp_path: Path) -> None:
    made: dict[str, Any] = {"head": named} if by == "model" else {}
    model = small_model(CLASSES, **made)
    assert model.has_named_head == (by == "model")
    options = {} if by == "model" else {"head": named}
    trainer = trainer_of(tmp_path, model=model, **options)
    trainer.train()
    assert trainer.head_choice is None
    assert model.config.head == named
    assert trainer.evaluate(cloud(60, seed=1))["eval_head_top1"] > 0.5


def test_hidden_sizes_name_an_mlp() -> None:
    model = small_model(CLASSES, head_hidden_sizes=[7])
    assert (model.config.head, model.has_named_head) == ("mlp", True)


def test_two_names_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, model=small_model(CLASSES, head="lda"), head="ridge")
    with pytest.raises(ValueError, match=r"one head, but got 'ridge' and 'lda'"):
        trainer.train()


GIVEN: dict[str, Any] = {
    "num_train_epochs": 3, "learning_rate": 0.01, "weight_decay": 0.0, "max_steps": 5,
    "per_device_train_batch_size": 8, "label_smoothing_factor": 0.1, "knn_loss_alpha": 0.5,
    "knn_loss_gamma": 1.0, "probe_grid": "small", "optim": "sgd", "lr_scheduler_type": "cosine",
    "warmup_steps": 2, "max_grad_norm": 0.5, "gradient_accumulation_steps": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_what_only_a_descent_uses_asks_for_a_linear_head(name: str, tmp_path: Path) -> None:
    given = arguments(tmp_path, **{name: GIVEN[name]})
    assert given.of_descent == [name]
    for args in (given, copy.copy(given), pickle.loads(pickle.dumps(given))):
        assert not chooses_head(small_model(CLASSES), args)
    assert not chooses_head(small_model(CLASSES), dataclasses.replace(given, seed=3))
    trainer = KnnTrainer(small_model(CLASSES, head="ridge"), given, train_dataset=cloud(60))
    with pytest.raises(ValueError, match=rf"no `{name}` for a ridge head"):
        trainer.train()


@pytest.mark.parametrize("name", HEAD._fields)
def test_a_value_that_is_given_counts_though_it_is_the_usual_one(name: str, tmp_path: Path) -> None:
    usual = arguments(tmp_path, **{name: getattr(HEAD, name)})
    plain = arguments(tmp_path)
    assert chooses_head(small_model(CLASSES), plain)
    assert not chooses_head(small_model(CLASSES), usual)
    # a copy of arguments has what these have
    assert chooses_head(small_model(CLASSES), dataclasses.replace(plain, seed=3))
    assert not chooses_head(small_model(CLASSES), dataclasses.replace(usual, seed=3))
    assert not chooses_head(small_model(CLASSES), dataclasses.replace(plain, num_train_epochs=3))


def test_a_linear_head_is_trained_as_asked(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, num_train_epochs=2)
    trainer.train()
    assert trainer.head_choice is None
    assert trainer.model.config.head == "linear"
    assert trainer.state.global_step == 2


def test_an_optimizer_of_ones_own_asks_for_a_linear_head(tmp_path: Path) -> None:
    model = small_model(CLASSES)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    trainer = KnnTrainer(
        model, arguments(tmp_path), train_dataset=cloud(60), optimizers=(optimizer, None)
    )
    trainer.train()
    assert trainer.head_choice is None
    assert trainer.state.global_step == 60


def test_training_the_backbone_is_for_a_linear_head(tmp_path: Path) -> None:
    rows = dataset_of([row % 3 for row in range(12)], names=CLASSES)
    options = {"freeze_backbone": False, "num_train_epochs": 1, "save_strategy": "no"}
    trainer = trainer_of(tmp_path, rows, **options)
    trainer.train()
    assert trainer.head_choice is None
    assert trainer.model.config.head == "linear"
    for named in (small_model(CLASSES, head="kernel"), small_model(CLASSES)):
        how = {} if named.has_named_head else {"head": "lda"}
        with pytest.raises(ValueError, match="`freeze_backbone` to be True"):
            trainer_of(tmp_path, rows, named, **options | how).train()


def test_a_search_for_rates_is_for_a_linear_head(tmp_path: Path) -> None:
    trainer = KnnTrainer(
        args=arguments(tmp_path), train_dataset=cloud(60), model_init=lambda: small_model(CLASSES)
    )
    assert chooses_head(trainer.model, trainer.args)

    def set_up(trial: Any) -> None:  # as optuna's backend does
        trainer.args.learning_rate = trial["learning_rate"]

    trainer._hp_search_setup = set_up  # type: ignore[method-assign]
    trainer._begin_anew({"learning_rate": HEAD.learning_rate})  # what `train` does first
    assert not chooses_head(trainer.model, trainer.args)  # though the rate is the usual one


# ---- what it is chosen by -----------------------------------------------------------------------


def test_a_linear_head_of_a_fold_is_that_of_a_trainer(tmp_path: Path) -> None:
    """The same first weights, batches, steps and rates."""
    for weighting in ("none", "inverse"):
        features = random_features([0] * 150 + [1] * 100 + [2] * 50, spread=2.0)
        args = arguments(tmp_path, seed=7, head="linear", class_weights=weighting)
        model = with_fresh_head(small_model(CLASSES), 7)
        KnnTrainer(model, args, train_dataset=features).train()
        found = fit_linear(features.features, features.labels, 3, class_weighting=weighting, seed=7)
        for name, value in tensors(model.head).items():
            torch.testing.assert_close(tensors(found.head)[name], value, atol=2e-5, rtol=1e-4)
        asked = cloud(50, seed=3).features
        with torch.no_grad():
            wanted = model.head(asked).log_softmax(1)
        torch.testing.assert_close(found.log_probs(asked), wanted, atol=2e-4, rtol=1e-4)


def test_one_pass_of_the_backbone_and_one_search_a_fold(
    without_kernel: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = Datastore.search

    def search(self: Datastore, queries: Tensor, *args: Any, **options: Any) -> Any:
        asked.append(len(queries))
        return real(self, queries, *args, **options)

    rows = dataset_of([row % 3 for row in range(60)], names=CLASSES)
    model = small_model(CLASSES)
    trainer = trainer_of(tmp_path, rows, model, feature_cache=False)
    monkeypatch.setattr(Datastore, "search", search)
    with counting(model) as batches:
        trainer.train()
        assert sum(batches) == 60
        assert sum(asked) == 60
        assert len(asked) == 5
        fits: list[str] = []
        for name in ("fit_linear", "fit_closed"):
            monkeypatch.setattr(choice_module, name, lambda *a, **o: fits.append("again"))
        trainer.tune()
    assert sum(batches) == 60
    assert len(asked) == 5
    assert fits == []


def test_each_half_is_judged_by_what_the_other_chose(
    without_kernel: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[Tensor, Tensor]] = []
    chosen: list[HeldOut] = []
    thresholds, choose_cell = measure_module.thresholds, choice_module.choose_cell

    def spied(log_probs: Tensor, labels: Tensor, rates: Any) -> Any:
        told.append((log_probs, labels))
        return thresholds(log_probs, labels, rates)

    def spied_choice(rows: Any, *args: Any, **options: Any) -> Any:
        chosen.append(rows)
        return choose_cell(rows, *args, **options)

    monkeypatch.setattr(measure_module, "thresholds", spied)
    monkeypatch.setattr(choice_module, "choose_cell", spied_choice)
    trainer = trainer_of(tmp_path, cloud(120))
    trainer.train()
    trainer.tune()
    choice = trainer.head_choice
    assert choice is not None
    assert choice.answers is not None
    first, second = choice.answers.halves()
    heads = 3  # linear, ridge, lda; each cell is chosen once on each half
    assert [len(rows.labels) for rows in chosen] == [60] * 2 * heads
    halves = [first] * heads + [second] * heads
    assert all(map(torch.equal, (r.labels for r in chosen), (h.labels for h in halves)))
    log_probs, labels = told[-1]
    assert torch.equal(labels, torch.cat([second.labels, first.labels]))
    # the second half hears what is kept, the first what it had no part in
    blend = BlendOf(len(CLASSES), trainer.model.config.metric, trainer.model.config.knn_weighting)
    torch.testing.assert_close(log_probs[:60], blend.at(choice.result, second))
    assert len(log_probs) == 120


def test_few_labels_are_all_chosen_on_and_judged_by_halves(
    without_kernel: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[HeldOut] = []
    choose_cell, told = choice_module.choose_cell, []
    thresholds = measure_module.thresholds

    def spied_choice(rows: HeldOut, *args: Any, **options: Any) -> Any:
        chosen.append(rows)
        return choose_cell(rows, *args, **options)

    def spied(log_probs: Tensor, labels: Tensor, rates: Any) -> Any:
        told.append((log_probs, labels))
        return thresholds(log_probs, labels, rates)

    monkeypatch.setattr(choice_module, "choose_cell", spied_choice)
    monkeypatch.setattr(measure_module, "thresholds", spied)
    trainer = trainer_of(tmp_path, cloud(24))
    trainer.train()
    heads = 3  # linear, ridge, lda
    assert [len(rows.labels) for rows in chosen] == [24] * heads + [12] * 2 * heads
    result, choice = trainer.tune(), trainer.head_choice
    assert choice is not None
    assert choice.answers is not None
    assert choice.judged is not None
    assert (result.rows, choice.rows) == (24, 24)
    first, second = choice.answers.halves()
    log_probs, labels = told[-1]
    # what the first half chose comes first, and is judged by the second
    assert torch.equal(labels, torch.cat([second.labels, first.labels]))
    assert torch.equal(labels, choice.judged.labels)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(24))


def test_tuning_goes_on_with_the_cell_that_was_compared(
    without_kernel: None, tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path)
    trainer.train()
    choice = trainer.head_choice
    assert choice is not None
    assert choice.result is not None
    result = trainer.tune()
    assert result is choice.result
    assert trainer.tune(criterion="accuracy").criterion == "accuracy"
    assert trainer.tune(calibrate=True).criterion == result.criterion
    assert trainer.tune(cloud(80, seed=6)) is not result  # other rows


def test_rows_that_were_taught_since_are_asked_about_anew(
    without_kernel: None, tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path, held_out=cloud(80, seed=6))
    trainer.train()
    assert trainer.head_choice is not None
    first = trainer.tune()
    assert first is trainer.head_choice.result
    trainer.model.teach(features=cloud(40, seed=8).features, labels=[0] * 40)
    assert trainer.tune() is not first


def test_a_validation_set_is_what_heads_are_compared_on(
    without_kernel: None, tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path, held_out=cloud(80, seed=6))
    trainer.train()
    choice = trainer.head_choice
    assert choice is not None
    assert choice.rows == 40
    assert choice.answers is not None
    assert torch.equal(choice.answers.labels, trainer.eval_dataset.labels)
    assert trainer.tune() is choice.result


def test_stored_pictures_of_a_validation_set_are_not_compared_on(
    without_kernel: None, tmp_path: Path
) -> None:
    rows, others = cloud(90), cloud(60, seed=6)
    others.features[:20] = rows.features[:20]
    others.labels[:20] = rows.labels[:20]
    trainer = trainer_of(tmp_path, rows, held_out=others)
    trainer.train()
    assert trainer.head_choice is not None
    assert trainer.head_choice.answers is not None
    assert len(trainer.head_choice.answers.labels) == 40


# ---- few labels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("each", [1, 2])
def test_below_three_labels_a_class_it_is_a_ridge_alone(each: int, tmp_path: Path) -> None:
    rows = cloud(3 * each, spread=0.5)
    trainer = trainer_of(tmp_path, rows)
    trainer.train()
    choice, config = trainer.head_choice, trainer.model.config
    assert choice is not None
    assert (choice.head, choice.fixed) == ("ridge", FIXED_CELL if each == 1 else None)
    assert "Too few labels" in choice.say()
    assert config.head == "ridge"
    assert (config.head_temperature == FIXED_CELL.temperature) == (each == 1)
    store = trainer.model.datastore
    assert isinstance(store, Datastore)
    stored = store.features.float()  # what the head is fitted on
    wanted = fit_closed("ridge", stored, rows.labels, 3, cell=choice.fixed)
    asked = cloud(30, seed=4).features
    with torch.no_grad():
        found = trainer.model.head(asked).log_softmax(1)
    torch.testing.assert_close(found, wanted.log_probs(asked), atol=2e-3, rtol=1e-3)
    for calibrate in (False, True):
        result = trainer.tune(calibrate=calibrate)
        assert (result.k, result.temperature, result.knn_weight) == (20, 0.14, 0.0)
        assert (config.k, config.knn_temperature, config.knn_weight) == (20, 0.14, 0.0)
        assert (result.has_few_labels, result.rows) == (True, 6 if each == 2 else 0)
    held_out = trainer.tune(cloud(60, seed=5))  # enough to choose on
    assert held_out.criterion == "one_standard_error"


def test_from_three_labels_on_heads_are_compared(without_kernel: None, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, cloud(9, spread=0.5))
    trainer.train()
    result = trainer.tune()
    assert trainer.head_choice is not None
    assert len(trainer.head_choice.table) == 3
    assert (result.k, result.temperature) == (20, 0.14)
    assert result.knn_weight in (0.0, 0.1, 0.2, 0.3, 0.5)


def test_class_weights_leave_the_kernel_out(tmp_path: Path) -> None:
    features = random_features([0] * 60 + [1] * 20 + [2] * 10, spread=1.5)
    trainer = trainer_of(tmp_path, features, class_weights="inverse")
    trainer.train()
    assert trainer.head_choice is not None
    assert "kernel" in trainer.head_choice.left_out
    assert "kernel" not in [score.head for score in trainer.head_choice.table]


# ---- afterwards ---------------------------------------------------------------------------------


def test_teaching_moves_a_chosen_head(without_kernel: None, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, cloud(8))  # too few to compare: a ridge head
    trainer.train()
    model = trainer.model
    assert model.config.head == "ridge"
    before = tensors(model.head)
    model.teach(features=cloud(6, seed=9).features, labels=[0, 1, 2, 0, 1, 2])
    assert not torch.equal(tensors(model.head)["classifier.weight"], before["classifier.weight"])


def test_another_training_chooses_anew_and_a_named_one_does_not(
    without_kernel: None, tmp_path: Path
) -> None:
    model = small_model(CLASSES)
    trainer_of(tmp_path, cloud(8), model).train()
    assert model.config.head == "ridge"
    second = trainer_of(tmp_path, cloud(90), model)
    second.train()
    assert second.head_choice is not None
    assert len(second.head_choice.table) == 3
    trainer_of(tmp_path, cloud(90), model, head="lda").train()
    assert model.config.head == "lda"
    assert model.config.head_temperature != 1
    trainer_of(tmp_path, cloud(90), model, num_train_epochs=1).train()
    assert (model.config.head, model.config.head_temperature) == ("linear", 1.0)


def test_a_model_of_new_classes_gets_a_head_that_knows_them(
    without_kernel: None, tmp_path: Path
) -> None:
    model = small_model(CLASSES)
    trainer_of(tmp_path, cloud(90), model, head="linear").train()
    model.teach(features=random_features([3] * 6, seed=5).features, labels=["eel"] * 6)
    assert model.config.head_classes == 3
    trainer = trainer_of(tmp_path, cloud(120, classes=4), model)
    trainer.train()
    assert model.config.head_classes == model.config.classes == 4
    assert trainer.evaluate(cloud(80, seed=2, classes=4))["eval_head_top1"] > 0.4
