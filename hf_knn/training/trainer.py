"""`KnnTrainer`: the Hugging Face Trainer with a datastore, a reweighted loss and three voices."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback
from transformers.trainer_utils import TrainOutput, set_seed, speed_metrics

from ..core.backbone import split_features
from ..core.config import CLOSED_FORM
from ..data.augmentation import EpochRows, seeded
from ..data.batches import KnnCollator
from ..features.extract import ImageFeatures
from ..fit.blend import TuneResult
from ..fit.choice import HeadChoice
from ..fit.grids import ProbeGrid
from ..fit.heads import Part, put_fresh_head, with_fresh_head
from ..fit.held_out import HeldOut
from ..fit.measure import ask_voices, choose_blend, describe_measurement, measure_voices
from ..fit.metric import MetricChoice
from ..fit.report import Report
from ..fit.sweep import ProbeChoice
from ..fit.voices import OwnVotes
from ..model.backbones import freeze_all_but_last, keeping_trainable
from ..model.checkpoint import made_by
from ..model.modeling import KnnForImageClassification
from ..store.datastore import Datastore
from .arguments import KnnTrainingArguments
from .asking import ask_on_folds, by_itself, choose_head
from .callbacks import callbacks_of, taking_part
from .heads import OF_DESCENT, check_at_once, chooses_head, fit_at_once, settle_head, sweep_parts
from .loss import KnnLoss, check_finite
from .metrics import own_metrics
from .reports import Shown, report_of
from .rows import (
    KnownFeatures,
    augment_of,
    can_hold_out,
    check_groups,
    check_sources,
    check_tunable,
    checked_model,
    checked_rows,
    labels_in,
    learn_metric,
    store_of,
    unstored,
)
from .saving import SavingTrainer


class KnnTrainer(SavingTrainer):
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
        model_init: returns a model, instead of `model`; each call of `train` begins with a new one,
            as a hyperparameter search wants it. It may take the trial.
        kwargs: see `transformers.Trainer`; `compute_metrics` is asked about the blend.

    Attributes:
        train_features: features of the training set, once they are known.
        head_choice: which head was chosen, with the table of all, where none was named; `tune`
            goes on with what that head said of the rows held out.
        tune_result: what `tune` found last.
        probe_choice: which head of `probe_grid` was best, with the table of all.
        metric_choice: whether a learned metric was kept, and why.

    Raises:
        ValueError: for a dataset without pictures or labels, labels the model does not have, a
            stream, a dataset of torch, or a model with adapters (LoRA).
    """

    # the loss is a mean over the batch, which Trainer has to divide for gradient accumulation
    loss_is_scaled_for_ga = False
    model_init: Any
    compute_metrics: Any
    eval_dataset: Any

    def __init__(
        self,
        model: KnnForImageClassification | None = None,
        args: KnnTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        train_transform: Callable[[Any], Any] | None = None,
        model_init: Callable[..., KnnForImageClassification] | None = None,
        **kwargs: Any,
    ) -> None:
        args = KnnTrainingArguments("trainer_output") if args is None else args
        if model is None and model_init is not None:
            self.model_init = model_init
            set_seed(args.seed)
            model = self.call_model_init()  # type: ignore[assignment]
        model = checked_model(model, args, has_init=model_init is not None)
        processor = processing_class or model.image_processor
        model.image_processor = processor
        check_sources(train_dataset, eval_dataset, processor, args)
        augment = augment_of(train_transform, train_dataset, processor, args)
        kwargs.setdefault("data_collator", KnnCollator(processor, args.on_bad_image, augment))
        rows = checked_rows(train_dataset, model)
        check_groups(rows, args.group_by)
        self.loss = KnnLoss(args, model.config)
        self.train_features: ImageFeatures | None = None
        self.head_choice: HeadChoice | None = None
        self._chosen_on: tuple[Any, ImageFeatures | None] = None, None
        self.tune_result: TuneResult | None = None
        self._softened = 1.0  # what the logits of this head were divided by since it was trained
        self.probe_choice: ProbeChoice | None = None
        self.metric_choice: MetricChoice | None = None
        self._known_features = KnownFeatures(args)
        self._brings_optimizer = any(map(kwargs.get, OF_DESCENT))
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows if augment is None else EpochRows(rows),
            eval_dataset=checked_rows(eval_dataset, model),
            processing_class=processor,
            **kwargs,
        )
        self.model_init = model_init

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Trains, then leaves a datastore of the final weights; see `Trainer.train`.

        Where nobody named a head, the best one is chosen first, see `KnnTrainingArguments`.

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
        if self.model_init is not None:
            self._begin_anew(*args[:1], **kwargs)
        self.head_choice, self.metric_choice, self._softened = None, None, 1.0
        descends = resume_from_checkpoint or self._brings_optimizer
        if chooses_head(self.model, self.args) and not descends:
            self._choose_head()
        else:
            settle_head(self.model, self.args)
        if self.model.config.head in CLOSED_FORM or self.args.probe_grid is not None:
            return self._fit_at_once(resume_from_checkpoint)
        checkpoint = self.whole_checkpoint(resume_from_checkpoint)
        self._forget_measurement()
        pictures = self.train_dataset
        self.loss.forget()
        self.loss.weigh_classes(labels_in(pictures))
        callbacks = callbacks_of(pictures, self.args, self._refresh, self.loss)
        with keeping_trainable(self.model.backbone), taking_part(self, callbacks):
            if self.args.freeze_backbone:
                self.model.backbone.requires_grad_(False)
                self._prepare_probe()
            else:
                self.model.datastore = None  # of weights that are about to change
                if self.args.trainable_blocks is not None:
                    freeze_all_but_last(self.model.backbone, self.args.trainable_blocks)
            init, self.model_init = self.model_init, None  # it was called already
            try:
                output = super().train(checkpoint, *args, **kwargs)
            finally:
                self.train_dataset, self.model_init = pictures, init
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
            features = self.train_features = self._features_of(self.train_dataset)
        store = store_of(features, config := self.model.config, self.args)
        self.metric_choice = learn_metric(store, features, config, self.args, self.metric_choice)
        store.digest = made_by(self.model)
        if features.backend:
            store.source["backend"] = features.backend
        self.model.memory = self.model.memory.started_with(store, features.ids, features.contents)
        self._datastore_step = self.state.global_step
        return store

    def tune(
        self,
        eval_dataset: Any = None,
        criterion: str | None = None,
        calibrate: bool | None = None,
        progress: bool | None = None,
    ) -> TuneResult:
        """Chooses k, temperature and λ and sets them in the model's configuration.

        On a validation set if there is one, without what of it is stored; else, with a frozen
        backbone, by cross-validation in which both voices of a fold come from its training part.
        Below 16 labels a class k and temperature are fixed (20, 0.14), and λ alone is chosen,
        unless a criterion is named: on so few, chance would choose. λ is 0 below 3 labels a class,
        and 0.5 where there are more and no row can be held out.

        Half of the rows are chosen on, or all where they are few. For the thresholds of
        `explain(max_error=…)` each half is judged by what the other would choose.

        Args:
            eval_dataset: a validation set; None takes the trainer's own.
            criterion: see `hf_knn.tune`; None takes `tune_criterion`.
            calibrate: also scale the temperatures of head and blend on these rows: the head's goes
                into its weights, the blend's into `blend_temperature`. None takes the argument's.
            progress: show progress bars; None does where `disable_tqdm` allows it.

        Raises:
            ValueError: without a validation set if the backbone was trained: it has seen every row.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        check_tunable(dataset, self.args)
        criterion = criterion or self.args.tune_criterion
        progress = not self.args.disable_tqdm if progress is None else progress
        if self.model.datastore is None:
            self.build_datastore()
        calibrate = self.args.calibrate if calibrate is None else calibrate
        held_out, choice = self._hold_out(dataset, criterion, progress)
        model, before = self.model, self.model.config.head_temperature
        self.tune_result = choose_blend(model, held_out, criterion, calibrate, progress, choice)
        self._softened *= model.config.head_temperature / before
        self._forget_measurement()
        return self.tune_result

    def _hold_out(
        self, dataset: Any, criterion: str | None, progress: bool
    ) -> tuple[HeldOut | None, HeadChoice | None]:
        """What both voices say of rows held out, if any can be, and how the head was chosen."""
        model, device, choice = self.model, self.args.device, self.head_choice
        chosen_on, features = self._chosen_on
        is_same = dataset is chosen_on and not model.changes  # nothing was taught since
        if choice is not None and choice.answers is not None and is_same:
            said = by_itself(choice.answers, model, features, device, self._softened)
            return said, choice if self._softened == 1 else None
        if dataset is not None:
            features = unstored(self._features_of(checked_rows(dataset, model)), model)
            return ask_voices(model, features, device), None
        features = self.train_features or self._features_of(self.train_dataset)
        self.train_features, args, learned = features, self.args, self.metric_choice
        fixed = None if choice is None else choice.fixed
        if choice is not None and choice.table:
            choice = None  # of other rows
        if not criterion and not can_hold_out(features):
            return None, choice
        found = ask_on_folds(model, features, args, self._train_fold, fixed, learned, progress)
        return found.softened(self._softened), choice

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measures head, neighbours and blend.

        Args:
            eval_dataset: pictures with labels, `ImageFeatures`, or the name of one of several; None
                takes the trainer's own.
            ignore_keys: accepted for `Trainer`; every output is small enough to keep.
            metric_key_prefix: of the names.

        Returns:
            `eval_{head|knn|blend}_{top1|top5|mean_class|nll|ece|brier}` (`auroc` for two classes),
            `eval_loss` (cross-entropy of the head), `eval_accuracy` (top-1 of the blend),
            `eval_both_wrong`, `eval_oracle`, `eval_blend_gain`, and `eval_stored`: how many of the
            pictures are stored; if some are, all numbers without them: `eval_without_stored_…`.

        Raises:
            ValueError: without a dataset, or with labels the model does not have.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if dataset is None:
            raise ValueError("Expected `eval_dataset` to evaluate on, but got None.")
        if isinstance(dataset, dict):
            everything: dict[str, float] = {}
            for name, rows in dataset.items():
                everything |= self.evaluate(rows, ignore_keys, f"{metric_key_prefix}_{name}")
            return everything
        started, prefix = time.time(), metric_key_prefix
        trains_backbone = self.is_in_train and not self.args.freeze_backbone
        if trains_backbone and self._datastore_step != self.state.global_step:
            self.build_datastore()
        features = self._features_of(checked_rows(dataset, self.model))
        found = measure_voices(self.model, features, self.args.device)
        metrics = {f"{prefix}_{name}": value for name, value in found.numbers.items()}
        metrics |= speed_metrics(prefix, started, num_samples=len(features))
        if not self.is_in_train:
            is_own = eval_dataset is None or eval_dataset is self.eval_dataset
            is_tuned_on = is_own and self.tune_result is not None
            self.model.measured = describe_measurement(
                metrics, prefix, len(features), eval_dataset, is_tuned_on
            ) | {"reliability": found.reliability}
        metrics |= own_metrics(self, found.logits, features.labels, prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def report(
        self, dataset: Any = None, *, pictures: Shown = None, stored_pictures: Shown = None
    ) -> Report:
        """Measures with intervals, class by class and picture by picture.

        Args:
            dataset: one, as for `evaluate`.
            pictures: of `ImageFeatures` by sample id, to be shown on the page.
            stored_pictures: by row id, likewise; None takes those of the training set.

        Returns:
            A value; `report.save(folder)` writes `report.html` and `report.json`.

        Raises:
            ValueError: without one dataset, or with labels the model does not have.
        """
        return report_of(self, dataset, self._features_of, pictures, stored_pictures)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Batches of what `predict` answers, which is the blend: `predictions` is `logits`.

        Args:
            test_dataset: pictures with labels, or `ImageFeatures`.

        Raises:
            ValueError: for a dataset without pictures or labels, or labels the model does not have.
        """
        return super().get_test_dataloader(checked_rows(test_dataset, self.model))

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
            outputs = model(**inputs)
            mean = self.loss.of_batch(outputs, inputs["labels"], sample_ids, surprise)
            loss = (mean, outputs) if return_outputs else mean
        value = loss[0] if isinstance(loss, tuple) else loss
        check_finite(value, self.state.global_step + 1, sample_ids)
        return loss

    def _begin_anew(self, trial: Any = None, **kwargs: Any) -> None:
        """Another model by `model_init`, with the arguments of a trial: each training has its own.

        Args:
            trial: of a hyperparameter search.
            kwargs: of `Trainer.train`.
        """
        if trial is not None and self.args.named_head is None:
            self.args.head = None  # a search for rates is one for a head that has some
        self._hp_search_setup(trial)
        set_seed(self.args.seed)
        names, processor = self.model.config.class_names, self.model.image_processor
        found = self.call_model_init(trial)
        model = checked_model(found, self.args, has_init=True)
        if model.config.class_names != names:
            raise ValueError(
                f"Expected `model_init` to return models of the classes {names}, but got "
                f"{model.config.class_names}."
            )
        model.image_processor = processor
        self._move_model_to_device(model, self.args.device)
        self.model = self.model_wrapped = model
        self.optimizer = self.lr_scheduler = None
        self.loss = KnnLoss(self.args, model.config)
        self.train_features = self.tune_result = self.probe_choice = self.head_choice = None

    def _forget_measurement(self) -> None:
        """Drops what was measured of a model that is about to be another one."""
        self.model.measured = self.model.neighbor_picture = None

    def _refresh(self) -> None:
        """A datastore of the weights as they are, and what it says about each training row."""
        started = time.perf_counter()
        with seeded(self.args.seed):  # a refresh must not move the training's numbers
            store = self.build_datastore()
            features = self.train_features
            assert features is not None
            facts = self.loss.refresh(store, features)
        self.log(facts | {"knn_refresh_seconds": time.perf_counter() - started})

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
            self.model, features, self.args, self._parts, self.probe_choice, self.head_choice
        )
        metrics = speed_metrics("train", started, num_samples=len(features))
        metrics |= {f"train_{name}": value for name, value in facts.items() if name != "loss"}
        self.log(metrics | {"train_loss": facts["loss"]})
        return TrainOutput(0, facts["loss"], metrics)

    def _parts(self, features: ImageFeatures, grid: ProbeGrid) -> Iterator[Part]:
        """What a sweep is fitted and chosen on."""
        held_out = None
        if self.eval_dataset is not None and not isinstance(self.eval_dataset, dict):
            held_out = self._features_of(checked_rows(self.eval_dataset, self.model))
        return sweep_parts(features, held_out, grid, self.model, self.args)

    def _choose_head(self) -> None:
        """Compares heads on rows held out, and gives the model one of the best kind."""
        self._forget_measurement()
        self._take_features()
        features, dataset = self.train_features, self.eval_dataset
        assert features is not None
        validation = None
        if dataset is not None and not isinstance(dataset, dict):
            validation = unstored(self._features_of(dataset), self.model)
        self._chosen_on = (None if validation is None else dataset), validation
        choice = choose_head(self.model, features, validation, self.args, self.metric_choice)
        put_fresh_head(self.model, choice.head, self.args.seed)
        self.head_choice = choice

    def _take_features(self) -> None:
        """Features once, datastore once."""
        self.train_features = self._features_of(self.train_dataset)
        self.build_datastore()

    def _prepare_probe(self) -> None:
        """What training on features needs: these, a datastore, leave-one-out p_knn once."""
        if self.head_choice is None:
            self._take_features()
        features, store = self.train_features, self.model.datastore
        assert features is not None
        assert store is not None
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

    def _train_fold(self, features: ImageFeatures) -> KnnForImageClassification:
        """A fresh head and datastore from some of the rows, by the same recipe."""
        model = with_fresh_head(self.model, self.args.seed)
        with tempfile.TemporaryDirectory() as folder:
            args = self.args.quiet(folder)
            args.head, args.learn_metric = self.model.config.head, False
            trainer = KnnTrainer(model, args, train_dataset=features)
            trainer.remove_callback(PrinterCallback)
            trainer.probe_choice = self.probe_choice
            trainer.train()
        return model
