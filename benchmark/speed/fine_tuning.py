"""What the datastore costs a step of fine-tuning, beside transformers' own `Trainer`.

Every contestant trains the same small ViT on the same pictures from the same weights. A step is the
time from the end of one update to the end of the next, loading included; refreshes are apart.
"""

import copy
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from datasets import ClassLabel as Classes
from datasets import Dataset, Features, Image, Value
from harness import report, timings_of
from PIL import Image as Pictures
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from hf_knn import KnnForImageClassification, KnnTrainer, KnnTrainingArguments

PEER = "transformers.Trainer"
CLASSES = 20


class Clock(TrainerCallback):
    """Remembers how long each step took, and each refresh."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.refreshes: list[float] = []
        self.last: float | None = None

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """The first step of an epoch is not counted: a refresh comes before it."""
        self.last = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Called by `Trainer` after each update."""
        now = time.perf_counter()
        if self.last is not None:
            self.steps.append(now - self.last)
        self.last = now

    def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Called by `Trainer`."""
        if logs and "knn_refresh_seconds" in logs:
            self.refreshes.append(logs["knn_refresh_seconds"])


def make_pictures(count: int, size: int) -> Dataset:
    """Noise in the colours of its class, as JPEG bytes."""
    generator = np.random.default_rng(0)
    colours = generator.integers(40, 216, (CLASSES, 3))
    rows = []
    for row in range(count):
        noise = generator.integers(-40, 40, (size, size, 3)) + colours[row % CLASSES]
        buffer = io.BytesIO()
        Pictures.fromarray(noise.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    labels = [row % CLASSES for row in range(count)]
    names = Classes(names=[f"colour {c}" for c in range(CLASSES)])
    features = Features({"image": Image(), "label": names, "sample_id": Value("int64")})
    columns = {"image": rows, "label": labels, "sample_id": list(range(count))}
    return Dataset.from_dict(columns, features=features)


def main(
    pictures: Annotated[int, typer.Option(help="Training pictures.")] = 256,
    size: Annotated[int, typer.Option(help="Width and height.")] = 96,
    batch: Annotated[int, typer.Option(help="Pictures per step.")] = 32,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds, one epoch each.")] = 9,
    output: Annotated[Path, typer.Option(help="JSON file.")] = Path(
        "outputs/speed/fine_tuning.json"
    ),
) -> None:
    """Time the steps of an epoch: plain, reweighted by snapshot queries and by live ones."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=size, patch_size=8, hidden_size=192, num_hidden_layers=6, num_attention_heads=3,
        intermediate_size=768,
    )  # fmt: skip
    processor = ViTImageProcessor(size={"height": size, "width": size})
    start = KnnForImageClassification.from_backbone(
        ViTModel(config, add_pooling_layer=False), CLASSES, image_processor=processor
    )
    rows = make_pictures(pictures, size)

    def process(columns: dict[str, Any]) -> dict[str, Any]:
        pixels = processor(images=columns["image"], return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": columns["label"]}

    def plain(folder: str) -> Trainer:
        args = TrainingArguments(folder, **shared, remove_unused_columns=False)
        return Trainer(copy.deepcopy(start), args, train_dataset=rows.with_transform(process))

    def reweighted(folder: str, **options: Any) -> Trainer:
        args = KnnTrainingArguments(folder, augmentation="none", **shared, **options)
        return KnnTrainer(copy.deepcopy(start), args, train_dataset=rows)

    shared: dict[str, Any] = {
        "per_device_train_batch_size": batch, "per_device_eval_batch_size": batch,
        "num_train_epochs": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "learning_rate": 1e-4, "logging_strategy": "no", "dataloader_pin_memory": False,
    }  # fmt: skip
    contestants: dict[str, Callable[[str], Trainer]] = {
        PEER: plain,
        "KnnTrainer, plain loss": reweighted,
        "KnnTrainer, snapshot": lambda folder: reweighted(folder, knn_loss_alpha=0.1),
        "KnnTrainer, live": lambda folder: reweighted(
            folder, knn_loss_alpha=0.1, knn_queries="live"
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    refreshes: list[float] = []
    for number in range(rounds + 1):
        for name, make in contestants.items():
            clock = _train(make)
            if number:  # the first round warms up
                seconds[name].append(mean(clock.steps))
                refreshes += clock.refreshes
    timings = timings_of(seconds, PEER)
    report(
        f"seconds per step of {batch} pictures of {size} x {size}, ViT of 6 x 192",
        timings, PEER, output, refresh_seconds=median(refreshes), rows=pictures,
    )  # fmt: skip
    print(f"a refresh of {pictures} pictures takes {median(refreshes):.2f} s")


def _train(make: Callable[[str], Trainer]) -> Clock:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(folder)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        trainer.train()
    return clock


if __name__ == "__main__":
    typer.run(main)
