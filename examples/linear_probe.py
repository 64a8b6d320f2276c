"""Features once, then a linear head and a datastore; k, temperature and λ by cross-validation."""

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
    backbone = build_backbone("efficientnet-lite0")  # or "facebook/dinov2-small"
    model = KnnForImageClassification.from_backbone(backbone, labels, head="linear")
    args = KnnTrainingArguments("outputs/linear_probe", freeze_backbone=True)
    trainer = KnnTrainer(model, args, train_dataset=pictures["train"])
    trainer.train()
    chosen = trainer.tune()
    print(f"k {chosen.k}, temperature {chosen.temperature:g}, λ {chosen.knn_weight:g}")
    print(trainer.evaluate(pictures["test"]))
    trainer.save_model()


if __name__ == "__main__":
    main()
