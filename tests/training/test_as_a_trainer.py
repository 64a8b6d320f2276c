"""What users of `Trainer` expect: their metrics, `model_init`, sentences at construction, seeds."""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.pictures import NAMES, dataset_of, random_features, small_model
from torch import nn
from torch.utils.data import TensorDataset
from transformers import EvalPrediction, Trainer, TrainingArguments

import hf_knn
from hf_knn import KnnForImageClassification, KnnTrainer, KnnTrainingArguments
from hf_knn.data.augmentation import Augment, seeded
from hf_knn.data.batches import KnnCollator
from hf_knn.features.extract import ImageFeatures
from hf_knn.fit.heads import with_fresh_head
from hf_knn.training.loss import KnnLoss

CLASSES = NAMES[:3]
QUIET: dict[str, Any] = {
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "per_device_train_batch_size": 8,
    "num_train_epochs": 2,
    "learning_rate": 0.02,
}


def arguments(folder: Path, **options: Any) -> KnnTrainingArguments:
    return KnnTrainingArguments(str(folder / "run"), **QUIET | options)


def rows(count: int = 24, seed: int = 0) -> ImageFeatures:
    labels = [number % 3 for number in range(count)]
    return random_features(labels, spread=1.5, seed=seed)


def pictures(count: int = 12) -> Any:
    return dataset_of([number % 3 for number in range(count)])


# compute_metrics


@pytest.mark.parametrize("frozen", [True, False])
def test_own_metrics_are_of_the_blend_and_choose_the_best_model(
    frozen: bool, tmp_path: Path
) -> None:
    asked: list[EvalPrediction] = []

    def best_at_first(prediction: EvalPrediction) -> dict[str, Any]:
        asked.append(prediction)
        return {"f1": np.float64(1 / len(asked)), "eval_mine": 2.0}

    data: Any = rows() if frozen else pictures()
    trainer = KnnTrainer(
        small_model(CLASSES),
        arguments(
            tmp_path, freeze_backbone=frozen, eval_strategy="epoch", save_strategy="epoch",
            load_best_model_at_end=True, metric_for_best_model="f1",
        ),
        train_dataset=data, eval_dataset=data, compute_metrics=best_at_first,
    )  # fmt: skip
    trainer.train()
    assert len(asked) == 2
    assert str(trainer.state.best_model_checkpoint).endswith("-3" if frozen else "-2")
    assert trainer.state.best_metric == 1.0
    found = trainer.evaluate()
    assert found["eval_f1"] == pytest.approx(1 / 3)
    assert type(found["eval_f1"]) is float
    assert found["eval_mine"] == 2.0
    assert found["eval_blend_top1"] == found["eval_accuracy"]
    with torch.no_grad():
        known = data if frozen else trainer.train_features
        assert known is not None
        wanted = trainer.model(features=known.features).logits.numpy()
    assert isinstance(asked[-1].predictions, np.ndarray)
    np.testing.assert_allclose(asked[-1].predictions, wanted, atol=1e-5)
    assert np.asarray(asked[-1].label_ids).tolist() == known.labels.tolist()
    assert trainer.model.measured is not None
    assert "eval_f1" not in trainer.model.measured["metrics"]  # a card knows what is ours


def test_metrics_of_several_sets_and_of_one_by_name(tmp_path: Path) -> None:
    sets = {"near": rows(12), "far": rows(9, seed=4)}
    trainer = KnnTrainer(
        small_model(CLASSES), arguments(tmp_path, freeze_backbone=True), train_dataset=rows(),
        eval_dataset=sets, compute_metrics=lambda said: {"count": len(said.label_ids)},
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate()
    assert (found["eval_near_count"], found["eval_far_count"]) == (12, 9)
    assert trainer.evaluate("far")["eval_count"] == 9


def test_metrics_of_what_is_left_of_the_logits_and_in_batches(tmp_path: Path) -> None:
    kinds: list[type] = []

    def count_right(said: EvalPrediction, compute_result: bool = False) -> dict[str, float]:
        kinds.append(type(said.predictions))
        assert compute_result == trainer.args.batch_eval_metrics
        right: Any = said.predictions == said.label_ids
        return {"right": float(right.sum())}

    for batches in (False, True):
        trainer = KnnTrainer(
            small_model(CLASSES),
            arguments(tmp_path, freeze_backbone=True, batch_eval_metrics=batches),
            train_dataset=rows(), eval_dataset=rows(9, seed=4), compute_metrics=count_right,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        )  # fmt: skip
        trainer.train()
        found = trainer.evaluate()
        assert found["eval_right"] == round(9 * found["eval_accuracy"])
    assert kinds == [np.ndarray, torch.Tensor]


# model_init


def make_model() -> KnnForImageClassification:
    model = small_model(CLASSES)
    with torch.no_grad():  # as a new head is drawn
        model.head.classifier.weight.normal_()
    return model


@pytest.mark.parametrize(
    "options", [{"freeze_backbone": True}, {}, {"freeze_backbone": True, "probe_grid": "small"}]
)
def test_each_training_begins_with_a_new_model(options: dict[str, Any], tmp_path: Path) -> None:
    data: Any = rows() if options else pictures()
    trainer = KnnTrainer(
        args=arguments(tmp_path, **options), train_dataset=data, model_init=make_model
    )
    first = trainer.model
    heads, models = [], []
    for _ in range(2):
        trainer.train()
        models.append(trainer.model)
        heads.append(trainer.model.head.classifier.weight.detach().clone())
        assert trainer.model.datastore is not None
        assert len(trainer.model.datastore) == len(data)
        assert trainer.evaluate(data)["eval_knn_top1"] >= 0
        assert trainer.model_init is make_model
    assert models[0] is not models[1]
    assert first is not models[0]
    assert torch.equal(*heads)  # whatever was drawn before, the seed decides
    once = make_model()
    torch.manual_seed(trainer.args.seed)
    plain = KnnTrainer(once, arguments(tmp_path, **options), train_dataset=data)
    plain.train()
    assert plain.model is once


def test_a_trial_sets_arguments_before_anything_is_prepared(tmp_path: Path) -> None:
    seen: list[Any] = []

    def init(trial: Any) -> KnnForImageClassification:
        seen.append(trial)
        return make_model()

    trainer = KnnTrainer(
        args=arguments(tmp_path, freeze_backbone=True), train_dataset=rows(), model_init=init
    )

    def set_up(trial: Any) -> None:
        if trial is not None:
            trainer.args.knn_loss_alpha = trial["knn_loss_alpha"]

    trainer._hp_search_setup = set_up  # type: ignore[method-assign]  # as optuna's backend does
    before = trainer.model
    trainer._begin_anew({"knn_loss_alpha": 0.5})  # what `train` does first
    assert seen == [None, {"knn_loss_alpha": 0.5}]
    assert trainer.model is not before
    assert not trainer.loss.is_plain


def test_models_of_model_init_are_checked(tmp_path: Path) -> None:
    args = arguments(tmp_path, freeze_backbone=True)
    with pytest.raises(ValueError, match=r"`model_init` to return a KnnFor.*got Linear"):
        KnnTrainer(args=args, model_init=lambda: nn.Linear(2, 2))  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"`model` to be a KnnFor.*got None"):
        KnnTrainer(args=args)
    kinds = iter([small_model(CLASSES), small_model(NAMES[:4])])
    trainer = KnnTrainer(args=args, train_dataset=rows(), model_init=lambda: next(kinds))
    with pytest.raises(ValueError, match="models of the classes"):
        trainer.train()


# what is refused when the trainer is made


class Torch(TensorDataset):
    pass


def streamed() -> Any:
    return pictures().to_iterable_dataset()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (streamed, r"a stream \(IterableDataset\); load them without streaming=True"),
        (lambda: Torch(torch.zeros(3, 3, 8, 8), torch.arange(3)), r"got Torch; .*load_splits"),
        (lambda: [{"image": None, "label": 0}], r"`datasets.Dataset` .*got list"),
        (lambda: "my-pictures", r"got str; .*load_splits"),
    ],
)
@pytest.mark.parametrize("place", ["train_dataset", "eval_dataset", "one of several", "evaluate"])
def test_rows_that_cannot_be_used_are_refused_at_once(
    data: Any, message: str, place: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"args": arguments(tmp_path, freeze_backbone=True)}
    if place == "evaluate":
        if isinstance(data(), str):
            return  # the name of one of several sets
        trainer = KnnTrainer(small_model(CLASSES), **given)
        with pytest.raises(ValueError, match=message):
            trainer.evaluate(data())
        return
    given |= {"eval_dataset": {"a": data()}} if place == "one of several" else {place: data()}
    with pytest.raises(ValueError, match=message):
        KnnTrainer(small_model(CLASSES), **given)


def test_several_training_sets_are_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, freeze_backbone=True)
    with pytest.raises(ValueError, match=r"one training set, but got \['train', 'test'\]"):
        KnnTrainer(small_model(CLASSES), args, train_dataset={"train": rows(), "test": rows()})


def test_arguments_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="KnnTrainingArguments, but got TrainingArguments"):
        KnnTrainer(small_model(CLASSES), TrainingArguments(str(tmp_path)))  # type: ignore[arg-type]
    args = arguments(tmp_path, freeze_backbone=True, include_for_metrics=["inputs"])
    with pytest.raises(ValueError, match="`include_for_metrics` to be empty"):
        KnnTrainer(small_model(CLASSES), args)


def adapted(kind: str) -> type[nn.Module]:
    """A module of the package peft, as far as its name tells."""
    return type(kind, (nn.Module,), {"__module__": "peft.tuners.lora"})


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("where", ["around", "in the backbone", "in a layer"])
def test_adapters_are_refused_before_training(where: str, frozen: bool, tmp_path: Path) -> None:
    model = small_model(CLASSES)
    lora = adapted("LoraLayer")()
    if where == "around":
        lora.base_model = model
    elif where == "in the backbone":
        lora.base_model = model.backbone
        model.backbone = lora  # type: ignore[assignment]
    else:
        next(part for part in model.backbone.modules()).lora_A = lora
    given: Any = lora if where == "around" else model
    with pytest.raises(ValueError, match=r"without adapters, but got one with LoraLayer.*merge"):
        KnnTrainer(given, arguments(tmp_path, freeze_backbone=frozen))


# seeds


def test_seeds_reach_the_processor_alone_and_are_put_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seeded_gpus: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded_gpus.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded_gpus.append)
    model, trained = small_model(CLASSES), small_model(CLASSES)  # which seed, too
    torch.manual_seed(3)
    assert seeded_gpus[-1] == 3  # so the spy sees it
    state = torch.get_rng_state()
    augment = Augment(lambda image: torch.rand(1), seed=1)
    drawn = [float(augment(None, epoch, 7)) for epoch in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    with_fresh_head(model, 5)
    with suppress(RuntimeError), seeded(9):
        torch.rand(3)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), state)
    trainer = KnnTrainer(trained, arguments(tmp_path, knn_loss_alpha=0.5), train_dataset=pictures())
    state = torch.get_rng_state()
    seeded_gpus.clear()
    trainer._refresh()
    assert torch.equal(torch.get_rng_state(), state)
    assert seeded_gpus == []


def test_nothing_in_the_package_seeds_every_device() -> None:
    package = Path(str(hf_knn.__file__)).parent
    for path in package.rglob("*.py"):
        assert "torch.manual_seed(" not in path.read_text(encoding="utf-8"), path


# label smoothing


@pytest.mark.parametrize("scale", [1.0, 30.0, 3000.0])
def test_smoothing_at_alpha_0_is_that_of_the_head_however_sure_it_is(
    scale: float, tmp_path: Path
) -> None:
    model, data = small_model(CLASSES).train(), rows(8)
    with torch.no_grad():
        model.head.classifier.weight.normal_(generator=torch.Generator().manual_seed(0)).mul_(scale)
    args = arguments(tmp_path, freeze_backbone=True, label_smoothing_factor=0.2)
    trainer = KnnTrainer(model, args, train_dataset=data)
    batch = KnnCollator(None)([data[number] for number in range(8)])
    logits = model.head(data.features)
    plain = nn.CrossEntropyLoss(label_smoothing=0.2)(logits, data.labels)
    if scale > 1:
        assert float(logits.detach().log_softmax(1).min()) < math.log(1e-12)
    found = trainer.compute_loss(model, dict(batch))
    torch.testing.assert_close(found, plain)
    # and it is what a plain Trainer makes of the head's logits
    theirs = Trainer(nn.Linear(1, 1), TrainingArguments(str(tmp_path), **QUIET))
    theirs.label_smoother = trainer.label_smoother
    assert theirs.label_smoother is not None
    smoothed = theirs.label_smoother({"logits": logits}, data.labels)
    torch.testing.assert_close(found, smoothed, rtol=1e-5, atol=1e-5)
    assert not KnnLoss(args, model.config).is_plain
