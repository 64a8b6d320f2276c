"""Whole paths: JPEG files to a tuned, saved model, and a taught picture to the next answer.

Two models of the same head: one from features computed once, one from a loop that encodes every
picture in every epoch, as a linear probe without a cache does. Both are run in full. For many files
the linear head and the one that is chosen where none is named are compared, each from no features.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from harness import report, timings_of
from jpegs import jpeg_folder
from PIL import ImageOps
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))  # benchmark/, where the catalog lies

from catalog.backbones import build_backbone
from hf_knn import KnnForImageClassification, KnnTrainer, KnnTrainingArguments, extract_features
from hf_knn.data import decode_image

PEER = "a linear probe that encodes in each epoch"
_BATCH, _HELD_OUT = 32, 0.2
_LEARNING_RATE = 1e-3


def arguments(folder: Path, epochs: int | None) -> KnnTrainingArguments:
    """For a linear head of so many epochs; None leaves the head to be chosen."""
    linear: dict[str, Any] = {} if epochs is None else {
        "num_train_epochs": epochs, "learning_rate": _LEARNING_RATE,
        "per_device_train_batch_size": _BATCH,
    }  # fmt: skip
    return KnnTrainingArguments(
        str(folder), freeze_backbone=True, report_to=[], disable_tqdm=True, save_strategy="no",
        logging_strategy="no", **linear,
    )  # fmt: skip


def ours(
    backbone: Path, train: Any, test: Any, epochs: int | None, output: Path
) -> dict[str, float | str]:
    """Seconds by phase to a tuned, saved checkpoint, its head and its accuracy."""
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        now = time.perf_counter()
        seconds[name] = now - started
        started = now

    names = train.features["label"].names
    torch.manual_seed(0)
    model = KnnForImageClassification.from_backbone(backbone, names)
    lap("open the backbone")
    features = extract_features(model, train, progress=False)
    lap("features of the training pictures")
    trainer = KnnTrainer(model, arguments(output, epochs), train_dataset=features)
    trainer.train()
    lap("heads and datastore")
    trainer.tune()
    lap("tuning by cross-validation")
    model.save_pretrained(output)
    lap("saving")
    seconds["all to the saved checkpoint"] = sum(seconds.values())
    held_out = extract_features(model, test, progress=False)
    metrics = trainer.evaluate(held_out)
    accuracies = {
        f"accuracy {voice}": metrics[f"eval_{voice}_top1"] for voice in ("head", "knn", "blend")
    }
    return {"head": str(model.config.head)} | seconds | accuracies


def re_encoding(backbone: Path, train: Any, test: Any, epochs: int) -> dict[str, float]:
    """A linear probe whose loop runs the frozen backbone on every batch of every epoch."""
    from transformers import AutoImageProcessor, AutoModel

    torch.manual_seed(0)
    model, processor = (
        AutoModel.from_pretrained(backbone),
        AutoImageProcessor.from_pretrained(backbone),
    )
    model.eval().requires_grad_(False)
    head = nn.Linear(1280, len(train.features["label"].names))
    optimizer = torch.optim.AdamW(head.parameters(), lr=_LEARNING_RATE)

    def encode(rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = processor(images=rows["image"], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            hidden = model(pixel_values=pixels).last_hidden_state
        return hidden.mean(dim=(2, 3)), torch.tensor(rows["label"])

    started = time.perf_counter()
    laps = []
    for epoch in range(epochs):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))
        for start in range(0, len(train), _BATCH):
            features, labels = encode(train[order[start : start + _BATCH].tolist()])
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(features), labels).backward()
            optimizer.step()
        laps.append(time.perf_counter() - started)
    right = 0
    for start in range(0, len(test), _BATCH):
        features, labels = encode(test[start : start + _BATCH])
        right += int((head(features).argmax(1) == labels).sum())
    return {"all": laps[-1], "one epoch": laps[0], "accuracy head": right / len(test)}


def teach_once(checkpoint: Path, picture: Path, rounds: int = 10) -> dict[str, float]:
    """Milliseconds from an opened model and a file to the next answer that knows it."""
    model = KnnForImageClassification.from_pretrained(checkpoint).eval()
    image = ImageOps.mirror(decode_image(picture))  # one that is not stored
    found: dict[str, list[float]] = {"teach": [], "next answer": []}
    for number in range(rounds):
        started = time.perf_counter()
        model.teach([ImageOps.mirror(decode_image(picture))], [f"new {number}"])
        taught = time.perf_counter()
        pixels = model.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            model(pixel_values=pixels)
        found["teach"].append(1000 * (taught - started))
        found["next answer"].append(1000 * (time.perf_counter() - taught))
        model.undo()
    return {name: float(torch.tensor(values).median()) for name, values in found.items()}


def _folder_of(count: int) -> Path:
    return jpeg_folder(count, 20 if count < 1000 else 50)


def _parts_of(count: int) -> Any:
    from datasets import load_dataset

    rows = load_dataset("imagefolder", data_dir=str(_folder_of(count)), split="train")
    return rows.train_test_split(_HELD_OUT, seed=0, stratify_by_column="label")


def main(
    pictures: Annotated[int, typer.Option(help="Files of the comparison.")] = 400,
    epochs: Annotated[int, typer.Option(help="Of both.")] = 20,
    many: Annotated[int, typer.Option(help="Files of the headline; 0 leaves it out.")] = 5000,
    output: Annotated[Path, typer.Option(help="JSON file.")] = Path("outputs/speed/path.json"),
) -> None:
    """Time whole paths in full, once each; graphs and choices of backends are made anew."""
    from datasets import disable_progress_bars

    disable_progress_bars()
    backbone = build_backbone("efficientnet-lite0")
    facts: dict[str, Any] = {}
    with TemporaryDirectory() as scratch:
        cache = Path(scratch) / "cache"
        os.environ["HF_KNN_CACHE"] = str(cache)

        def run(count: int, epochs: int | None, name: str) -> tuple[Any, Any, Path, float]:
            shutil.rmtree(cache, ignore_errors=True)
            parts = _parts_of(count)
            place = Path(scratch) / f"model-{name}"
            found = ours(backbone, parts["train"], parts["test"], epochs, place)
            files = f"{len(parts['train'])} + {len(parts['test'])} files"
            facts[f"{files}, {name}"] = found
            return parts["train"], parts["test"], place, float(found["all to the saved checkpoint"])

        train, test, place, seconds = run(pictures, epochs, "hf_knn")
        facts[PEER] = peer = re_encoding(backbone, train, test, epochs)
        timings = timings_of({PEER: [peer["all"]], "hf_knn": [seconds]}, PEER)
        facts["milliseconds"] = teach_once(place, sorted(_folder_of(pictures).rglob("*.jpg"))[0])
        if many:
            linear = run(many, epochs, "a linear head")[3]
            facts["chosen against linear"] = run(many, None, "the head that is chosen")[3] / linear
    print(json.dumps(facts, indent=2))
    title = f"{pictures} JPEG files to a tuned, saved model, {epochs} epochs"
    report(title, timings, PEER, output, **facts)


if __name__ == "__main__":
    typer.run(main)
