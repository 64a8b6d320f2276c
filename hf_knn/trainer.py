"""`KnnTrainer`: the Hugging Face Trainer with a datastore, a reweighted loss and three voices."""

import copy
import dataclasses
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PrinterCallback, Trainer
from transformers.trainer_utils import speed_metrics

from .backbone import evaluating, split_features
from .checkpoint import made_by
from .collator import KnnCollator
from .data import fingerprint_of, labels_of, prepare
from .datastore import Datastore, Neighbors
from .features import ImageFeatures, extract_features
from .folds import stratified_folds
from .functional import floor_log_probs, knn_log_probs, knn_loss_weights
from .metrics import measure
from .modeling_knn import KnnForImageClassification, KnnHead
from .training_args import KnnTrainingArguments
from .tuning import Grid, TuneResult, default_grid, has_few_labels, tune

logger = logging.getLogger(__name__)

_EVAL_ROWS = 1024
_VOICES = ("head", "knn", "blend")


class KnnTrainer(Trainer):
    """Trains a `KnnForImageClassification`, builds its datastore, tunes and measures it.

    With `freeze_backbone` the features are computed once and the head trains on them; otherwise
    the whole model is trained on pictures and the datastore is built from the final weights.

    Args:
        model: the model, usually from `KnnForImageClassification.from_backbone`.
        args: see `KnnTrainingArguments`.
        train_dataset: a `datasets.Dataset` with pictures and labels, or `ImageFeatures` with
            `freeze_backbone`.
        eval_dataset: likewise; also what k, temperature and λ are chosen on.
        processing_class: the image processor; None takes the model's own.
        kwargs: see `transformers.Trainer`.

    Attributes:
        train_features: features of the training set, once they are known.
        tune_result: what `tune` found last.

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
        kwargs.setdefault("data_collator", KnnCollator(processor, args.on_bad_image))
        self.train_features: ImageFeatures | None = None
        self.tune_result: TuneResult | None = None
        self._datastore_step = -1
        self._known_features: dict[str, ImageFeatures] = {}
        super().__init__(
            model=model,
            args=args,
            train_dataset=_checked(train_dataset, model),
            eval_dataset=_checked(eval_dataset, model),
            processing_class=processor,
            **kwargs,
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains, then leaves a datastore of the final weights; see `Trainer.train`."""
        if self.train_dataset is None:
            raise ValueError("Expected `train_dataset` to train on, but got None.")
        trained = [(p, p.requires_grad) for p in self.model.backbone.parameters()]
        pictures = self.train_dataset
        if self.args.freeze_backbone:
            self.model.backbone.requires_grad_(False)
            self._prepare_probe()
        else:
            self.model.datastore = None  # of weights that are about to change
        try:
            output = super().train(*args, **kwargs)
        finally:
            self.train_dataset = pictures
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

    def tune(self, eval_dataset: Any = None, criterion: str | None = None) -> TuneResult:
        """Chooses k, temperature and λ and sets them in the model's configuration.

        On a validation set if there is one; else, with a frozen backbone, by cross-validation in
        which both voices of a fold come from its training part only.

        Args:
            eval_dataset: a validation set; None takes the trainer's own.
            criterion: see `hf_knn.tune`; None takes `tune_criterion`.

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
        config.knn_weight = result.knn_weight
        self.tune_result = result
        return result

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
            `eval_{head|knn|blend}_{top1|top5|mean_class|nll|ece}` (`auroc` for two classes),
            `eval_loss` (cross-entropy of the head) and `eval_accuracy` (top-1 of the blend).

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
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch: the plain one, or reweighted by what k-NN finds hard."""
        surprise = inputs.pop("knn_log_probs", None)
        if surprise is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        outputs = model(**inputs)
        factors = knn_loss_weights(
            surprise.unsqueeze(1),
            torch.zeros_like(labels),
            self.args.knn_loss_alpha,
            self.args.knn_loss_clamp,
            normalize=self.args.knn_loss_normalize,
        )  # [B]
        losses = functional.cross_entropy(
            outputs.head_logits.float(), labels,
            reduction="none", label_smoothing=self.args.label_smoothing_factor,
        )  # fmt: skip
        loss = (factors * losses).mean()
        return (loss, outputs) if return_outputs else loss

    def _prepare_probe(self) -> None:
        """Features once, datastore once, leave-one-out p_knn once."""
        features = self._features_of(self.train_dataset)
        self.train_features = features
        store = self.build_datastore()
        head_part, _ = split_features(features.features, self.model.config)
        self.model.head.standardize(head_part)
        if self.args.knn_loss_alpha:
            own = _leave_one_out(store, features, self.model.config)
            features = dataclasses.replace(features, knn_log_probs=own)  # the caller's stay
        self.train_features = self.train_dataset = features

    def _features_of(self, dataset: Any) -> ImageFeatures:
        if isinstance(dataset, ImageFeatures):
            return dataset
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
            on_bad_image=self.args.on_bad_image,
            use_cache=self.args.feature_cache and self.args.freeze_backbone,
            progress=not self.args.disable_tqdm,
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
        for fold in stratified_folds(everything.labels, self.args.tune_folds, self.args.seed):
            model = self._fit_fold(everything.select(fold.fitted))
            parts.append(self._ask(model, everything.select(fold.held_out), grid))
        width = min(neighbors.labels.shape[1] for neighbors, _, _ in parts)
        fields = zip(*(neighbors for neighbors, _, _ in parts), strict=True)
        neighbors = Neighbors(*(torch.cat([part[:, :width] for part in field]) for field in fields))
        head_log_probs = torch.cat([head for _, head, _ in parts])
        return neighbors, head_log_probs, torch.cat([labels for _, _, labels in parts])

    def _fit_fold(self, features: ImageFeatures) -> KnnForImageClassification:
        """A fresh head and datastore from some of the rows, by the same recipe."""
        shared = {id(self.model.backbone): self.model.backbone}
        model = copy.deepcopy(self.model, shared)
        head = self.model.head
        with torch.random.fork_rng(devices=[]):  # the same folds whatever was drawn before
            torch.manual_seed(self.args.seed)
            model.head = KnnHead(head.classifier.in_features, head.classifier.out_features)
            model.head.apply(model._init_weights)
        with tempfile.TemporaryDirectory() as folder:
            trainer = KnnTrainer(model, _quiet(self.args, folder), train_dataset=features)
            trainer.remove_callback(PrinterCallback)
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
        (folder / "training_args.json").write_text(arguments + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restores weights and datastore; Trainer's own way loses renamed tensors silently."""
        loaded = KnnForImageClassification.from_pretrained(resume_from_checkpoint)
        self.model.load_state_dict(loaded.state_dict())
        self.model.datastore = loaded.datastore

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
    is_features = isinstance(dataset, ImageFeatures)
    labels = dataset.labels if is_features else labels_of(dataset)
    if int(labels.max()) >= model.config.classes:
        raise ValueError(
            f"Expected labels below {model.config.classes}, the number of classes of the model, "
            f"but got {int(labels.max())}."
        )
    return dataset


def _leave_one_out(store: Datastore, features: ImageFeatures, config: Any) -> Tensor:
    """[N] leave-one-out log p_knn of each row's own label, k and T chosen by its sum."""
    _, queries = split_features(features.features, config)
    labels = features.labels
    grid = default_grid(len(store), config.classes)._replace(knn_weights=(1.0,))
    neighbors = store.search(queries, max(grid.k), exclude_ids=features.ids)
    options = {"metric": store.metric, "weighting": config.knn_weighting}
    silent_head = torch.zeros(len(labels), config.classes)
    best = tune(
        neighbors, silent_head, labels, config.classes, "log_likelihood", grid=grid, **options
    )
    votes = knn_log_probs(
        neighbors.similarities[:, : best.k],
        neighbors.labels[:, : best.k],
        config.classes,
        best.temperature,
        **options,
    )
    return votes.gather(1, labels.unsqueeze(1)).squeeze(1)


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
