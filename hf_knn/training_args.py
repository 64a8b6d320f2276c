"""The arguments of `KnnTrainer`: those of `TrainingArguments` and the k-NN ones."""

import math
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from .functional import LossNormalization
from .tuning import Criterion


@dataclass
class KnnTrainingArguments(TrainingArguments):
    """Arguments of `KnnTrainer`; what is not listed here is a `TrainingArguments` field.

    Args:
        freeze_backbone: train the head alone, on features that are computed once.
        knn_loss_alpha: how much harder the loss looks at what k-NN finds hard, >= 0; 0 is exactly
            the plain loss.
        knn_loss_clamp: the largest surprise ``-log p_knn`` that counts, > 0.
        knn_loss_normalize: `none` (published) or `mean`: factors divided by their batch mean.
        tune_criterion: see `hf_knn.tune`; None chooses by the number of labels.
        tune_folds: folds of the cross-validation when there is no validation set, >= 2.
        on_bad_image: `fail` or `skip` at pictures that cannot be decoded.
        feature_precision: `fp32`, `bf16` or `fp16` for computing features.
        feature_cache: keep computed features for the next run.
    """

    freeze_backbone: bool = field(
        default=False, metadata={"help": "Train the head alone, on features computed once."}
    )
    knn_loss_alpha: float = field(
        default=0.0, metadata={"help": "Weight of -log p_knn in the loss; 0 is the plain loss."}
    )
    knn_loss_clamp: float = field(
        default=100.0, metadata={"help": "The largest -log p_knn that counts."}
    )
    knn_loss_normalize: str = field(
        default="none", metadata={"help": "'none' (published) or 'mean': factors over their mean."}
    )
    tune_criterion: str | None = field(
        default=None, metadata={"help": "What k, temperature and lambda are chosen by."}
    )
    tune_folds: int = field(
        default=5, metadata={"help": "Folds of cross-validation without a validation set."}
    )
    on_bad_image: str = field(
        default="fail", metadata={"help": "'fail' or 'skip' at pictures that cannot be decoded."}
    )
    feature_precision: str = field(
        default="fp32", metadata={"help": "'fp32', 'bf16' or 'fp16' for computing features."}
    )
    feature_cache: bool = field(
        default=True, metadata={"help": "Keep computed features for the next run."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "The sample ids must reach the collator."}
    )

    def __post_init__(self) -> None:
        """Checks the k-NN fields.

        Raises:
            ValueError: naming the field, its range and what was found.
        """
        super().__post_init__()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # torch warns at every loader otherwise
        if not (self.knn_loss_alpha >= 0 and math.isfinite(self.knn_loss_alpha)):
            raise ValueError(
                f"Expected `knn_loss_alpha` to be >= 0, but got {self.knn_loss_alpha}."
            )
        if not self.knn_loss_clamp > 0:
            raise ValueError(f"Expected `knn_loss_clamp` to be > 0, but got {self.knn_loss_clamp}.")
        if self.tune_folds < 2:
            raise ValueError(f"Expected `tune_folds` to be >= 2, but got {self.tune_folds}.")
        _check("knn_loss_normalize", self.knn_loss_normalize, list(LossNormalization))
        if self.tune_criterion is not None:
            _check("tune_criterion", self.tune_criterion, list(Criterion))
        _check("on_bad_image", self.on_bad_image, ["fail", "skip"])
        _check("feature_precision", self.feature_precision, ["fp32", "bf16", "fp16"])
        if self.knn_loss_alpha and not self.freeze_backbone:
            raise ValueError(
                "Expected `knn_loss_alpha` to be 0 unless `freeze_backbone` is set, but got "
                f"{self.knn_loss_alpha}; reweighted fine-tuning is not supported yet."
            )


def _check(name: str, value: str, choices: list[str]) -> None:
    allowed = [str(choice) for choice in choices]
    if value not in allowed:
        raise ValueError(f"Expected `{name}` to be one of {allowed}, but got {value!r}.")
