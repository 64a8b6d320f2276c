"""Adds to linear_probe.py: the backbone is trained too, with a datastore that keeps up with it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmark"))  # the offline pictures

from catalog.offline_backbones import build_backbone
from catalog.offline_tasks import load_pictures
from hf_knn import KnnForImageClassification, KnnTrainer, KnnTrainingArguments


def main() -> None:
    """Train a tiny ViT on digits from scratch; run it again after Ctrl-C and it goes on."""
    pictures = load_pictures("digits").train_test_split(0.3, seed=0, stratify_by_column="label")
    parts = pictures["train"].train_test_split(0.2, seed=0, stratify_by_column="label")
    labels = pictures["train"].features["label"].names
    model = KnnForImageClassification.from_backbone(build_backbone("tiny-vit-digits"), labels)
    args = KnnTrainingArguments(
        "outputs/fine_tuning",
        num_train_epochs=15,
        learning_rate=1e-3,
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=64,
        augmentation="none",  # a flipped digit is another digit
        knn_loss_alpha=0.1,  # look harder at what k-NN finds hard
        knn_loss_normalize="mean",
        knn_refresh="epoch",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_accuracy",
    )
    trainer = KnnTrainer(model, args, train_dataset=parts["train"], eval_dataset=parts["test"])
    is_interrupted = any(Path(str(args.output_dir)).glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=is_interrupted)
    trainer.tune()
    print(trainer.evaluate(pictures["test"]))
    trainer.save_model()


if __name__ == "__main__":
    main()
