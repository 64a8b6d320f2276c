"""Adds to linear_probe.py: learning rates, weight decays and alphas are tried at once."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmark"))  # the offline pictures

from catalog.offline_backbones import build_backbone
from catalog.offline_tasks import load_pictures
from hf_knn import KnnForImageClassification, KnnTrainer, KnnTrainingArguments


def main() -> None:
    """Train all heads on folds, the best on everything, and measure it."""
    pictures = load_pictures("digits").train_test_split(0.3, seed=0, stratify_by_column="label")
    labels = pictures["train"].features["label"].names
    model = KnnForImageClassification.from_backbone(build_backbone("efficientnet-lite0"), labels)
    args = KnnTrainingArguments("outputs/sweep", freeze_backbone=True, probe_grid="small")
    trainer = KnnTrainer(model, args, train_dataset=pictures["train"])
    trainer.train()
    assert trainer.probe_choice is not None
    for row in trainer.probe_choice.table:
        print(row)
    trainer.tune()
    print(trainer.evaluate(pictures["test"]))


if __name__ == "__main__":
    main()
