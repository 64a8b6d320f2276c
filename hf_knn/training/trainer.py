"""`KnnTrainer`: the Hugging Face Trainer with a datastore, a reweighted loss and three voices."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback
from transformers.trainer_utils import TrainOutput, speed_metrics

from ..core.backbone import split_features
from ..core.config import Head
from ..data.augmentation import Augment, EpochRows
from ..data.batches import KnnCollator
from ..data.splits import Fold, stratified_folds
from ..features.extract import ImageFeatures
from ..fit.blend import Grid, TuneResult, default_grid, has_few_labels
from ..fit.grids import ProbeGrid
from ..fit.heads import Part, own_votes, with_fresh_head
from ..fit.measure import (
    HeldOut,
    ask_voices,
    choose_blend,
    describe_measurement,
    joined,
    measure_voices,
)
from ..fit.own_votes import OwnVotes
from ..fit.sweep import ProbeChoice
from ..model.backbones import freeze_all_but_last
from ..model.checkpoint import made_by
from ..model.modeling import KnnForImageClassification
from ..store.datastore import Datastore
from .arguments import KnnTrainingArguments
from .callbacks import EpochCallback, RefreshCallback
from .heads import fit_at_once
from .hub import HubTrainer
from .loss import KnnLoss, check_finite
from .rows import (
    KnownFeatures,
    check_at_once,
    check_groups,
    check_sources,
    checked_rows,
    labels_in,
    quiet_arguments,
    store_of,
)


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
        check_sources(train_dataset, eval_dataset, processor, args)
        augment = None
        if train_transform is not None:
            augment = Augment(train_transform, args.seed)
        elif not args.freeze_backbone and train_dataset is not None:
            augment = Augment.from_processor(args.augmentation, processor, args.seed)
        kwargs.setdefault("data_collator", KnnCollator(processor, args.on_bad_image, augment))
        rows = checked_rows(train_dataset, model)
        if rows is not None and args.group_by is not None:
            check_groups(rows, args.group_by)
        self.loss = KnnLoss(args, model.config)
        self.train_features: ImageFeatures | None = None
        self.tune_result: TuneResult | None = None
        self.probe_choice: ProbeChoice | None = None
        self._datastore_step = -1
        self._known_features = KnownFeatures(args)
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows if augment is None else EpochRows(rows),
            eval_dataset=checked_rows(eval_dataset, model),
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
        self.loss.weigh_classes(labels_in(pictures))
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
        store = self._store_of(features)
        store.digest = made_by(self.model)
        if features.backend:
            store.source["backend"] = features.backend
        # receipts and pictures are those of the rows before
        self.model.memory = self.model.memory.started_with(store)
        self._datastore_step = self.state.global_step
        return store

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
            features = self._features_of(checked_rows(dataset, self.model))
            held_out = self._ask(self.model, features, self._grid(len(features)))
        elif self.args.freeze_backbone:
            held_out = self._ask_folds()
        else:
            raise ValueError(
                "Expected a validation set (`eval_dataset`) to tune a model whose backbone was "
                "trained, since it has seen every training picture, but got none."
            )
        self.tune_result = choose_blend(
            self.model,
            held_out,
            self._grid(len(held_out.labels)),
            criterion or self.args.tune_criterion,
            self.args.calibrate if calibrate is None else calibrate,
        )
        self._forget_measurement()
        return self.tune_result

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
            everything: dict[str, float] = {}
            for name, rows in dataset.items():
                everything |= self.evaluate(rows, ignore_keys, f"{metric_key_prefix}_{name}")
            return everything
        started = time.time()
        trains_backbone = self.is_in_train and not self.args.freeze_backbone
        if trains_backbone and self._datastore_step != self.state.global_step:
            self.build_datastore()
        features = self._features_of(checked_rows(dataset, self.model))
        prefix = metric_key_prefix
        found, reliability = measure_voices(self.model, features, self.args.device)
        metrics = {f"{prefix}_{name}": value for name, value in found.items()}
        metrics |= speed_metrics(prefix, started, num_samples=len(features))
        if not self.is_in_train:
            is_own = eval_dataset is None or eval_dataset is self.eval_dataset
            is_tuned_on = is_own and self.tune_result is not None
            self.model.measured = describe_measurement(
                metrics, prefix, len(features), eval_dataset, is_tuned_on
            ) | {"reliability": reliability}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Batches of what `predict` answers, which is the blend: `predictions` is `logits`.

        Args:
            test_dataset: pictures with labels, or `ImageFeatures`.

        Raises:
            ValueError: for a dataset without pictures or labels, or labels the model does not have.
        """
        return super().get_test_dataloader(checked_rows(test_dataset, self.model))

    def _forget_measurement(self) -> None:
        """Drops what was measured of a model that is about to be another one."""
        self.model.measured = self.model.neighbor_picture = None

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
        if self.loss.is_plain or not model.training:  # `predict` knows no votes of its rows
            loss: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            labels = inputs["labels"]
            outputs = model(**inputs)
            if self.args.reweights and surprise is None:
                surprise = self.loss.ask(outputs, labels, sample_ids)
            mean = self.loss.mean(outputs.head_logits, labels, surprise)
            loss = (mean, outputs) if return_outputs else mean
        value = loss[0] if isinstance(loss, tuple) else loss
        check_finite(value, self.state.global_step + 1, sample_ids)
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
        check_at_once(self.args, self.model.config.head, resume_from_checkpoint)
        started, pictures = time.time(), self.train_dataset
        self._forget_measurement()
        self._prepare_probe()
        self.train_dataset = pictures
        features = self.train_features
        assert features is not None
        facts, self.probe_choice = fit_at_once(
            self.model, features, self.args, self._parts, self.probe_choice
        )
        metrics = speed_metrics("train", started, num_samples=len(features))
        metrics |= {f"train_{name}": value for name, value in facts.items() if name != "loss"}
        self.log(metrics | {"train_loss": facts["loss"]})
        return TrainOutput(0, facts["loss"], metrics)

    def _parts(self, features: ImageFeatures, grid: ProbeGrid) -> Iterator[Part]:
        """What a sweep is fitted and chosen on: the validation set, or folds."""
        if self.eval_dataset is not None and not isinstance(self.eval_dataset, dict):
            held_out = self._features_of(checked_rows(self.eval_dataset, self.model))
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
        return self._known_features.of(dataset, self.model, self.processing_class)

    def _store_of(self, features: ImageFeatures) -> Datastore:
        return store_of(features, self.model.config, self.args)

    def _grid(self, held_out_rows: int) -> Grid:
        store = self.model.datastore
        rows, classes = 0 if store is None else len(store), self.model.config.classes
        return default_grid(rows, classes, coarse=has_few_labels(held_out_rows, classes))

    def _ask(
        self, model: KnnForImageClassification, features: ImageFeatures, grid: Grid
    ) -> HeldOut:
        return ask_voices(model, features, max(grid.k), self.args.device)

    def _ask_folds(self) -> HeldOut:
        """Each row's neighbours and head from a fold that did not see it."""
        everything = self.train_features
        if everything is None:
            everything = self.train_features = self._features_of(self.train_dataset)
        grid = self._grid(len(everything))
        parts = []
        for fold in self._folds(everything):
            model = self._fit_fold(everything.select(fold.fitted))
            parts.append(self._ask(model, everything.select(fold.held_out), grid))
        return joined(parts)

    def _folds(self, features: ImageFeatures) -> list[Fold]:
        args = self.args
        return stratified_folds(features.labels, args.tune_folds, args.seed, features.groups)

    def _fit_fold(self, features: ImageFeatures) -> KnnForImageClassification:
        """A fresh head and datastore from some of the rows, by the same recipe."""
        model = with_fresh_head(self.model, self.args.seed)
        with tempfile.TemporaryDirectory() as folder:
            trainer = KnnTrainer(model, quiet_arguments(self.args, folder), train_dataset=features)
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
        self.args.write_json(folder)
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
