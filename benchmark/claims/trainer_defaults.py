"""`KnnTrainer` with its defaults beside `hf-knn train`: the same pictures, the same test pictures.

    python benchmark/claims/trainer_defaults.py [--seeds 2] [--output DIR]

Openmoji categories and a frozen EfficientNet-Lite0. Features are computed once, before either side
is timed, so that what is compared is the training, the tuning and the measuring; the command's time
is that of its process, imports included.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # benchmark/, where the catalog lies

from catalog.offline_backbones import build_backbone
from catalog.offline_tasks import load_pictures
from hf_knn import (
    KnnForImageClassification,
    KnnTrainer,
    KnnTrainingArguments,
    extract_features,
    load_splits,
)
from study.provenance import write_findings

TASK, BACKBONE = "openmoji-categories", "efficientnet-lite0"
MOST_POINTS, MOST_TIME = 1.0, 2.0


def write_folders(folder: Path, seed: int) -> None:
    """Writes the pictures as train/ and test/ with a folder per class."""
    pictures = load_pictures(TASK).train_test_split(0.3, seed=seed, stratify_by_column="label")
    names = [re.sub(r"\W+", "-", name) for name in pictures["train"].features["label"].names]
    for part in ("train", "test"):
        for number, row in enumerate(pictures[part]):
            place = folder / part / names[row["label"]]
            place.mkdir(parents=True, exist_ok=True)
            row["image"].convert("RGB").save(place / f"{number:04}.png")


def by_command(backbone: Path, folder: Path, scratch: Path) -> dict[str, float]:
    """Accuracies and seconds of `hf-knn train`."""
    output = scratch / "command"
    words = ["train", folder, "-o", output, "--backbone", backbone]
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "hf_knn_cli", *map(str, words)],
        check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    model = KnnForImageClassification.from_pretrained(output)
    trainer = KnnTrainer(model, KnnTrainingArguments(str(scratch / "run"), freeze_backbone=True))
    return accuracies(trainer.evaluate(load_splits(str(folder))["test"])) | {"seconds": seconds}


def by_trainer(backbone: Path, folder: Path, scratch: Path) -> dict[str, float]:
    """Accuracies and seconds of the README's lines."""
    started = time.perf_counter()
    pictures = load_splits(str(folder))
    names = pictures["train"].features["label"].names
    model = KnnForImageClassification.from_backbone(backbone, names)
    args = KnnTrainingArguments(str(scratch / "trainer"), freeze_backbone=True)
    trainer = KnnTrainer(model, args, train_dataset=pictures["train"])
    trainer.train()
    trainer.tune()
    found = accuracies(trainer.evaluate(pictures["test"]))
    model.save_pretrained(scratch / "model")
    return found | {"seconds": time.perf_counter() - started}


def accuracies(metrics: dict[str, float]) -> dict[str, float]:
    """Percent by voice."""
    return {voice: 100 * metrics[f"eval_{voice}_top1"] for voice in ("head", "knn", "blend")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2, help="splits")
    parser.add_argument("--output", type=Path, default=Path("outputs/trainer_defaults"))
    options = parser.parse_args()
    backbone, runs = build_backbone(BACKBONE), []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "pictures"
            write_folders(folder, seed)
            splits = load_splits(str(folder))
            names = splits["train"].features["label"].names
            model = KnnForImageClassification.from_backbone(backbone, names)
            for rows in splits.values():
                extract_features(model, rows, progress=False)  # kept for both
            command = by_command(backbone, folder, Path(scratch))
            trainer = by_trainer(backbone, folder, Path(scratch))
        runs.append({"seed": seed, "command": command, "trainer": trainer})
        print(runs[-1], flush=True)
        gaps = {voice: trainer[voice] - command[voice] for voice in ("head", "knn", "blend")}
        ratio = trainer["seconds"] / command["seconds"]
        good = all(abs(gap) <= MOST_POINTS for gap in gaps.values()) and ratio <= MOST_TIME
        shown = ", ".join(f"{voice} {gap:+.2f}" for voice, gap in gaps.items())
        print(f"{'PASS' if good else 'FAIL'}: {shown} points, {ratio:.2f} times the time")
    write_findings(options.output / "trainer_defaults.json", runs=runs)


if __name__ == "__main__":
    main()
