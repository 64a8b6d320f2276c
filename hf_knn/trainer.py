"""`KnnTrainer`: the Hugging Face Trainer with a datastore, a reweighted loss and three voices."""

import copy
import dataclasses
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PrinterCallback
from transformers.trainer_utils import TrainOutput, speed_metrics

from .abstaining import ERROR_RATES, thresholds
from .augmentation import Augment, EpochRows
from .backbone import evaluating, freeze_all_but_last, split_features
from .callbacks import EpochCallback, RefreshCallback
from .checkpoint import made_by
from .collator import KnnCollator
from .configuration_knn import Head
from .data import fingerprint_of, groups_of, labels_of, prepare
from .datastore import Datastore, Neighbors
from .features import ImageFeatures, extract_features
from .fitting import PROBE_GRIDS, Part, fit_closed_form, fit_probe, own_votes, sweep
from .folds import Fold, stratified_folds
from .functional import (
    blend_log_probs,
    floor_log_probs,
    knn_log_probs,
    soften,
)
from .heads import KnnHead
from .hub_trainer import HubTrainer
from .loss import KnnLoss
from .metrics import complementarity, measure, reliability
from .modeling_knn import KnnForImageClassification
from .probe import ProbeChoice
from .probe_settings import ProbeGrid
from .temperature import fit_temperature
from .training_args import ARGUMENTS_NAME, KnnTrainingArguments
from .tuning import Grid, TuneResult, default_grid, has_few_labels, tune
from .votes import OwnVotes

logger = logging.getLogger(__name__)

_EVAL_ROWS = 1024
_VOICES = ("head", "knn", "blend")


class KnnTrainer(HubTrainer):
    """Trains a `KnnForImageClassification`, builds its datastore, tunes and measures it.

    With `freeze_backbone` the features are computed once and the head trains on them; otherwise
    the model is trained on pictures, the datastore that a reweighted loss asks is rebuilt on a
    schedule, and the one that stays is built from the final weights.

    Args:
        model: the model, usually from `KnnForImageClassification.from_backbone`.
        args: see `KnnTrainingArguments`.
        train_dataset: a `datasets.Dataset` with pictures and labels, or `ImageFeatures` with
            `freeze_backbone`.
        eval_dataset: likewise; also what k, temperature and λ are chosen on.
        processing_class: the image processor; None takes the model's own.
        train_transform: of training pictures, instead of `augmentation`: a torchvision transform
            that draws from torch's global generator, which is seeded for each picture and epoch.
        kwargs: see `transformers.Trainer`.

    Attributes:
        train_features: features of the training set, once they are known.
        tune_result: what `tune` found last.
        probe_choice: which head of `probe_grid` was best, with the table of all.

    Raises:
        ValueError: for a dataset without pictures or labels, or labels the model does not have.
    """

    # the loss is a mean over the batch, which Trainer has to divide for gradient accumulation
    loss_is_scaled_for_ga = False
    model: KnnForImageClassification
    args: KnnTrainingArguments

    def __init__(
        self,
        model: KnnForImageClassification,
        args: KnnTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        train_transform: Callable[[Any], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        processor = processing_class or model.image_processor
        model.image_processor = processor
        for dataset in (train_dataset, eval_dataset):
            if processor is None and not isinstance(dataset, ImageFeatures | None):
                raise ValueError(
                    "Expected `processing_class` to turn pictures into tensors, but got None and "
                    "the model has no image processor."
                )
        if isinstance(train_dataset, ImageFeatures) and not args.freeze_backbone:
            raise ValueError(
                "Expected pictures to train a backbone on, but got features; pass the pictures, or "
                "set freeze_backbone=True."
            )
        augment = None
        if train_transform is not None:
            augment = Augment(train_transform, args.seed)
        elif not args.freeze_backbone and train_dataset is not None:
            augment = Augment.from_processor(args.augmentation, processor, args.seed)
        kwargs.setdefault("data_collator", KnnCollator(processor, args.on_bad_image, augment))
        rows = _checked(train_dataset, model)
        if rows is not None and args.group_by is not None:
            _check_groups(rows, args.group_by)
        self.loss = KnnLoss(args, model.config)
        self.train_features: ImageFeatures | None = None
        self.tune_result: TuneResult | None = None
        self.probe_choice: ProbeChoice | None = None
        self._datastore_step = -1
        self._reliability: list[list[float]] = []
        self._known_features: dict[str, ImageFeatures] = {}
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows if augment is None else EpochRows(rows),
            eval_dataset=_checked(eval_dataset, model),
            processing_class=processor,
            **kwargs,
        )

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Trains, then leaves a datastore of the final weights; see `Trainer.train`.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest one in `output_dir`
                that is whole; what was skipped is said.
            args: see `Trainer.train`.
            kwargs: see `Trainer.train`.

        Raises:
            ValueError: without a training set, or without a whole checkpoint to resume from.
            FloatingPointError: at a loss that is not finite, with the step and the sample ids.
        """
        if self.train_dataset is None:
            raise ValueError("Expected `train_dataset` to train on, but got None.")
        if self.model.config.head == Head.RIDGE or self.args.probe_grid is not None:
            return self._fit_at_once(resume_from_checkpoint)
        checkpoint = self.whole_checkpoint(resume_from_checkpoint)
        self._forget_measurement()
        trained = [(p, p.requires_grad) for p in self.model.backbone.parameters()]
        pictures = self.train_dataset
        self.loss.weigh_classes(_labels_in(pictures))
        if self.args.freeze_backbone:
            self.model.backbone.requires_grad_(False)
            self._prepare_probe()
        else:
            self.model.datastore = None  # of weights that are about to change
            if self.args.trainable_blocks is not None:
                freeze_all_but_last(self.model.backbone, self.args.trainable_blocks)
        callbacks = self._add_callbacks()
        try:
            output = super().train(checkpoint, *args, **kwargs)
        finally:
            self.train_dataset = pictures
            for callback in callbacks:
                self.remove_callback(callback)
            for parameter, was_trained in trained:
                parameter.requires_grad_(was_trained)
        self.build_datastore()
        self.model.eval()  # in train mode nobody asks the neighbours
        return output

    def build_datastore(self) -> Datastore:
        """Builds the datastore from the training set, with the weights as they are.

        Returns:
            The datastore, which is now `model.datastore`.
        """
        if self.train_dataset is None:
            raise ValueError("Expected `train_dataset` to build a datastore from, but got None.")
        features = self.train_features
        if features is None or not self.args.freeze_backbone:
            features = self._features_of(self.train_dataset)
            self.train_features = features
        self.model.datastore = self._store_of(features)
        self.model.datastore.digest = made_by(self.model)
        self._datastore_step = self.state.global_step
        return self.model.datastore

    def tune(
        self,
        eval_dataset: Any = None,
        criterion: str | None = None,
        calibrate: bool | None = None,
    ) -> TuneResult:
        """Chooses k, temperature and λ and sets them in the model's configuration.

        On a validation set if there is one; else, with a frozen backbone, by cross-validation in
        which both voices of a fold come from its training part only.

        Args:
            eval_dataset: a validation set; None takes the trainer's own.
            criterion: see `hf_knn.tune`; None takes `tune_criterion`.
            calibrate: also scale the temperatures of head and blend on these rows: the head's goes
                into its weights, the blend's into `blend_temperature`. None takes the argument's.

        Raises:
            ValueError: without a validation set if the backbone was trained: it has seen every row.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            raise ValueError(
                f"Expected one validation set to tune on, but got {list(dataset)}; pass one."
            )
        if self.model.datastore is None:
            self.build_datastore()
        if dataset is not None:
            features = self._features_of(_checked(dataset, self.model))
            held_out = self._ask(self.model, features, self._grid(len(features)))
        elif self.args.freeze_backbone:
            held_out = self._ask_folds()
        else:
            raise ValueError(
                "Expected a validation set (`eval_dataset`) to tune a model whose backbone was "
                "trained, since it has seen every training picture, but got none."
            )
        neighbors, head_log_probs, labels = held_out
        config = self.model.config
        calibrate = self.args.calibrate if calibrate is None else calibrate
        if calibrate:
            head_log_probs = self._calibrate_head(head_log_probs, labels)
        result = tune(
            neighbors,
            head_log_probs,
            labels,
            config.classes,
            criterion or self.args.tune_criterion,
            metric=config.metric,
            weighting=config.knn_weighting,
            grid=self._grid(len(labels)),
        )
        config.k, config.knn_temperature = result.k, result.temperature
        config.knn_weight, config.blend_temperature = result.knn_weight, 1.0
        config.num_tuned_labels = None
        self._forget_measurement()
        votes = knn_log_probs(
            neighbors.similarities[:, : result.k], neighbors.labels[:, : result.k],
            config.classes, result.temperature,
            metric=config.metric, weighting=config.knn_weighting,
        )  # fmt: skip
        blend = blend_log_probs(head_log_probs, votes, result.knn_weight)
        if calibrate:
            config.blend_temperature = fit_temperature(floor_log_probs(blend), labels)
        sure = soften(blend, config.blend_temperature)
        config.answer_thresholds = thresholds(sure, labels, ERROR_RATES)
        self.tune_result = result
        return result

    def _calibrate_head(self, log_probs: Tensor, labels: Tensor) -> Tensor:
        """Scales the head's temperature; returns its log-probabilities then."""
        known = labels < log_probs.shape[1]
        if not known.any():
            return log_probs
        temperature = fit_temperature(floor_log_probs(log_probs[known]), labels[known])
        self.model.head.soften(temperature)
        self.model.config.head_temperature *= temperature
        return soften(log_probs, temperature)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measures head, neighbours and blend.

        Args:
            eval_dataset: pictures with labels, or `ImageFeatures`; None takes the trainer's own.
            ignore_keys: accepted for `Trainer`; every output is small enough to keep.
            metric_key_prefix: of the names.

        Returns:
            `eval_{head|knn|blend}_{top1|top5|mean_class|nll|ece|brier}` (`auroc` for two classes),
            `eval_loss` (cross-entropy of the head), `eval_accuracy` (top-1 of the blend), and
            `eval_both_wrong`, `eval_oracle`, `eval_blend_gain`.

        Raises:
            ValueError: without a dataset, or with labels the model does not have.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("Expected `eval_dataset` to evaluate on, but got None.")
        if isinstance(dataset, dict):
            found: dict[str, float] = {}
            for name, rows in dataset.items():
                found |= self.evaluate(rows, ignore_keys, f"{metric_key_prefix}_{name}")
            return found
        started = time.time()
        trains_backbone = self.is_in_train and not self.args.freeze_backbone
        if trains_backbone and self._datastore_step != self.state.global_step:
            self.build_datastore()
        features = self._features_of(_checked(dataset, self.model))
        prefix = metric_key_prefix
        metrics = {f"{prefix}_{name}": value for name, value in self._measure(features).items()}
        metrics |= speed_metrics(prefix, started, num_samples=len(features))
        if not self.is_in_train:
            self.model.measured = self._measurement(metrics, prefix, len(features), eval_dataset)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _forget_measurement(self) -> None:
        """Drops what was measured of a model that is about to be another one."""
        self.model.measured = self.model.neighbor_picture = None

    def _measurement(
        self, metrics: dict[str, float], prefix: str, rows: int, asked: Any
    ) -> dict[str, Any]:
        """What a model card says of a measurement."""
        numbers = {f"eval_{k.removeprefix(f'{prefix}_')}": v for k, v in metrics.items()}
        voices = {k: v for k, v in numbers.items() if "_per_second" not in k and "runtime" not in k}
        is_own = asked is None or asked is self.eval_dataset
        note = "k, temperature and λ were chosen on the same pictures."
        info = getattr(asked, "info", None)
        return {
            "metrics": voices,
            "rows": rows,
            "dataset": getattr(info, "dataset_name", None) or "",
            "split": str(getattr(asked, "split", None) or ""),
            "reliability": self._reliability,
            "note": note if is_own and self.tune_result is not None else "",
        }

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch: the plain one, or reweighted by what k-NN finds hard.

        Raises:
            FloatingPointError: if it is not finite, with the step and the sample ids.
        """
        sample_ids = inputs.pop("sample_ids", None)
        surprise = inputs.pop("knn_log_probs", None)
        if self.loss.is_plain:
            loss: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            labels = inputs["labels"]
            outputs = model(**inputs)
            if self.args.reweights and surprise is None:
                surprise = self.loss.ask(outputs, labels, sample_ids)
            mean = self.loss.mean(outputs.head_logits, labels, surprise)
            loss = (mean, outputs) if return_outputs else mean
        value = loss[0] if isinstance(loss, tuple) else loss
        if not value.isfinite():
            shown = [] if sample_ids is None else sample_ids.tolist()
            raise FloatingPointError(
                f"Expected a finite loss, but got {float(value.detach())} at step "
                f"{self.state.global_step + 1}, sample ids {shown[:64]}; lower the learning rate "
                "or look at these pictures. The last checkpoint is whole."
            )
        return loss

    def _refresh(self) -> None:
        """A datastore of the weights as they are, and what it says about each training row."""
        started = time.perf_counter()
        with torch.random.fork_rng(devices=[]):  # a refresh must not move the training's numbers
            torch.manual_seed(self.args.seed)
            store = self.build_datastore()
            features = self.train_features
            assert features is not None
            facts = self.loss.refresh(store, features)
        self.log(facts | {"knn_refresh_seconds": time.perf_counter() - started})

    def _add_callbacks(self) -> list[Any]:
        """Those that a run on pictures needs."""
        callbacks: list[Any] = []
        if self.args.freeze_backbone:
            return callbacks
        if isinstance(self.train_dataset, EpochRows):
            callbacks.append(EpochCallback(self.train_dataset))
        if self.args.reweights:
            self.loss.forget()
            callbacks.append(RefreshCallback(self._refresh, lambda: self.loss.votes is None))
        for callback in callbacks:
            self.add_callback(callback)
        return callbacks

    def _fit_at_once(self, resume_from_checkpoint: str | bool | None) -> TrainOutput:
        """A closed-form head, or the best of many: seconds, so there is nothing to resume."""
        is_ridge = self.model.config.head == Head.RIDGE
        if not self.args.freeze_backbone or resume_from_checkpoint:
            raise ValueError(
                "Expected `freeze_backbone` to be True and no checkpoint to resume from for a head "
                f"that is fitted at once (head={self.model.config.head!r}, "
                f"probe_grid={self.args.probe_grid!r})."
            )
        if is_ridge and (self.args.reweights or self.args.probe_grid is not None):
            raise ValueError(
                "Expected no `knn_loss_alpha`, `knn_loss_gamma` or `probe_grid` for a ridge head, "
                "which has no loss to weight and no rate to choose."
            )
        started, pictures = time.time(), self.train_dataset
        self._forget_measurement()
        self._prepare_probe()
        self.train_dataset = pictures
        features = self.train_features
        assert features is not None
        if is_ridge:
            fit = fit_closed_form(self.model, features, self.args.class_weights)
            facts = {"regularizer": fit.regularizer, "temperature": fit.temperature}
        else:
            facts = self._fit_best_probe(features)
        self.model.eval()
        head_part, _ = split_features(features.features, self.model.config)
        with torch.inference_mode():
            logits = self.model.head(head_part.to(self.args.device)).float().cpu()
        loss = float(functional.cross_entropy(logits, features.labels))
        metrics = speed_metrics("train", started, num_samples=len(features))
        metrics |= {f"train_{name}": value for name, value in facts.items()}
        self.log(metrics | {"train_loss": loss})
        return TrainOutput(0, loss, metrics)

    def _fit_best_probe(self, features: ImageFeatures) -> dict[str, float]:
        assert self.args.probe_grid is not None
        grid, settings = PROBE_GRIDS[self.args.probe_grid]
        sizes = self.model.config.head_hidden_sizes
        settings = dataclasses.replace(
            settings, seed=self.args.seed, class_weighting=self.args.class_weights,
            label_smoothing=self.args.label_smoothing_factor, hidden_layers=len(sizes),
            hidden_width=sizes[0] if sizes else None, knn_loss_clamp=self.args.knn_loss_clamp,
            knn_loss_normalize=self.args.knn_loss_normalize,
        )  # fmt: skip
        if self.probe_choice is None:
            parts = self._parts(features, grid)
            progress = not self.args.disable_tqdm
            self.probe_choice = sweep(parts, self.model, grid, settings, progress)
        chosen = self.probe_choice.score
        votes = own_votes(self._store_of, features, self.model, [chosen.config])
        fit_probe(self.model, features, votes, chosen.config, settings)
        return {
            "learning_rate": chosen.config.learning_rate,
            "weight_decay": chosen.config.weight_decay,
            "alpha": chosen.config.alpha,
            "held_out_accuracy": chosen.accuracy,
        }

    def _parts(self, features: ImageFeatures, grid: ProbeGrid) -> Iterator[Part]:
        """What a sweep is fitted and chosen on: the validation set, or folds."""
        if self.eval_dataset is not None and not isinstance(self.eval_dataset, dict):
            held_out = self._features_of(_checked(self.eval_dataset, self.model))
            yield Part(features, held_out, own_votes(self._store_of, features, self.model, grid))
            return
        for fold in self._folds(features):
            fitted, held_out = features.select(fold.fitted), features.select(fold.held_out)
            votes = own_votes(self._store_of, fitted, self.model, grid)
            yield Part(fitted, held_out, votes)

    def _prepare_probe(self) -> None:
        """Features once, datastore once, leave-one-out p_knn once."""
        features = self._features_of(self.train_dataset)
        self.train_features = features
        store = self.build_datastore()
        head_part, _ = split_features(features.features, self.model.config)
        self.model.head.standardize(head_part)
        if self.args.reweights:
            votes = OwnVotes.of(store, features, self.model.config)
            self.loss.take(votes)
            own = votes.at(features.ids)
            features = dataclasses.replace(features, knn_log_probs=own)  # the caller's stay
        self.train_features = features
        self.train_dataset = dataclasses.replace(features, gives_ids=True)

    def _features_of(self, dataset: Any) -> ImageFeatures:
        if isinstance(dataset, ImageFeatures):
            return dataset
        if isinstance(dataset, EpochRows):
            dataset = dataset.rows
        name = fingerprint_of(dataset)
        if name is not None:
            name = f"{name}|{made_by(self.model)}"
            if name in self._known_features:
                return self._known_features[name]
        features = extract_features(
            self.model,
            dataset,
            self.processing_class,
            batch_size=self.args.per_device_eval_batch_size,
            precision=self.args.feature_precision,
            backend=self.args.feature_backend,
            on_bad_image=self.args.on_bad_image,
            use_cache=self.args.feature_cache and self.args.freeze_backbone,
            progress=not self.args.disable_tqdm,
            group_by=self.args.group_by if self.args.group_by in dataset.column_names else None,
        )
        if self.args.freeze_backbone and name is not None:
            self._known_features[name] = features
        return features

    def _store_of(self, features: ImageFeatures) -> Datastore:
        config = self.model.config
        _, store_part = split_features(features.features, config)
        return Datastore.from_features(
            store_part,
            features.labels,
            features.ids,
            metric=config.metric,
            normalization=config.normalization,
            index=self.args.knn_index,
            max_memory=self.args.knn_max_memory,
            paths=features.paths or None,
        )

    def _grid(self, held_out_rows: int) -> Grid:
        store = self.model.datastore
        rows, classes = 0 if store is None else len(store), self.model.config.classes
        return default_grid(rows, classes, coarse=has_few_labels(held_out_rows, classes))

    def _measure(self, features: ImageFeatures) -> dict[str, float]:
        voices: dict[str, list[Tensor]] = {voice: [] for voice in _VOICES}
        classes = self.model.config.classes
        with evaluating(self.model):
            for rows in torch.arange(len(features)).split(_EVAL_ROWS):
                batch = features.features[rows].to(self.args.device)
                output = self.model(features=batch)
                head = functional.log_softmax(output.head_logits.float(), dim=-1)
                missing = (0, classes - head.shape[1])
                voices["head"].append(functional.pad(head, missing, value=-torch.inf))
                voices["blend"].append(output.logits)
                if output.knn_log_probs is not None:
                    voices["knn"].append(output.knn_log_probs)
        results: dict[str, float] = {}
        for voice, parts in voices.items():
            if parts:
                scores = measure(floor_log_probs(torch.cat(parts)), features.labels)
                results |= {f"{voice}_{name}": value for name, value in scores.items()}
        if voices["knn"]:
            head, knn, blend = (torch.cat(voices[voice]) for voice in _VOICES)
            results |= complementarity(head, knn, blend, features.labels)
        self._reliability = reliability(torch.cat(voices["blend"]), features.labels)
        return results | {"loss": results["head_nll"], "accuracy": results["blend_top1"]}

    def _ask(
        self, model: KnnForImageClassification, features: ImageFeatures, grid: Grid
    ) -> tuple[Neighbors, Tensor, Tensor]:
        """Neighbours at the largest k and the head's log-probabilities, of rows held out."""
        head_part, store_part = split_features(features.features, model.config)
        store = model.datastore
        assert store is not None
        with evaluating(model):
            logits = model.head(head_part.to(self.args.device)).float()
        head_log_probs = functional.log_softmax(logits, dim=-1).cpu()
        return store.search(store_part, max(grid.k)), head_log_probs, features.labels

    def _ask_folds(self) -> tuple[Neighbors, Tensor, Tensor]:
        """Each row's neighbours and head from a fold that did not see it."""
        everything = self.train_features
        if everything is None:
            everything = self.train_features = self._features_of(self.train_dataset)
        grid = self._grid(len(everything))
        parts = []
        for fold in self._folds(everything):
            model = self._fit_fold(everything.select(fold.fitted))
            parts.append(self._ask(model, everything.select(fold.held_out), grid))
        width = min(neighbors.labels.shape[1] for neighbors, _, _ in parts)
        fields = zip(*(neighbors for neighbors, _, _ in parts), strict=True)
        neighbors = Neighbors(*(torch.cat([part[:, :width] for part in field]) for field in fields))
        head_log_probs = torch.cat([head for _, head, _ in parts])
        return neighbors, head_log_probs, torch.cat([labels for _, _, labels in parts])

    def _folds(self, features: ImageFeatures) -> list[Fold]:
        args = self.args
        return stratified_folds(features.labels, args.tune_folds, args.seed, features.groups)

    def _fit_fold(self, features: ImageFeatures) -> KnnForImageClassification:
        """A fresh head and datastore from some of the rows, by the same recipe."""
        shared = {id(self.model.backbone): self.model.backbone}
        model = copy.deepcopy(self.model, shared)
        with torch.random.fork_rng(devices=[]):  # the same folds whatever was drawn before
            torch.manual_seed(self.args.seed)
            model.head = KnnHead.from_config(model.config)
            model.head.apply(model._init_weights)
        with tempfile.TemporaryDirectory() as folder:
            trainer = KnnTrainer(model, _quiet(self.args, folder), train_dataset=features)
            trainer.remove_callback(PrinterCallback)
            trainer.probe_choice = self.probe_choice
            trainer.train()
        return model

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Saves a whole checkpoint; the arguments as JSON, since a pickle is nobody's friend."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        store = self.model.datastore
        if self.is_in_train and not self.args.freeze_backbone:
            # one of other weights does not belong into this checkpoint
            is_current = self._datastore_step == self.state.global_step
            self.model.datastore = store if is_current else None
        try:
            self.model.save_pretrained(folder, state_dict=state_dict)
        finally:
            self.model.datastore = store
        arguments = json.dumps(self.args.to_sanitized_dict(), indent=2, default=str)
        (folder / ARGUMENTS_NAME).write_text(arguments + "\n", encoding="utf-8")
        if self.is_in_train:
            self.loss.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restores weights and datastore; Trainer's own way loses renamed tensors silently."""
        folder = Path(resume_from_checkpoint)
        loaded = KnnForImageClassification.from_pretrained(folder)
        self.model.load_state_dict(loaded.state_dict())
        self.model.datastore = loaded.datastore
        if self.args.reweights and not self.args.freeze_backbone:
            self.loss.load(folder)

    def _load_best_model(self) -> None:
        """Restores weights and datastore of the best checkpoint."""
        best = self.state.best_model_checkpoint
        assert best is not None
        self._load_from_checkpoint(best)
        self._datastore_step = self.state.best_global_step or -1


def _checked(dataset: Any, model: KnnForImageClassification) -> Any:
    """A prepared dataset whose labels the model has."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: _checked(rows, model) for name, rows in dataset.items()}
    if not isinstance(dataset, ImageFeatures):
        if len(dataset) == 0:
            raise ValueError("Expected a dataset with at least one picture, but it is empty.")
        dataset = prepare(dataset, model.config.class_names)
    if len(dataset) == 0:
        raise ValueError("Expected a dataset with at least one picture, but it is empty.")
    labels = _labels_in(dataset)
    if int(labels.max()) >= model.config.classes:
        raise ValueError(
            f"Expected labels below {model.config.classes}, the number of classes of the model, "
            f"but got {int(labels.max())}."
        )
    return dataset


def _check_groups(rows: Any, column: str) -> None:
    if not isinstance(rows, ImageFeatures):
        groups_of(rows, column)
    elif rows.groups is None:
        raise ValueError(
            f"Expected features with `groups` for group_by={column!r}, but got some without; pass "
            "`group_by` to extract_features too."
        )


def _labels_in(dataset: Any) -> Tensor:
    if isinstance(dataset, EpochRows):
        dataset = dataset.rows
    return dataset.labels if isinstance(dataset, ImageFeatures) else labels_of(dataset)


def _quiet(args: KnnTrainingArguments, folder: str) -> KnnTrainingArguments:
    """The same recipe without saving, evaluating or talking."""
    quiet = copy.copy(args)
    changes = {
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
    for name, value in changes.items():
        setattr(quiet, name, value)
    return quiet
