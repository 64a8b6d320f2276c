"""Fine-tuning of a whole backbone by `KnnTrainer`, on one split."""

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, set_seed

from catalog.splits import Parts
from hf_knn import KnnForImageClassification, KnnTrainer, KnnTrainingArguments

LEARNING_RATE, BATCH, WEIGHT_DECAY, WARMUP = 1e-4, 64, 0.05, 0.05
"""One recipe (AdamW), not the paper's grid of 24 over 300 epochs: said in the README."""


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model.

    Attributes:
        model: with its own head.
        chosen: how it was trained.
    """

    model: KnnForImageClassification
    chosen: dict[str, Any]

    def head_log_probs(self, features: Tensor) -> Tensor:
        """[B, C] of the head that was trained with the backbone."""
        device = next(self.model.parameters()).device
        with torch.no_grad():
            logits = self.model.eval()(features=features.to(device)).head_logits
        return logits.float().log_softmax(1).cpu()


def fine_tune(
    model: KnnForImageClassification,
    pictures: Dataset,
    parts: Parts,
    seed: int,
    epochs: int,
    augmentation: str,
) -> Tuned:
    """Trains all of a model; all ranks take part.

    Args:
        model: a new one.
        pictures: dataset of all pictures.
        parts: row numbers of the split.
        seed: of the head and the batches.
        epochs: passes over the training pictures.
        augmentation: of the training pictures: `paper`, `flip` or `none`, as the task allows.
    """
    set_seed(seed)
    numbered = pictures.add_column("sample_id", list(range(len(pictures))))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = KnnTrainer(
            model,
            KnnTrainingArguments(
                scratch, seed=seed, learning_rate=LEARNING_RATE, num_train_epochs=epochs,
                per_device_train_batch_size=BATCH, weight_decay=WEIGHT_DECAY, warmup_steps=WARMUP,
                augmentation=augmentation,
                disable_tqdm=True, save_strategy="no", logging_strategy="no", report_to=[],
            ),
            train_dataset=numbered.select(parts.train),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    chosen = {
        "learning_rate": LEARNING_RATE, "epochs": epochs, "weight_decay": WEIGHT_DECAY,
        "augmentation": augmentation,
    }  # fmt: skip
    return Tuned(model, chosen)
