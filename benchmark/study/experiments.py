"""The two offline experiments: a head on frozen features, and a small model trained from scratch.

Each split touches its test pictures once, after everything has been chosen.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars, enable_progress_bars
from transformers import PrinterCallback, set_seed
from transformers.utils import logging

from catalog.offline_backbones import build_backbone
from catalog.offline_tasks import load_pictures
from catalog.splits import split_indices
from hf_knn import (
    KnnForImageClassification,
    KnnTrainer,
    KnnTrainingArguments,
    extract_features,
)

FIXED_CELL = {"k": 20, "knn_temperature": 0.14, "knn_weight": 0.5}
"""Reported beside the tuned cell, so that tuning cannot flatter itself."""

SCRATCH_FRACTIONS = (0.6, 0.15, 0.25)
"""Train, validation and test when the whole model is trained, which needs more pictures."""

Progress = Callable[[str], None]


@dataclass
class SplitResult:
    """What one split of one task gave.

    Attributes:
        seed: of the split, and of the head or model.
        chosen: k, temperature, λ, and the criterion that chose them on validation.
        validation: the criterion's score of the chosen cell.
        test: what `KnnTrainer.evaluate` measured on the test pictures, tuned cell.
        fixed_blend_top1: test top-1 of the blend with the fixed cell.
        rows: pictures in train, validation and test.
    """

    seed: int
    chosen: dict[str, Any]
    validation: float
    test: dict[str, float]
    fixed_blend_top1: float
    rows: dict[str, int]


@dataclass
class TaskResult:
    """What one task gave over its splits.

    Attributes:
        task: name of the task.
        backbone: name of the backbone.
        how: one line on what was trained.
        splits: one result per seed.
        seconds: wall-clock seconds by phase.
        images: pictures that went through the backbone for features, by this run.
        model: the model of the first split.
        test_rows: row numbers of the first split's test pictures.
    """

    task: str
    backbone: str
    how: str
    splits: list[SplitResult] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    images: int = 0
    model: KnnForImageClassification | None = None
    test_rows: list[int] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of a block to a phase."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def keep_first(self, model: KnnForImageClassification, test_rows: list[int]) -> None:
        """Keeps the model of the first split, which becomes the checkpoint."""
        if self.model is None:
            self.model, self.test_rows = model, test_rows


def hide_progress_bars() -> None:
    """Hides the short bars of loading and casting; drawing and extracting show theirs."""
    disable_progress_bars()
    logging.disable_progress_bar()


def run_frozen(
    task: str,
    backbone: str,
    seeds: int,
    epochs: int,
    limit: int | None,
    cache_dir: Path | None,
    say: Progress,
) -> TaskResult:
    """A linear head beside k-NN on frozen features, several splits of the same features.

    Args:
        task: name in `catalog.tasks.TASKS`.
        backbone: name in `catalog.backbones.BACKBONES`.
        seeds: how many splits.
        epochs: of the head.
        limit: pictures of the task, None for all.
        cache_dir: where pictures, backbones and features are kept.
        say: told what happens.
    """
    result = TaskResult(task, backbone, f"linear head, {epochs} epochs, frozen backbone")
    enable_progress_bars()
    with result.phase("pictures"):
        rows = load_pictures(task, cache_dir, limit)
    hide_progress_bars()
    folder = build_backbone(backbone, cache_dir)
    names = rows.features["label"].names
    with result.phase("features"):
        model = KnnForImageClassification.from_backbone(folder, names)
        logging.enable_progress_bar()
        cache = None if cache_dir is None else cache_dir / "features"
        features = extract_features(model, rows, cache_dir=cache)
    hide_progress_bars()
    result.images = features.computed
    features.paths = list(rows["name"])
    for seed in range(seeds):
        say(f"{task}: split {seed + 1} of {seeds}")
        set_seed(seed)  # of the new head
        indices = split_indices(features.labels.numpy(), seed)
        parts = [features.select(part) for part in indices]
        model = KnnForImageClassification.from_backbone(folder, names)
        arguments = {
            "freeze_backbone": True,
            "num_train_epochs": epochs,
            "per_device_train_batch_size": 256,
            "weight_decay": 0.1,
        }
        _run_split(result, model, parts, seed, arguments)
        result.keep_first(model, indices[2].tolist())
    return result


def run_from_scratch(
    task: str,
    backbone: str,
    seeds: int,
    epochs: int,
    limit: int | None,
    cache_dir: Path | None,
    say: Progress,
) -> TaskResult:
    """A small model trained from scratch on the pictures, then its datastore.

    Args:
        task: name in `catalog.tasks.TASKS`.
        backbone: name in `catalog.backbones.BACKBONES`, with random weights.
        seeds: how many splits.
        epochs: of the whole model.
        limit: pictures of the task, None for all.
        cache_dir: where pictures and backbones are kept.
        say: told what happens.
    """
    result = TaskResult(task, backbone, f"trained from scratch, {epochs} epochs")
    enable_progress_bars()
    with result.phase("pictures"):
        rows = load_pictures(task, cache_dir, limit)
    hide_progress_bars()
    folder = build_backbone(backbone, cache_dir)
    rows = rows.add_column("sample_id", list(range(len(rows))))
    for seed in range(seeds):
        say(f"{task}: split {seed + 1} of {seeds}, training the whole model")
        set_seed(seed)  # of the new head; the backbone's random weights are those of its folder
        indices = split_indices(rows["label"][:], seed, SCRATCH_FRACTIONS)
        parts = [rows.select(part) for part in indices]
        model = KnnForImageClassification.from_backbone(folder, rows.features["label"].names)
        arguments = {
            "num_train_epochs": epochs, "per_device_train_batch_size": 64,
            "augmentation": "none",  # a cropped or mirrored digit is another one
        }  # fmt: skip
        _run_split(result, model, parts, seed, arguments)
        result.keep_first(model, indices[2].tolist())
    return result


def _run_split(
    result: TaskResult,
    model: KnnForImageClassification,
    parts: list[Any],
    seed: int,
    arguments: dict[str, Any],
) -> None:
    train, validation, test = parts
    with tempfile.TemporaryDirectory() as scratch:
        trainer = KnnTrainer(
            model,
            KnnTrainingArguments(
                scratch, seed=seed, learning_rate=1e-3, warmup_steps=0.05, disable_tqdm=True,
                save_strategy="no", logging_strategy="no", report_to=[], **arguments,
            ),
            train_dataset=train,
            eval_dataset=validation,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        with result.phase("training"):
            trainer.train()
        with result.phase("tuning"):
            tuned = trainer.tune()
        with result.phase("test"):
            chosen = {name: getattr(model.config, name) for name in FIXED_CELL}
            _configure(model, FIXED_CELL)
            fixed = trainer.evaluate(test)["eval_blend_top1"]
            _configure(model, chosen)
            measured = trainer.evaluate(test)  # last: it is what the card of the model says
    sizes = dict(zip(("train", "validation", "test"), map(len, parts), strict=True))
    chosen |= {"criterion": tuned.criterion}
    result.splits.append(SplitResult(seed, chosen, tuned.score, measured, fixed, sizes))


def _configure(model: KnnForImageClassification, cell: dict[str, Any]) -> None:
    for name, value in cell.items():
        setattr(model.config, name, value)
