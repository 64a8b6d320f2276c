"""The arguments of `KnnTrainer`: those of `TrainingArguments` and the k-NN ones."""

import copy
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..core.config import Head
from ..core.votes import ClassWeighting
from ..data.augmentation import Augmentation
from ..fit import linear
from ..fit.blend import Criterion
from ..fit.grids import LossNormalization
from ..fit.heads import PROBE_GRIDS
from ..model.backbones import AUTO_HEAD
from ..store.index import parse_memory
from ..store.kinds import AUTO, FLAT, LATENCY

ARGUMENTS_NAME = "training_args.json"
"""File of a saved model with the arguments; a pickle is nobody's friend."""

_PLACES = frozenset(
    {"output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "hub_token"}
    | {"push_to_hub_token", "deepspeed", "fsdp_config"}
)
"""Arguments that say where something lies here, or who runs it, whatever they look like."""

_LOOKS_LIKE_A_PLACE = re.compile(r"(?:^|[\s\"'=,(\[{])(?:~|\.{0,2}[/\\]|[A-Za-z]:[/\\])")


HEAD = linear.HEAD
"""On features that were computed once: seconds."""

FINE_TUNING = linear.Recipe(10, 5e-5, 32, 0.0)
"""Of the backbone too."""

_OF_DESCENT = (
    "max_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "gradient_accumulation_steps",
    "neftune_noise_alpha", "bf16", "fp16", "label_smoothing_factor", "knn_loss_alpha",
    "knn_loss_gamma", "probe_grid",
)  # fmt: skip
"""Fields, beside those of a `Recipe`, that say how a head descends a gradient."""


@dataclass
class KnnTrainingArguments(TrainingArguments):
    """Arguments of `KnnTrainer`; what is not listed here is a `TrainingArguments` field.

    A value of None, the default of the first six and of `head`, is replaced when the arguments are
    made, by what suits the training: `HEAD` with `freeze_backbone`, else `FINE_TUNING`. A value
    that is given stays, also one that is a default of `TrainingArguments`; so does what was chosen
    before, when arguments are copied. `hf-knn train` has the same defaults, except that it skips
    pictures that cannot be decoded and lists them, where Python raises.

    Args:
        num_train_epochs: passes over the training pictures: 60 of a head alone, 10 with the
            backbone.
        learning_rate: at the start: 1e-3 of a head alone, 5e-5 with the backbone.
        per_device_train_batch_size: 256 features, or 32 pictures.
        weight_decay: 0.1 of a head alone, 0 with the backbone.
        seed: of the head's start, of batches and folds: 0, as for `hf-knn train`.
        save_strategy: `no` of a head alone, which trains in seconds, unless `save_steps`,
            `push_to_hub` or `load_best_model_at_end` ask for checkpoints; else `steps`.
        save_steps: see `TrainingArguments`: 500.
        per_device_eval_batch_size: pictures of a forward pass that computes features: 32.
        freeze_backbone: train the head alone, on features that are computed once.
        head: `linear`, `mlp`, `ridge`, `kernel` or `lda`. None and `auto`: the model's own, if it
            was named when the model was made or loaded; else with `freeze_backbone` the best of
            linear, ridge, kernel and lda, alone or beside the neighbours: see `head_choice` of the
            trainer. It is linear where the backbone is trained, and where something is given that
            only descending a gradient uses: a rate, epochs, a batch size, `knn_loss_alpha`,
            `probe_grid`, `label_smoothing_factor`, … None becomes `auto` when the arguments are
            made, unless one of the first four is given.
        trainable_blocks: train the last so many blocks of the backbone only, with what comes after
            them; None trains all.
        augmentation: `paper` (resize, random crop, flip), `flip` or `none`, when the backbone is
            trained; pictures to be stored or measured are never augmented.
        knn_loss_alpha: how much harder the loss looks at what k-NN finds hard, >= 0; 0 is exactly
            the plain loss.
        knn_loss_clamp: the largest surprise ``-log p_knn`` that counts, > 0.
        knn_loss_gamma: exponent of the focal form ``(1 - p_knn) ** gamma``, >= 0; 0 switches it
            off.
        knn_loss_normalize: `none` (published) or `mean`: factors divided by their mean over the
            training rows, so that they do not act as a larger learning rate.
        class_weights: `none`, `inverse` or `inverse_sqrt` of the class counts, for long tails.
        probe_grid: train many heads on the cached features at once and keep the best on held-out
            rows: `small`, `paper` or `paper_self_supervised`; None trains one head with the rates
            and epochs given here. Needs `freeze_backbone`.
        knn_refresh: when a backbone that is being trained gets a new datastore: `epoch`, `never`
            (the one of the start stays until the end), or a number of steps.
        knn_refresh_tune: choose k and temperature of the loss anew at each refresh.
        knn_queries: `snapshot` asks about the features of the last refresh, `live` about those of
            the step.
        knn_index: `auto`, `auto:latency`, `flat` or a faiss factory string, see
            `Datastore.from_features`.
        knn_max_memory: what the index may take, such as `2GB`; None for no limit.
        tune_criterion: see `hf_knn.tune`; None chooses by the number of labels.
        calibrate: also scale the temperatures of head and blend on the rows that `tune` chooses on.
        learn_metric: learn a linear map for the datastore's rows, and keep it where neighbours find
            more of the rows held out with it, see `hf_knn.fit.choose_metric`. Needs
            `freeze_backbone`, and a loss that is not reweighted.
        tune_folds: folds of the cross-validation when there is no validation set, >= 2.
        group_by: a column of the dataset; pictures with the same value stay on one side of every
            fold.
        on_bad_image: `fail` or `skip` at pictures that cannot be decoded.
        feature_precision: `fp32`, `bf16` or `fp16` for computing features.
        feature_backend: `torch`, `onnx`, `openvino` or `auto` for computing features; None takes
            `$HF_KNN_BACKEND`, else `auto`, see `extract_features`.
        feature_cache: keep computed features for the next run.
    """

    num_train_epochs: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": f"Default: {HEAD[0]:g} of a head alone, else {FINE_TUNING[0]:g}."},
    )
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": f"Default: {HEAD[1]:g} of a head alone, else {FINE_TUNING[1]:g}."},
    )
    per_device_train_batch_size: int | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": f"Default: {HEAD[2]} features of a head alone, {FINE_TUNING[2]} pictures."
        },
    )
    weight_decay: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": f"Default: {HEAD[3]:g} of a head alone, else {FINE_TUNING[3]:g}."},
    )
    seed: int = field(default=0, metadata={"help": "Of the head's start, batches and folds."})
    save_strategy: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Default: 'no' of a head alone, else 'steps'."}
    )
    save_steps: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Default: 500; see `save_strategy`."}
    )
    per_device_eval_batch_size: int = field(
        default=32, metadata={"help": "Pictures of a forward pass that computes features."}
    )
    freeze_backbone: bool = field(
        default=False, metadata={"help": "Train the head alone, on features computed once."}
    )
    head: str | None = field(
        default=None, metadata={"help": "Name of the head, or 'auto': the best of several."}
    )
    trainable_blocks: int | None = field(
        default=None, metadata={"help": "Train the last so many blocks of the backbone only."}
    )
    augmentation: str = field(
        default="paper", metadata={"help": "'paper' (crop and flip), 'flip' or 'none'."}
    )
    knn_loss_alpha: float = field(
        default=0.0, metadata={"help": "Weight of -log p_knn in the loss; 0 is the plain loss."}
    )
    knn_loss_clamp: float = field(
        default=100.0, metadata={"help": "The largest -log p_knn that counts."}
    )
    knn_loss_gamma: float = field(
        default=0.0, metadata={"help": "Exponent of the focal form (1 - p_knn)^gamma; 0 is off."}
    )
    knn_loss_normalize: str = field(
        default="none", metadata={"help": "'none' (published) or 'mean': factors over their mean."}
    )
    class_weights: str = field(
        default="none", metadata={"help": "'none', 'inverse' or 'inverse_sqrt' of class counts."}
    )
    probe_grid: str | None = field(
        default=None, metadata={"help": "Sweep: 'small', 'paper' or 'paper_self_supervised'."}
    )
    knn_refresh: str = field(
        default="epoch", metadata={"help": "When the datastore is rebuilt: epoch, never, N steps."}
    )
    knn_refresh_tune: bool = field(
        default=False, metadata={"help": "Choose the loss's k and temperature at each refresh."}
    )
    knn_queries: str = field(
        default="snapshot", metadata={"help": "Training queries: 'snapshot' or 'live' features."}
    )
    knn_index: str = field(
        default=AUTO, metadata={"help": "'auto', 'auto:latency', 'flat' or a faiss factory string."}
    )
    knn_max_memory: str | None = field(
        default=None, metadata={"help": "What the index may take, such as 2GB."}
    )
    tune_criterion: str | None = field(
        default=None, metadata={"help": "What k, temperature and lambda are chosen by."}
    )
    calibrate: bool = field(
        default=False, metadata={"help": "Scale the temperatures of head and blend when tuning."}
    )
    learn_metric: bool = field(
        default=False, metadata={"help": "Learn a metric; keep it where neighbours gain by it."}
    )
    tune_folds: int = field(
        default=5, metadata={"help": "Folds of cross-validation without a validation set."}
    )
    group_by: str | None = field(
        default=None, metadata={"help": "Column of what belongs together: never split over folds."}
    )
    on_bad_image: str = field(
        default="fail", metadata={"help": "'fail' or 'skip' at pictures that cannot be decoded."}
    )
    feature_precision: str = field(
        default="fp32", metadata={"help": "'fp32', 'bf16' or 'fp16' for computing features."}
    )
    feature_backend: str | None = field(
        default=None, metadata={"help": "'torch', 'onnx', 'openvino' or 'auto' for features."}
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
        self._resolve()
        super().__post_init__()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # torch warns at every loader otherwise
        for name in ("knn_loss_alpha", "knn_loss_gamma"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"Expected `{name}` to be >= 0, but got {value}.")
        if not self.knn_loss_clamp > 0:
            raise ValueError(f"Expected `knn_loss_clamp` to be > 0, but got {self.knn_loss_clamp}.")
        if self.tune_folds < 2:
            raise ValueError(f"Expected `tune_folds` to be >= 2, but got {self.tune_folds}.")
        _check_choice("knn_loss_normalize", self.knn_loss_normalize, list(LossNormalization))
        if self.tune_criterion is not None:
            _check_choice("tune_criterion", self.tune_criterion, list(Criterion))
        _check_choice("on_bad_image", self.on_bad_image, ["fail", "skip"])
        _check_choice("feature_precision", self.feature_precision, ["fp32", "bf16", "fp16"])
        _check_choice("class_weights", self.class_weights, list(ClassWeighting))
        _check_choice("augmentation", self.augmentation, list(Augmentation))
        if self.head is not None:
            _check_choice("head", self.head, [AUTO_HEAD, *Head])
        _check_choice("knn_queries", self.knn_queries, ["snapshot", "live"])
        self.knn_refresh = str(self.knn_refresh)
        if self.knn_refresh not in ("epoch", "never") and not self.refresh_steps:
            raise ValueError(
                "Expected `knn_refresh` to be 'epoch', 'never' or a number of steps, "
                f"but got {self.knn_refresh!r}."
            )
        blocks = self.trainable_blocks
        if blocks is not None and (self.freeze_backbone or blocks < 1):
            raise ValueError(
                "Expected `trainable_blocks` to be >= 1, without freeze_backbone, "
                f"but got {blocks}."
            )
        if self.probe_grid is not None:
            _check_choice("probe_grid", self.probe_grid, list(PROBE_GRIDS))
            if not self.freeze_backbone:
                raise ValueError(
                    "Expected `freeze_backbone` to be True with `probe_grid`, which trains heads "
                    "on features that are computed once."
                )
            if self.reweights:
                raise ValueError(
                    "Expected `knn_loss_alpha` and `knn_loss_gamma` to be 0 with `probe_grid`, "
                    "which has alphas of its own."
                )
        if self.learn_metric and (self.reweights or not self.freeze_backbone):
            raise ValueError(
                "Expected `freeze_backbone` to be True with `learn_metric`, and `knn_loss_alpha` "
                "and `knn_loss_gamma` to be 0: rows that backbone or metric were trained on look "
                "easier to neighbours than they are."
            )
        if self.knn_max_memory is not None:
            parse_memory(self.knn_max_memory)
        if self.dataloader_persistent_workers and not self.freeze_backbone:
            raise ValueError(
                "Expected `dataloader_persistent_workers` to be False, since workers that outlive "
                "an epoch would repeat its augmentation; leave it out."
            )

    def _resolve(self) -> None:
        """Puts what suits the training in place of None."""
        if self.save_strategy is None:
            asked = self.save_steps is not None or self.push_to_hub or self.load_best_model_at_end
            self.save_strategy = "no" if self.freeze_backbone and not asked else "steps"
        if self.save_steps is None:
            self.save_steps = TrainingArguments.save_steps
        recipe = HEAD if self.freeze_backbone else FINE_TUNING
        if self.head is None and all(getattr(self, name) is None for name in recipe._fields):
            self.head = AUTO_HEAD
        for name, value in recipe._asdict().items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def write_json(self, folder: Path) -> None:
        """Writes the recipe into a folder, which may be pushed: no token, no place on this machine.

        Args:
            folder: of a checkpoint.
        """
        recipe = {
            name: value
            for name, value in self.to_sanitized_dict().items()
            if name not in _PLACES and not _LOOKS_LIKE_A_PLACE.search(str(value))
        }
        text = json.dumps(recipe, indent=2, default=str)
        (folder / ARGUMENTS_NAME).write_text(text + "\n", encoding="utf-8")

    def quiet(self, folder: str) -> "KnnTrainingArguments":
        """The same recipe without saving, evaluating or talking.

        Args:
            folder: the output folder.
        """
        changes: dict[str, Any] = {
            "output_dir": folder,
            "save_strategy": "no",
            "eval_strategy": "no",
            "logging_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "push_to_hub": False,
            "load_best_model_at_end": False,
            "do_eval": False,
        }
        quiet = copy.copy(self)
        for name, value in changes.items():
            setattr(quiet, name, value)
        return quiet

    @property
    def named_head(self) -> Head | None:
        """The head that the caller named."""
        return None if self.head in (None, AUTO_HEAD) else Head(self.head)

    @property
    def of_descent(self) -> list[str]:
        """Names of the fields that were given and that only a head trained by gradients uses.

        A value counts as given if it is not the usual one, or if the arguments were made with it.
        Those that were copied from arguments count as in these.
        """
        usual = HEAD._asdict() | {name: _default_of(name) for name in _OF_DESCENT}
        given = [name for name, value in usual.items() if getattr(self, name) != value]
        return given or (list(HEAD._fields) if self.head is None else [])

    @property
    def refresh_steps(self) -> int | None:
        """Steps between two refreshes; None if the schedule is another one."""
        return int(self.knn_refresh) if re.fullmatch(r"[1-9]\d*", self.knn_refresh) else None

    @property
    def names_index(self) -> bool:
        """Whether the caller asked for an index, so that the run's own files may bring it."""
        return self.knn_index not in (AUTO, LATENCY, FLAT)

    @property
    def reweights(self) -> bool:
        """Whether the loss asks the datastore."""
        return self.knn_loss_alpha > 0 or self.knn_loss_gamma > 0


def _default_of(name: str) -> Any:
    return KnnTrainingArguments.__dataclass_fields__[name].default


def _check_choice(name: str, value: str, choices: list[str]) -> None:
    allowed = [str(choice) for choice in choices]
    if value not in allowed:
        raise ValueError(f"Expected `{name}` to be one of {allowed}, but got {value!r}.")
