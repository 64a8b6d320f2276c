"""A run that goes on after an interruption equals the one that was never interrupted."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.forks import in_child
from support.oracles import assert_same_store
from support.pictures import NAMES, dataset_of, small_processor
from support.tiny import perturb
from torch import Tensor
from transformers import ResNetConfig, ResNetModel, TrainerCallback, ViTConfig, ViTModel, set_seed

from hf_knn import KnnForImageClassification, KnnTrainer, KnnTrainingArguments
from hf_knn.training import checkpoints as resuming
from hf_knn.training.checkpoints import (
    SEAL_NAME,
    STAGING,
    list_checkpoints,
    newest_whole,
    problem_of,
)

CLASSES = NAMES[:3]
STEPS = 9  # three epochs of three
REFRESHES = {"never": 1, "2": 5}


def fresh_model(family: str) -> KnnForImageClassification:
    torch.manual_seed(0)
    backbone: Any
    if family == "vit":
        config = ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
            image_size=8, patch_size=4, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
        )  # fmt: skip
        backbone = ViTModel(config, add_pooling_layer=False)
    else:
        backbone = ResNetModel(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        )
    perturb(backbone, 0)
    return KnnForImageClassification.from_backbone(
        backbone, CLASSES, image_processor=small_processor()
    )


def make_trainer(
    folder: Path, family: str = "vit", held_out: Dataset | None = None, **options: Any
) -> KnnTrainer:
    values: dict[str, Any] = {
        "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "report_to": "none",
        "per_device_train_batch_size": 8, "num_train_epochs": 3, "learning_rate": 0.01,
        "save_strategy": "steps", "save_steps": 2, "knn_loss_alpha": 0.5, "seed": 3,
    }  # fmt: skip
    set_seed(3)
    args = KnnTrainingArguments(str(folder / "run"), **values | options)
    return KnnTrainer(
        fresh_model(family), args, train_dataset=noisy_rows(24), eval_dataset=held_out
    )


def noisy_rows(count: int, seed: int = 0) -> Dataset:
    """Pictures of which a third has a wrong label, so that k-NN finds some of them hard."""
    rows = dataset_of([row % 3 for row in range(count)], seed, names=CLASSES)
    labels = [row % 3 if row % 9 < 6 else (row + 1) % 3 for row in range(count)]
    kind = rows.features["label"]
    return rows.remove_columns("label").add_column("label", labels, feature=kind)


class Stop(TrainerCallback):
    """Ends a run by an error, at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def outcome(trainer: KnnTrainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def interrupted(folder: Path, step: int, family: str, **options: Any) -> None:
    trainer = make_trainer(folder, family, **options)
    trainer.add_callback(Stop(step))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("vit", {}),
    ("vit", {"dataloader_num_workers": 2}),
    ("vit", {"knn_queries": "live", "knn_refresh": "2"}),
    ("vit", {"knn_refresh": "never", "knn_loss_gamma": 1.0, "knn_loss_normalize": "mean"}),
    ("vit", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
    ("vit", {"knn_loss_alpha": 0.0, "trainable_blocks": 1}),
    ("resnet", {}),
    ("resnet", {"dataloader_num_workers": 2, "knn_queries": "live"}),
    ("vit", {"freeze_backbone": True}),
]


FAST = (2, 6, 8)
"""Of the variants; `make test-slow` runs the others."""


@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param(*variant, marks=() if number in FAST else pytest.mark.slow)
        for number, variant in enumerate(VARIANTS)
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    whole = make_trainer(tmp_path / "whole", family, **options)
    whole.train()
    assert whole.state.global_step == STEPS
    # in the middle of an epoch, and right after its end
    for step in (5, 7) if not options else (5,):
        folder = tmp_path / f"stopped-{step}"
        interrupted(folder, step, family, **options)
        trainer = make_trainer(folder, family, **options)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == STEPS
        found, wanted = outcome(trainer), outcome(whole)
        different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
        assert not different
        assert trainer.model.datastore is not None
        assert whole.model.datastore is not None
        assert_same_store(trainer.model.datastore, whole.model.datastore)
    logged = [entry for entry in whole.state.log_history if "knn_mean_p" in entry]
    assert all(0.2 < entry["knn_mean_p"] < 0.9 for entry in logged)
    assert len(logged) == REFRESHES.get(options.get("knn_refresh", "epoch"), 3) * (
        not options.get("freeze_backbone") and options.get("knn_loss_alpha") != 0
    )


def test_every_tensor_comes_back(tmp_path: Path, stopped: Path) -> None:
    """`Trainer`'s own way loses those that are renamed on disk, without a word."""
    checkpoint = stopped / "run" / "checkpoint-4"
    trainer = make_trainer(tmp_path)
    before = outcome(trainer)
    trainer._load_from_checkpoint(str(checkpoint))
    after = outcome(trainer)
    saved = KnnForImageClassification.from_pretrained(checkpoint)
    for name, value in saved.state_dict().items():
        assert torch.equal(after[name], value), name
    trained = {name for name, _ in trainer.model.named_parameters()}
    assert {name for name in trained if not torch.equal(before[name], after[name])} == trained


# whole or invisible


def checkpoints(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder / "run")]


def test_a_checkpoint_is_sealed_and_nothing_else_is_left(tmp_path: Path) -> None:
    make_trainer(tmp_path).train()
    assert checkpoints(tmp_path) == [f"checkpoint-{step}" for step in (2, 4, 6, 8, 9)]
    for path in list_checkpoints(tmp_path / "run"):
        assert problem_of(path) is None
        listed = set(json.loads((path / SEAL_NAME).read_text()))
        assert listed == {p.name for p in path.iterdir()} - {SEAL_NAME}
        assert "training_args.bin" not in listed
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its second checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    interrupted(folder, 5, "vit")
    return folder


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "unsealed", "bad seal"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_is_skipped_with_the_reason(
    damage: str, name: str, tmp_path: Path, stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "run" / "checkpoint-4"
    data = bytearray((newest / name).read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
        (newest / name).write_bytes(data)
    elif damage == "truncated":
        (newest / name).write_bytes(data[:-1])
    elif damage == "missing":
        (newest / name).unlink()
    elif damage == "unsealed":
        (newest / SEAL_NAME).unlink()
    else:
        (newest / SEAL_NAME).write_text("[1")
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"whole checkpoint.*resume_from_checkpoint=True"):
        trainer.train(resume_from_checkpoint=str(newest))
    assert trainer.whole_checkpoint(True) == str(tmp_path / "run" / "checkpoint-2")
    assert "checkpoint-4" in caplog.text
    reason = {"unsealed": SEAL_NAME, "bad seal": SEAL_NAME}.get(damage, name)
    assert reason in caplog.text


def test_nothing_to_resume_from_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected a whole checkpoint"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-notes").mkdir()
    resuming.rotate(tmp_path, 2, str(tmp_path / "checkpoint-4"))
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-4", "checkpoint-10", "checkpoint-notes",
    }  # fmt: skip
    resuming.rotate(tmp_path, None, None)
    resuming.rotate(tmp_path, 1, None)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10"]


def test_the_limit_is_kept_while_training(tmp_path: Path) -> None:
    make_trainer(tmp_path, save_total_limit=2).train()
    assert checkpoints(tmp_path) == ["checkpoint-8", "checkpoint-9"]


def test_the_best_checkpoint_is_known_and_loaded(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, held_out=noisy_rows(12, 1), eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", save_total_limit=1,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert Path(best).parent == tmp_path / "run"
    assert problem_of(Path(best)) is None
    saved = KnnForImageClassification.from_pretrained(best)
    for name, value in saved.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name
    newest, _ = newest_whole(tmp_path / "run")
    assert newest is not None
    state = json.loads((newest / "trainer_state.json").read_text())
    assert STAGING not in str(state["best_model_checkpoint"])


def test_a_checkpoint_links_what_did_not_change(tmp_path: Path) -> None:
    make_trainer(tmp_path, freeze_backbone=True).train()
    blobs = [next(path.glob("datastore-*")) for path in list_checkpoints(tmp_path / "run")]
    assert len({path.stat().st_ino for path in blobs}) == 1


# kills


def kill_while_training(folder: Path, generator: random.Random) -> bool:
    """Trains in a child and kills it at a random moment, often while it saves.

    Returns:
        Whether it was killed before it came to its end.
    """
    reader, writer = os.pipe()

    def work() -> None:
        class Tell(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                os.write(writer, b".")

        trainer = make_trainer(folder, save_steps=1)
        trainer.add_callback(Tell())
        found = list_checkpoints(folder / "run")
        trainer.train(resume_from_checkpoint=True if found else None)
        os.write(writer, b"!")

    pid = in_child(work)
    os.close(writer)
    for _ in range(generator.randrange(1, 3)):
        if os.read(reader, 1) in (b"!", b""):
            break
    if generator.random() < 0.8:  # else it may come to its end
        select_timeout = generator.uniform(0, 0.1)
        signal.sigtimedwait([], select_timeout)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(reader)
    return os.WIFSIGNALED(status)


def survive(folder: Path, tries: int, seed: int) -> int:
    """Kills and resumes until the run is through, again and again; returns how many died of it."""
    whole = make_trainer(folder / "whole", save_steps=1)
    whole.train()
    wanted, generator, killed = outcome(whole), random.Random(seed), 0
    for number in range(tries // 4):
        run = folder / f"round-{number}"
        for _ in range(4):
            killed += kill_while_training(run, generator)
            for path in list_checkpoints(run / "run"):
                assert problem_of(path) is None, path
        trainer = make_trainer(run, save_steps=1)
        trainer.train(resume_from_checkpoint=True if list_checkpoints(run / "run") else None)
        found = outcome(trainer)
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        assert not (run / "run" / STAGING).exists()
        shutil.rmtree(run)
    return killed


@pytest.mark.slow
def test_a_run_survives_kills(tmp_path: Path) -> None:
    assert survive(tmp_path, 8, 0) >= 2


@pytest.mark.faults
def test_a_run_survives_many_kills(tmp_path: Path) -> None:
    killed = survive(tmp_path, 240, 1)
    print(f"240 runs were to be killed or to end; {killed} were killed")
    assert killed >= 100


def test_a_kill_while_a_checkpoint_is_published_loses_none(tmp_path: Path, stopped: Path) -> None:
    """At each file operation of a save in turn: the older checkpoint is whole, or the new one."""
    run = tmp_path / "run"
    shutil.copytree(stopped / "run", run)
    shutil.rmtree(run / "checkpoint-4")
    shutil.copytree(run, tmp_path / "counted")
    events = count_events(lambda: save_again(tmp_path / "counted"))
    assert events > 5
    for moment in range(events):
        copy = tmp_path / f"copy-{moment}"
        shutil.copytree(run, copy)
        pid = in_child(partial(die_at, moment, partial(save_again, copy)))
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        newest, _ = newest_whole(copy)
        assert newest is not None
        save_again(copy)
        assert [path.name for path in list_checkpoints(copy)] == ["checkpoint-4"]
        assert {path.name for path in copy.iterdir()} == {"checkpoint-4"}


def save_again(run: Path) -> None:
    """What `KnnTrainer._save_checkpoint` does with folders, without training."""
    staging = resuming.start_staging(run)
    (staging / "checkpoint-4").mkdir()
    (staging / "checkpoint-4" / "model").write_text("weights")
    resuming.publish(run, "checkpoint-4")
    resuming.rotate(run, 1, None)


def count_events(work: Callable[[], object]) -> int:
    seen = [0]

    def count() -> None:
        seen[0] += 1

    with watching(count):
        work()
    return seen[0]


def die_at(moment: int, work: Callable[[], object]) -> None:
    seen = [0]

    def count() -> None:
        if seen[0] == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        seen[0] += 1

    with watching(count):
        work()


class watching:
    """Calls something before each file operation of `hf_knn.training.checkpoints`."""

    def __init__(self, seen: Callable[[], None]) -> None:
        self.seen, self.patch = seen, pytest.MonkeyPatch()

    def __enter__(self) -> None:
        def before(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                self.seen()
                return function(*args, **options)

            return call

        self.patch.setattr(os, "rename", before(os.rename))
        self.patch.setattr(os, "replace", before(os.replace))
        self.patch.setattr(os, "unlink", before(os.unlink))
        self.patch.setattr(os, "rmdir", before(os.rmdir))
        for name in ("exchange", "fsync_path", "fsync_tree", "seal"):
            self.patch.setattr(resuming, name, before(getattr(resuming, name)))

    def __exit__(self, *_: object) -> None:
        self.patch.undo()
