"""Adds to linear_probe.py: the head is solved in closed form, without epochs or rates."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmark"))  # the offline pictures

from catalog.offline_backbones import build_backbone
from catalog.offline_tasks import load_pictures
from hf_knn import KnnForImageClassification, KnnTrainer, KnnTrainingArguments


def main() -> None:
    """Train, tune and measure."""
    pictures = load_pictures("digits").train_test_split(0.3, seed=0, stratify_by_column="label")
    labels = pictures["train"].features["label"].names
    model = KnnForImageClassification.from_backbone(
        build_backbone("efficientnet-lite0"), labels, head="ridge"
    )
    args = KnnTrainingArguments("outputs/ridge", freeze_backbone=True)
    trainer = KnnTrainer(model, args, train_dataset=pictures["train"])
    print(trainer.train().metrics)  # the regulariser, chosen by exact leave-one-out
    trainer.tune()
    print(trainer.evaluate(pictures["test"]))


if __name__ == "__main__":
    main()
