"""Nobody names a head: linear, ridge, kernel and lda are compared, and the best one is taken."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmark"))  # the offline pictures

from catalog.offline_backbones import build_backbone
from catalog.offline_tasks import load_pictures
from hf_knn import KnnForImageClassification, KnnTrainer, KnnTrainingArguments


def main() -> None:
    """Compare, train, tune and measure."""
    pictures = load_pictures("digits").train_test_split(0.3, seed=0, stratify_by_column="label")
    labels = pictures["train"].features["label"].names
    model = KnnForImageClassification.from_backbone(build_backbone("efficientnet-lite0"), labels)
    args = KnnTrainingArguments("outputs/best_head", freeze_backbone=True)
    trainer = KnnTrainer(model, args, train_dataset=pictures["train"])
    trainer.train()
    assert trainer.head_choice is not None
    for score in trainer.head_choice.table:
        alone, best = score.alone, score.best
        print(f"{score.head:8} {alone.accuracy:.3f} {best.accuracy:.3f} λ {best.knn_weight:g}")
    print(trainer.head_choice.say())
    trainer.tune()  # goes on with what the chosen head said of the pictures held out
    print(trainer.evaluate(pictures["test"]))


if __name__ == "__main__":
    main()
