"""Pushes of a trainer, during and after training: each a whole repository in one commit."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.hub_checks import assert_whole
from support.hub_server import Fault, Hub
from support.tiny import assert_same_tensors
from training.test_resume import make_trainer
from transformers import AutoModel, TrainerCallback

from hf_knn import KnnTrainer
from hf_knn.training.checkpoints import problem_of


def trainer_for(folder: Path, strategy: str, **options: Any) -> KnnTrainer:
    values: dict[str, Any] = {
        "push_to_hub": True, "hub_model_id": "org/run", "hub_strategy": strategy, "max_steps": 4,
        "hub_always_push": True, "save_steps": 2,
    }  # fmt: skip
    return make_trainer(folder, **values | options)


@pytest.mark.parametrize(
    "strategy",
    [
        "end",
        pytest.param("every_save", marks=pytest.mark.slow),
        pytest.param("checkpoint", marks=pytest.mark.slow),
        "all_checkpoints",
    ],
)
def test_each_strategy_pushes_whole_repositories(
    strategy: str, hub: Hub, tmp_path: Path, cache: Path
) -> None:
    trainer = trainer_for(tmp_path, strategy)
    trainer.train()
    history = hub.repo("org/run").history()
    assert len(history) == (0 if strategy == "end" else 2)
    for commit in history:
        files = commit.files
        wanted = {"config.json", "model.safetensors", "README.md", "modeling_hf_knn.py"}
        assert wanted <= files.keys()
        assert "training_args.bin" not in files
        assert json.loads(files["training_args.json"])["knn_loss_alpha"] == 0.5
    if strategy == "checkpoint":
        inner = tmp_path / "pulled"
        for name, content in history[0].files.items():
            if name.startswith("last-checkpoint/"):
                (inner / name).parent.mkdir(parents=True, exist_ok=True)
                (inner / name).write_bytes(content)
        assert problem_of(inner / "last-checkpoint") is None
    trainer.push_to_hub()
    if strategy in ("end", "every_save"):
        assert_whole(hub, "org/run")
    found = AutoModel.from_pretrained("org/run", cache_dir=cache)
    assert_same_tensors(found, trainer.model)
    assert len(found.datastore) == 24
    assert not list(Path(str(trainer.args.output_dir)).glob(".push-*"))


def test_a_future_and_a_branch(hub: Hub, tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, "end", push_to_hub=False, save_strategy="no")
    trainer.train()
    job = trainer.push_to_hub("later", blocking=False, revision="draft", private=True)
    assert job.result().oid == hub.repo("org/run").branches["draft"]
    assert hub.repo("org/run").private
    assert_whole(hub, "org/run", "draft")


def test_a_push_that_fails_during_training_is_said_and_costs_nothing(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_for(tmp_path, "every_save")
    hub.faults.append(Fault("status", "POST .*/commit/", times=1, status=403))
    trainer.train()
    assert "A push during training failed" in caplog.text
    assert len(hub.repo("org/run").history()) == 1
    assert trainer.state.global_step == 4


def test_a_push_that_had_failed_before_the_next_began_is_said(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_for(tmp_path, "every_save")

    class Waits(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *_: Any, **others: Any) -> None:
            if state.global_step == 3:  # the first push is over, the second comes a step later
                assert trainer.push_in_progress.jobs[0].exception(timeout=60) is not None

    trainer.add_callback(Waits())
    hub.faults.append(Fault("status", "POST .*/commit/", times=1, status=403))
    trainer.train()
    assert caplog.text.count("A push during training failed") == 1
    assert len(hub.repo("org/run").history()) == 1
