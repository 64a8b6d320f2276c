"""Options of `Trainer` that a fine-tuning run with a datastore must not break."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.pictures import random_features, small_model
from torch import Tensor, nn
from training.test_resume import CLASSES, make_trainer, noisy_rows, outcome
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_knn import KnnTrainer, KnnTrainingArguments, extract_features

EACH_EPOCH: dict[str, Any] = {
    "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy", "num_train_epochs": 6,
}  # fmt: skip


class Logs(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.seen.append(dict(logs))


def test_early_stopping_keeps_the_best_weights_and_their_datastore(tmp_path: Path) -> None:
    held_out = noisy_rows(18, seed=7)
    trainer = make_trainer(tmp_path, held_out=held_out, learning_rate=0.0, **EACH_EPOCH)
    trainer.add_callback(EarlyStoppingCallback(2))
    trainer.train()
    assert trainer.state.global_step == 9  # one epoch of three steps, and two that were no better
    assert trainer.state.best_global_step == 3
    store = trainer.model.datastore
    assert store is not None
    features = extract_features(trainer.model, noisy_rows(24), use_cache=False, progress=False)
    torch.testing.assert_close(store.features.float(), features.features, atol=2e-3, rtol=2e-3)


def test_checkpointed_gradients_are_the_same(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "plain", save_strategy="no")
    plain.train()
    frugal = make_trainer(tmp_path / "frugal", save_strategy="no", activation_checkpointing=True)
    calls = count_recomputed(frugal.model)
    frugal.train()
    assert calls == [2 * 9, 9]
    for name, value in outcome(plain).items():
        torch.testing.assert_close(outcome(frugal)[name], value, atol=1e-6, rtol=1e-5)


def count_recomputed(model: nn.Module) -> list[int]:
    """[forward passes in training mode of a layer inside the first block, of the head]."""
    calls = [0, 0]
    blocks: Any = model.backbone
    inside = next(layer for layer in blocks.layers[0].modules() if isinstance(layer, nn.Linear))
    for place, layer in enumerate((inside, model.head)):
        assert isinstance(layer, nn.Module)

        def count(module: nn.Module, inputs: Any, place: int = place) -> None:
            calls[place] += module.training

        layer.register_forward_pre_hook(count)
    return calls


def test_bfloat16_trains_and_leaves_the_datastore_in_its_own_precision(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []
    trainer = make_trainer(tmp_path, save_strategy="no", bf16=True, num_train_epochs=2)
    trainer.model.head.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    before = outcome(trainer)
    trainer.train()
    assert torch.bfloat16 in seen
    store = trainer.model.datastore
    assert store is not None
    assert store.features.dtype == torch.float16
    for name, value in outcome(trainer).items():
        assert value.dtype == before[name].dtype
        assert value.isfinite().all()
    moved = [name for name, value in outcome(trainer).items() if not value.equal(before[name])]
    assert moved


def test_what_a_run_logs(tmp_path: Path) -> None:
    logs = Logs()
    trainer = make_trainer(
        tmp_path, held_out=noisy_rows(12, seed=5), logging_strategy="steps", logging_steps=1,
        **EACH_EPOCH | {"num_train_epochs": 2},
    )  # fmt: skip
    trainer.add_callback(logs)
    trainer.train()
    refreshes = [row for row in logs.seen if "knn_refresh_seconds" in row]
    assert len(refreshes) == 2
    for row in refreshes:
        assert 0 <= row["knn_mean_p"] <= 1
        assert 1 <= row["knn_loss_factor_mean"] <= row["knn_loss_factor_max"]
        assert row["knn_refresh_seconds"] > 0
    measured = [row for row in logs.seen if "eval_blend_top1" in row]
    assert len(measured) == 2
    assert all({"eval_head_top1", "eval_knn_top1"} <= row.keys() for row in measured)
    assert [row for row in logs.seen if "loss" in row]


def test_tensorboard_gets_the_three_voices(tmp_path: Path, monkeypatch: Any) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = make_trainer(
        tmp_path, held_out=noisy_rows(12, seed=5), report_to="tensorboard",
        logging_strategy="epoch", **EACH_EPOCH | {"num_train_epochs": 2},
    )  # fmt: skip
    trainer.train()
    found = events.EventAccumulator(str(tmp_path / "logs"))
    found.Reload()
    tags = set(found.Tags()["scalars"])
    assert {"eval/head_top1", "eval/knn_top1", "eval/blend_top1"} <= tags
    assert {"train/loss", "train/knn_mean_p", "train/knn_loss_factor_mean"} <= tags
    assert {"train/knn_refresh_seconds"} <= tags
    assert len(found.Scalars("eval/blend_top1")) == 2


def test_trackio_gets_them_too(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed (extra `logs`)")
    import trackio.utils
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")
    trainer = make_trainer(
        tmp_path, held_out=noisy_rows(12, seed=5), report_to="trackio", project="knn",
        run_name="one", logging_strategy="epoch", **EACH_EPOCH | {"num_train_epochs": 1},
    )  # fmt: skip
    trainer.train()
    names = {name for row in SQLiteStorage.get_logs("knn", "one") for name in row}
    assert {"eval/blend_top1", "train/knn_mean_p"} <= names


def grouped(labels: Tensor, groups: Tensor) -> Any:
    features = random_features(labels.tolist(), spread=2.5)
    features.groups = groups
    return features


def test_folds_of_a_trainer_keep_groups_whole(tmp_path: Path, monkeypatch: Any) -> None:
    labels = torch.arange(60) % 3
    groups = torch.arange(60) // 6
    arguments = KnnTrainingArguments(
        str(tmp_path), freeze_backbone=True, group_by="patient", num_train_epochs=1, use_cpu=True,
        report_to="none", disable_tqdm=True, logging_strategy="no", save_strategy="no",
    )  # fmt: skip
    trainer = KnnTrainer(small_model(CLASSES), arguments, train_dataset=grouped(labels, groups))
    trainer.train()
    fitted: list[set[int]] = []
    fit = trainer._train_fold

    def remember(rows: Any) -> Any:
        fitted.append(set(rows.groups.tolist()))
        return fit(rows)

    monkeypatch.setattr(trainer, "_train_fold", remember)
    trainer.tune()
    assert len(fitted) == 5
    everyone = set(range(10))
    held_out = [everyone - some for some in fitted]
    assert sorted(group for some in held_out for group in some) == sorted(everyone)


def test_groups_are_a_column_of_the_pictures(tmp_path: Path) -> None:
    rows = noisy_rows(24)
    patients = ["a", "b", "c", "d", None, None] * 4
    rows = rows.add_column("patient", patients)
    trainer = make_trainer(tmp_path)
    found = extract_features(
        trainer.model, rows, use_cache=False, progress=False, group_by="patient"
    )
    assert found.groups is not None
    known = [group for group, name in zip(found.groups.tolist(), patients, strict=True) if name]
    assert len(set(known)) == 4
    assert len(set(found.groups.tolist())) == 4 + 8  # each missing one is a group of its own
    chosen = found.select(np.array([4, 1]))
    assert chosen.groups is not None
    assert chosen.groups.tolist() == [int(found.groups[4]), int(found.groups[1])]
    with pytest.raises(ValueError, match=r"'camera'.*columns are.*patient"):
        extract_features(trainer.model, rows, use_cache=False, group_by="camera")
    arguments = KnnTrainingArguments(str(tmp_path), group_by="camera", report_to="none")
    with pytest.raises(ValueError, match="'camera'"):
        KnnTrainer(trainer.model, arguments, train_dataset=rows)
    frozen = KnnTrainingArguments(
        str(tmp_path), group_by="patient", freeze_backbone=True, report_to="none"
    )
    found.groups = None
    with pytest.raises(ValueError, match="`groups`"):
        KnnTrainer(trainer.model, frozen, train_dataset=found)
