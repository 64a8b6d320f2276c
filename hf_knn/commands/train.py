"""`hf-knn train`: everything from pictures to a tuned, measured checkpoint."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, set_seed
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from hf_knn_cli.train_options import TrainOptions

from ..data.batches import SAMPLE_ID, RowPictures, picture_of
from ..data.keys import hash_of_pictures
from ..data.loading import groups_of, labels_of
from ..data.places import check_classes, source_of
from ..data.splits import few_rows, few_shots, split_rows
from ..features.extract import ImageFeatures, extract_features, progress_bars
from ..fit.blend import TuneResult
from ..fit.plots import check_drawing, draw_neighbors
from ..fit.report import Report
from ..model.backbones import AUTO_HEAD
from ..model.card import draw_reliability, make_card
from ..model.modeling import KnnForImageClassification
from ..model.versions import Occupant, check_free, mark_training, occupant_of
from ..store.advice import install, install_package
from ..store.faiss import require_faiss
from ..store.folders import exclusive_lock
from ..store.hub import CARD_NAME, TRAINING_NAME
from ..store.kinds import AUTO, FLAT, LATENCY
from ..training.arguments import KnnTrainingArguments
from ..training.callbacks import EpochReport
from ..training.trainer import KnnTrainer
from .console import (
    as_called,
    console,
    escape,
    json_text,
    open_labelled,
    say_what_was_skipped,
    typed,
)
from .devices import move_to_device, trains_on_cpu
from .evaluate import print_measured, stored_names
from .heads import given_of, listed, print_choice, with_named_head
from .stopping import FEATURES_KEPT, goes_on_with, stands, stands_or_falls
from .thumbnails import keep_thumbnails

LARGEST_CROSS_VALIDATION = 20_000
"""Above this many training pictures a tenth is held out for tuning instead of folds."""

VALIDATION_SHARE = 0.1
_PICTURES_SHOWN = 6
FEW_SHOT_VALIDATION_SHARE = 0.25
"""Of few pictures a tenth is too little to choose anything on."""

_LOGS = ("tensorboard", "trackio")

_RATES = ("epochs", "learning_rate")
_FINE_TUNING_ALONE = (
    "blocks", "resume", "patience", "bf16", "gradient_checkpointing", "accumulate", "workers",
    "augmentation", "refresh", "queries",
)  # fmt: skip
"""Options that do nothing for a backbone that is not trained."""


class Parts(NamedTuple):
    """Pictures or features of the three parts; `validation` and `test` may be missing."""

    train: Any
    validation: Any
    test: Any


def train_pictures(options: TrainOptions) -> None:
    """Does everything from pictures to a tuned, measured checkpoint.

    Args:
        options: see `hf-knn train --help`.

    Raises:
        ValueError: for pictures or options that cannot be used.
        OSError: if the backbone cannot be found or the checkpoint cannot be written.
        FloatingPointError: if the loss is not finite.
    """
    started = time.perf_counter()
    stands_or_falls(options.output)
    options, why_that_head = with_named_head(options)
    _check(options)
    _check_packages(options)
    _arguments(options, options.output)  # which look at the values of theirs
    _check_output(options)
    set_seed(options.seed)
    splits = open_labelled(options.pictures, options.splits)
    names = check_classes(splits, options.pictures)
    pictures = hash_of_pictures(splits)
    _check_output(options, pictures)
    console.print(
        f"{len(splits['train'])} pictures of {len(names)} classes in train. {why_that_head}".strip()
    )
    model = KnnForImageClassification.from_backbone(
        options.backbone, names, pooling=options.pooling, knn_pooling=options.knn_pooling,
        head=options.head, head_hidden_sizes=options.hidden,
    )  # fmt: skip
    move_to_device(model)
    rows = splits if options.fine_tune else _extract(model, splits, options)
    _report_small_classes(_labels(rows["train"]), names)
    parts = _divide(rows, options)
    with _work_folder(options) as folder:
        trainer = _trainer(model, options, folder, parts)
        _train(trainer, options)
        with progress_bars():
            result = trainer.tune(progress=True)
        metrics = trainer.evaluate(parts.test) if parts.test is not None else {}
        assert model.datastore is not None
        measured = _measured(trainer, splits, parts)
        source = source_of(options.pictures, splits["train"])
        model.datastore.source |= source
        if model.measured is not None:
            model.measured |= {"dataset": source["dataset"], "split": "test"}
        if options.show_neighbors:
            model.neighbor_picture = _draw_neighbors(model, splits, parts)
        keep_thumbnails(model, splits["train"], options)
        replaced = _save(trainer, options, pictures)
    skipped = [row._asdict() for row in rows["train"].skipped] if not options.fine_tune else []
    seconds = time.perf_counter() - started
    _report(options, trainer, parts, result, metrics, measured, skipped, seconds)
    if replaced is not None:
        back = f" `hf-knn undo {options.output}` brings it back."
        said = str(replaced) + back * replaced.is_kept
        console.print(escape(as_called(said)), soft_wrap=True)


def _check_output(options: TrainOptions, pictures: str | None = None) -> Occupant | None:
    """What will be replaced; see `check_free`."""
    if options.overwrite:
        return occupant_of(options.output, options.keep)
    return check_free(options.output, pictures, options.keep)


def _save(trainer: KnnTrainer, options: TrainOptions, pictures: str) -> Occupant | None:
    """Saves the model, unless something came there meanwhile; returns what was replaced."""
    model = trainer.model
    assert model.datastore is not None
    mark_training(model.datastore, pictures)
    with exclusive_lock(options.output):
        replaced = _check_output(options, pictures)
        model.save_pretrained(options.output, keep_replaced=options.keep)
        trainer.args.write_json(options.output)
    return replaced


def _report(
    options: TrainOptions,
    trainer: KnnTrainer,
    parts: Parts,
    result: TuneResult,
    metrics: dict[str, float],
    measured: Report | None,
    skipped: list[dict[str, Any]],
    seconds: float,
) -> None:
    """Card and report, and when they are on disk the last lines on the screen."""
    model, choice = trainer.model, trainer.head_choice
    draw_reliability(model, options.output)
    path = options.output / CARD_NAME
    earlier = path.read_text(encoding="utf-8") if path.is_file() else None
    card = make_card(model, options.output.name, earlier, options.output)
    path.write_text(card, encoding="utf-8")
    report = {
        "options": asdict(options) | {"output": str(options.output)},
        "head": None if choice is None else choice.as_json(),
        "rows": {n: 0 if part is None else len(part) for n, part in parts._asdict().items()},
        "metrics": metrics,
        "chosen": {"k": result.k, "temperature": result.temperature, "λ": result.knn_weight},
        "skipped": skipped,
        "seconds": seconds,
    }
    (options.output / TRAINING_NAME).write_text(json_text(report) + "\n", encoding="utf-8")
    page = None if measured is None else measured.save(options.output)
    how = "a validation set" if parts.validation is not None else "cross-validation"
    console.print(result.say(f"on {how}"), soft_wrap=True)
    if measured is not None:
        is_known = measured.stored and isinstance(parts.test, ImageFeatures)
        names = stored_names(model, parts.test) if is_known else []
        print_measured(measured, f"{len(parts.test)} test pictures", names)
    store = escape(str(model.datastore))
    console.print(f"Saved {escape(options.output)} after {seconds:.0f} s: {store}.", soft_wrap=True)
    opened = "" if page is None else f"open [bold]{escape(page)}[/], then "
    console.print(
        f"Next: {opened}[bold]{typed('predict', options.output, 'PICTURE.jpg')}[/]", soft_wrap=True
    )


def _measured(trainer: KnnTrainer, splits: dict[str, Any], parts: Parts) -> Report | None:
    """What the model is worth on the test pictures, with all pictures that there are."""
    if parts.test is None:
        return None
    held_out, train = splits["test" if "test" in splits else "train"], splits["train"]
    return trainer.report(
        parts.test,
        pictures=RowPictures(held_out, held_out[SAMPLE_ID][:]),
        stored_pictures=RowPictures(train, train[SAMPLE_ID][:]),
    )


def _draw_neighbors(
    model: KnnForImageClassification, splits: dict[str, Any], parts: Parts
) -> bytes:
    """A PNG of some test pictures and the training pictures that voted for them."""
    if parts.test is None:
        raise ValueError("Expected pictures held out to show with --show-neighbors, but got none.")
    held_out = splits["test"] if "test" in splits else splits["train"]
    step = max(1, len(parts.test) // _PICTURES_SHOWN)
    chosen = parts.test.select(list(range(len(parts.test)))[::step][:_PICTURES_SHOWN])
    if not isinstance(chosen, ImageFeatures):
        chosen = extract_features(model, chosen, use_cache=False, progress=False)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "neighbors.png"
        draw_neighbors(
            model, chosen, lambda row: picture_of(held_out, int(chosen.ids[row])),
            lambda row_id: picture_of(splits["train"], row_id), path,
        )  # fmt: skip
        return path.read_bytes()


@contextmanager
def _work_folder(options: TrainOptions) -> Iterator[Path]:
    """Where a run keeps its checkpoints: beside the output until it is done, to be resumed."""
    if not options.fine_tune:
        stands(FEATURES_KEPT)
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    folder = options.output.with_name(f"{options.output.name}.training")
    stands(lambda: _say_training(folder))
    goes_on_with(lambda: ["--resume"] if _checkpoints(folder) else [])
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*")) if folder.is_dir() else []


def _say_training(folder: Path) -> str:
    if not _checkpoints(folder):
        return "The fine-tuning had not saved its first epoch yet."
    return f"The newest whole epoch of the fine-tuning is kept in {folder}."


def _trainer(
    model: KnnForImageClassification, options: TrainOptions, folder: Path, parts: Parts
) -> KnnTrainer:
    arguments = _arguments(options, folder)
    trainer = KnnTrainer(model, arguments, train_dataset=parts.train, eval_dataset=parts.validation)
    trainer.remove_callback(PrinterCallback)
    if options.fine_tune:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(EpochReport(console.print))
    if options.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(options.patience))
    return trainer


def _train(trainer: KnnTrainer, options: TrainOptions) -> None:
    if options.fine_tune:
        trainer.train(resume_from_checkpoint=options.resume or None)
        return
    what = "Comparing heads" if options.head == AUTO_HEAD else "Training the head"
    with console.status(f"{what} …"):
        metrics = trainer.train().metrics
    if trainer.metric_choice is not None:
        console.print(trainer.metric_choice.say())
    chosen, choice = trainer.head_choice, trainer.probe_choice
    if chosen is not None:
        print_choice(chosen)
    if choice is not None:
        config = choice.score.config
        console.print(
            f"Best of {len(choice.table)} heads: learning rate {config.learning_rate:g}, weight "
            f"decay {config.weight_decay:g}, alpha {config.alpha:g} "
            f"({choice.score.accuracy:.1%} on rows held out)."
        )
    elif "train_regularizer" in metrics and (chosen is None or chosen.fixed is None):
        console.print(
            f"{trainer.model.config.head.capitalize()} head: smoothing (regulariser) "
            f"{metrics['train_regularizer']:.3g}, temperature "
            f"{metrics['train_temperature']:.3g}, found by leaving each picture out once."
        )


def _extract(
    model: KnnForImageClassification, splits: dict[str, Any], options: TrainOptions
) -> dict[str, ImageFeatures]:
    found: dict[str, ImageFeatures] = {}
    for name in ("train", "validation", "test"):
        if name in splits:
            with progress_bars():
                found[name] = extract_features(
                    model, splits[name], batch_size=options.batch_size,
                    precision=options.precision, on_bad_image=options.on_bad_image,
                    group_by=options.group_by if name == "train" else None,
                )  # fmt: skip
            say_what_was_skipped(found[name])
    return found


def _divide(rows: dict[str, Any], options: TrainOptions) -> Parts:
    """Train, validation and test: what the source has, else held out from train."""
    train, validation, test = rows["train"], rows.get("validation"), rows.get("test")
    if test is None and options.test_share > 0:
        train, test = _hold_out(train, options.test_share, options.seed, options)
    few = options.shots is not None or options.fraction is not None
    if few:
        if validation is not None:
            console.print("The validation split is not used: its labels are beyond the budget.")
        train, validation = _few(train, options), None
        console.print(f"{len(train)} of them are labelled pictures to learn and choose from.")
    if validation is None and (options.fine_tune or len(train) > LARGEST_CROSS_VALIDATION):
        share = FEW_SHOT_VALIDATION_SHARE if few else VALIDATION_SHARE
        train, validation = _hold_out(train, share, options.seed + 1, options)
        if validation is None:
            raise ValueError(
                "Expected a class with two pictures, one of which can be held out to choose on, "
                "but every class has one; add pictures, or leave out --fine-tune."
            )
    return Parts(train, validation, test)


def _hold_out(rows: Any, share: float, seed: int, options: TrainOptions) -> tuple[Any, Any]:
    fold = split_rows(_labels(rows), share, seed, _groups(rows, options))
    if not len(fold.held_out):
        return rows, None
    return rows.select(fold.fitted), rows.select(fold.held_out)


def _few(rows: Any, options: TrainOptions) -> Any:
    if options.shots is not None:
        return rows.select(few_shots(_labels(rows), options.shots, options.seed))
    assert options.fraction is not None
    return rows.select(few_rows(_labels(rows), options.fraction, options.seed))


def _labels(rows: Any) -> Tensor:
    return rows.labels if isinstance(rows, ImageFeatures) else labels_of(rows)


def _groups(rows: Any, options: TrainOptions) -> Tensor | None:
    if options.group_by is None or isinstance(rows, ImageFeatures):
        return getattr(rows, "groups", None)
    return groups_of(rows, options.group_by)


def _report_small_classes(labels: Tensor, names: list[str]) -> None:
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    for name, count in zip(names, counts, strict=True):
        if count == 0:
            console.print(f"[yellow]Class[/] {escape(name)} has no picture that can be used.")
        elif count == 1:
            console.print(
                f"[yellow]Class[/] {escape(name)} has one picture: it is trained on and "
                "remembered, but nothing is left to measure it with."
            )


def _arguments(options: TrainOptions, folder: Path) -> KnnTrainingArguments:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "freeze_backbone": not options.fine_tune,
        "head": options.head,
        "num_train_epochs": options.epochs,
        "learning_rate": options.learning_rate,
        "knn_loss_alpha": options.alpha,
        "class_weights": options.class_weights,
        "label_smoothing_factor": options.label_smoothing,
        "knn_index": options.index,
        "knn_max_memory": options.max_memory,
        "tune_criterion": options.criterion,
        "calibrate": options.calibrate,
        "learn_metric": options.learn_metric,
        "group_by": options.group_by,
        "on_bad_image": options.on_bad_image,
        "seed": options.seed,
        "report_to": options.report_to,
        "use_cpu": trains_on_cpu(),
        "logging_strategy": "epoch" if options.report_to or options.fine_tune else "no",
        "disable_tqdm": True,
    }
    values |= _fine_tuning(options) if options.fine_tune else _frozen(options)
    return KnnTrainingArguments(**values)


def _check(options: TrainOptions) -> None:
    """Refuses options that do not go together, before anything takes long.

    Raises:
        ValueError: naming them.
    """
    if options.shots is not None and options.fraction is not None:
        raise ValueError("Expected one of --shots and --fraction, but got both; leave one out.")
    if options.sweep is not None:
        _refuse(options, _RATES, "no --sweep, which tries learning rates itself,")
    if not options.fine_tune:
        _refuse(options, _FINE_TUNING_ALONE, "--fine-tune")
        return
    if options.learn_metric:
        raise ValueError(
            "Expected no --learn-metric with --fine-tune: the backbone is trained on every picture "
            "then, "
            "so that none is left to find out whether it helps; leave one of them out."
        )
    if options.sweep is not None:
        raise ValueError("Expected no --sweep with --fine-tune; leave one of them out.")
    if not options.alpha:
        _refuse(options, ("refresh", "queries"), "--alpha above 0, which looks neighbours up,")


def _check_packages(options: TrainOptions) -> None:
    """Refuses what needs a package that is not here, before anything takes long.

    Raises:
        ImportError: naming it.
        ValueError: for a logger that there is not.
    """
    if options.show_neighbors:
        check_drawing()
    if options.index not in (AUTO, LATENCY, FLAT):
        require_faiss(f"--index {options.index}")
    for name in sorted({*options.report_to} - {"all", "none"}):
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"Expected --report-to to be one of {sorted(INTEGRATION_TO_CALLBACK)}, but got "
                f"{name!r}."
            )
        if name not in get_available_reporting_integrations():
            how = install("logs") if name in _LOGS else install_package(name)
            raise ImportError(f"--report-to {name} needs a package that is not here; run `{how}`.")


def _refuse(options: TrainOptions, idle: tuple[str, ...], wanted: str) -> None:
    """Refuses options that would be ignored: those that are not at their defaults."""
    given = given_of(options, idle)
    if given:
        raise ValueError(f"Expected {wanted} with {listed(given)}; change one of them.")


def _frozen(options: TrainOptions) -> dict[str, Any]:
    return {"probe_grid": options.sweep, "save_strategy": "no"}


def _fine_tuning(options: TrainOptions) -> dict[str, Any]:
    return {
        "weight_decay": 0.1,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "feature_precision": options.precision,
        "gradient_accumulation_steps": options.accumulate,
        "trainable_blocks": options.blocks,
        "augmentation": options.augmentation,
        "knn_refresh": options.refresh,
        "knn_queries": options.queries,
        "bf16": options.bf16,
        "activation_checkpointing": options.gradient_checkpointing,
        "dataloader_num_workers": options.workers,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
    }
