"""What the commands of `hf-knn` do."""

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging

from .data import hide_progress_bars, load_splits, prepare
from .features import ImageFeatures, extract_features
from .folds import split_rows
from .images import BadImageError, decode_image
from .metrics import COMPLEMENTARITY
from .model_card import VOICE_NAMES, write_model_card
from .modeling_knn import KnnForImageClassification
from .plots import draw_tuning
from .trainer import KnnTrainer
from .training_args import KnnTrainingArguments

LARGEST_CROSS_VALIDATION = 20_000
"""Above this many training pictures a tenth is held out for tuning instead of folds."""

console = Console()


@dataclass(frozen=True)
class TrainOptions:
    """The options of `hf-knn train`; see `hf-knn train --help`."""

    pictures: str
    output: Path
    backbone: str
    epochs: int
    learning_rate: float
    alpha: float
    head: str
    hidden: list[int]
    sweep: str | None
    class_weights: str
    index: str
    max_memory: str | None
    test_share: float
    pooling: str | None
    knn_pooling: str | None
    batch_size: int
    precision: str
    on_bad_image: str
    seed: int


@dataclass(frozen=True)
class Rows:
    """Features of the three parts; `validation` and `test` may be missing."""

    train: ImageFeatures
    validation: ImageFeatures | None
    test: ImageFeatures | None


def run(command: Callable[..., None], *args: Any) -> None:
    """Runs a command; an error a user can do something about becomes one message.

    Args:
        command: a function of this module.
        args: its arguments.
    """
    hide_progress_bars()
    transformers_logging.disable_progress_bar()
    logging.getLogger("hf_knn").setLevel(logging.ERROR)
    try:
        command(*args)
    except (OSError, ValueError, ImportError) as error:
        if os.environ.get("HF_KNN_DEBUG"):
            raise
        Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}")
        raise typer.Exit(1) from error


def train_pictures(options: TrainOptions) -> None:
    """Does everything from pictures to a tuned, measured checkpoint.

    Args:
        options: see `hf-knn train --help`.

    Raises:
        ValueError: for pictures or options that cannot be used.
        OSError: if the backbone cannot be found or the checkpoint cannot be written.
    """
    started = time.perf_counter()
    set_seed(options.seed)
    splits = load_splits(options.pictures)
    names = list(splits["train"].features["label"].names)
    console.print(f"{len(splits['train'])} pictures of {len(names)} classes in train.")
    model = KnnForImageClassification.from_backbone(
        options.backbone, names, pooling=options.pooling, knn_pooling=options.knn_pooling,
        head=options.head, head_hidden_sizes=options.hidden,
    )  # fmt: skip
    rows = _divide(_extract(model, splits, options), options)
    with tempfile.TemporaryDirectory() as folder:
        trainer = KnnTrainer(
            model,
            _arguments(options, folder),
            train_dataset=rows.train,
            eval_dataset=rows.validation,
        )
        trainer.remove_callback(PrinterCallback)
        with console.status("Training the head …"):
            trained = trainer.train()
        _say_what_was_fitted(trainer, trained.metrics)
        with console.status("Choosing k, temperature and λ on held-out pictures …"):
            result = trainer.tune()
        metrics = trainer.evaluate(rows.test) if rows.test is not None else {}
        assert model.datastore is not None
        model.datastore.source = {"dataset": Path(options.pictures).name, "split": "train"}
        trainer.save_model(str(options.output))
    how = "a validation set" if rows.validation is not None else "cross-validation"
    console.print(
        f"Chosen by {result.criterion} on {how}: k = {result.k}, "
        f"temperature = {result.temperature:g}, λ = {result.knn_weight:g}."
    )
    write_model_card(
        options.output, model, metrics,
        name=options.output.name, dataset=Path(options.pictures).name,
    )  # fmt: skip
    report = {
        "options": asdict(options) | {"output": str(options.output)},
        "metrics": metrics,
        "chosen": {"k": result.k, "temperature": result.temperature, "λ": result.knn_weight},
        "skipped": [row._asdict() for row in rows.train.skipped],
        "seconds": time.perf_counter() - started,
    }
    text = json.dumps(report, indent=2, ensure_ascii=False)
    (options.output / "report.json").write_text(text + "\n", encoding="utf-8")
    if metrics and rows.test is not None:
        console.print(metrics_table(metrics, f"{len(rows.test)} test pictures"))
    seconds = time.perf_counter() - started
    console.print(f"Saved {options.output} after {seconds:.0f} s: {escape(str(model.datastore))}.")
    console.print(
        f"Next: [bold]hf-knn predict {escape(str(options.output))} PICTURE.jpg[/]", soft_wrap=True
    )


def evaluate_pictures(
    checkpoint: str, pictures: str, split: str | None, on_bad_image: str, json_output: bool
) -> None:
    """Measures a checkpoint on labelled pictures.

    Args:
        checkpoint: a folder or a Hub id.
        pictures: see `load_splits`.
        split: which one; None takes `test`, else the only one there is.
        on_bad_image: `fail` or `skip`.
        json_output: print JSON instead of a table.

    Raises:
        ValueError: for pictures that cannot be used, or labels that the model does not have.
        OSError: if something is not there.
    """
    model, rows = _open(checkpoint, pictures, split or "test", on_bad_image)
    with tempfile.TemporaryDirectory() as folder:
        trainer = KnnTrainer(model, _silent(folder))
        trainer.remove_callback(PrinterCallback)
        metrics = trainer.evaluate(rows)
    if json_output:
        typer.echo(json.dumps(metrics, indent=2))
        return
    console.print(metrics_table(metrics, f"{len(rows)} pictures"))
    known = {name: metrics[f"eval_{name}"] for name in COMPLEMENTARITY if f"eval_{name}" in metrics}
    if known:
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.1%}" for name, value in known.items())
        console.print(f"Together: {shown}.")


def tune_checkpoint(
    checkpoint: str,
    pictures: str,
    split: str | None,
    criterion: str | None,
    on_bad_image: str,
    plot: Path | None,
) -> None:
    """Chooses k, temperature and λ on labelled pictures and saves them into the checkpoint.

    Args:
        checkpoint: a folder.
        pictures: see `load_splits`; none that the model was trained on.
        split: which one; None takes `validation`, else the only one there is.
        criterion: see `hf_knn.tune`.
        on_bad_image: `fail` or `skip`.
        plot: where to draw what was tried; None draws nothing.

    Raises:
        ValueError: for pictures that cannot be used, or a checkpoint that is not a folder.
        OSError: if something is not there or cannot be written.
    """
    if not Path(checkpoint).is_dir():
        raise ValueError(
            f"Expected {checkpoint} to be a checkpoint folder, since it will be changed."
        )
    model, rows = _open(checkpoint, pictures, split or "validation", on_bad_image)
    if model.datastore is None:
        raise ValueError(f"Expected {checkpoint} to hold a datastore, but it has none.")
    known = set(model.datastore.paths or [])
    if known - {""} and len(known & set(rows.paths)) > len(rows) / 2:
        console.print(
            "[yellow]Most of these pictures are named like those in the datastore.[/] If they are "
            "the same, k-NN has seen them, and what is chosen here will favour it."
        )
    with tempfile.TemporaryDirectory() as folder:
        result = KnnTrainer(model, _silent(folder)).tune(rows, criterion)
    model.save_pretrained(checkpoint)
    console.print(
        f"Chosen by {result.criterion} on {len(rows)} pictures: k = {result.k}, temperature = "
        f"{result.temperature:g}, λ = {result.knn_weight:g}. Saved in {escape(checkpoint)}."
    )
    if plot is not None:
        draw_tuning(result, plot)
        console.print(f"Drawn: {escape(str(plot))}")


def predict_images(
    checkpoint: str, images: list[Path], top: int, neighbors: int, json_output: bool
) -> None:
    """Classifies pictures and shows the neighbours that voted.

    Args:
        checkpoint: a folder or a Hub id.
        images: picture files.
        top: classes shown per picture.
        neighbors: neighbours shown per picture.
        json_output: print JSON instead of tables.

    Raises:
        ValueError: if a picture cannot be decoded, or the checkpoint is damaged.
        OSError: if something is not there.
    """
    model = KnnForImageClassification.from_pretrained(checkpoint)
    answers = [_answer(model, path, top, neighbors) for path in images]
    if json_output:
        typer.echo(json.dumps(answers, indent=2, ensure_ascii=False))
        return
    for answer in answers:
        _print_answer(answer)


def metrics_table(metrics: dict[str, float], title: str) -> Table:
    """Head, neighbours and blend as a table.

    Args:
        metrics: what `KnnTrainer.evaluate` returned.
        title: of the table.
    """
    table = Table(title=title, title_justify="left")
    for column in ("", "top-1", "mean per class", "NLL", "ECE"):
        table.add_column(column, justify="left" if not column else "right")
    for voice, label in VOICE_NAMES.items():
        if f"eval_{voice}_top1" in metrics:
            values = [metrics[f"eval_{voice}_{name}"] for name in ("top1", "mean_class")]
            tail = [metrics[f"eval_{voice}_{name}"] for name in ("nll", "ece")]
            table.add_row(label, *[f"{v:.1%}" for v in values], *[f"{v:.3f}" for v in tail])
    return table


def _open(
    checkpoint: str, pictures: str, split: str, on_bad_image: str
) -> tuple[KnnForImageClassification, ImageFeatures]:
    """A model and the features of one split of labelled pictures."""
    model = KnnForImageClassification.from_pretrained(checkpoint)
    splits = load_splits(pictures)
    if split not in splits and len(splits) > 1:
        raise ValueError(f"Expected a split {split!r}, but {pictures} has {sorted(splits)}.")
    dataset = prepare(splits.get(split, next(iter(splits.values()))), model.config.class_names)
    transformers_logging.enable_progress_bar()
    rows = extract_features(model, dataset, on_bad_image=on_bad_image)
    transformers_logging.disable_progress_bar()
    _say_what_was_skipped(rows)
    return model, rows


def _say_what_was_skipped(rows: ImageFeatures) -> None:
    for row in rows.skipped:
        place = escape(row.path or f"row {row.row}")
        console.print(f"[yellow]Skipped[/] {place}: {escape(row.reason)}.")


def _say_what_was_fitted(trainer: KnnTrainer, metrics: dict[str, float]) -> None:
    choice = trainer.probe_choice
    if choice is not None:
        config = choice.score.config
        console.print(
            f"Best of {len(choice.table)} heads: learning rate {config.learning_rate:g}, weight "
            f"decay {config.weight_decay:g}, alpha {config.alpha:g} "
            f"({choice.score.accuracy:.1%} on rows held out)."
        )
    elif "train_regularizer" in metrics:
        console.print(
            f"Ridge head: regulariser {metrics['train_regularizer']:.3g}, temperature "
            f"{metrics['train_temperature']:.3g}, by leave-one-out."
        )


def _silent(folder: str) -> KnnTrainingArguments:
    return KnnTrainingArguments(
        folder, freeze_backbone=True, report_to=[], disable_tqdm=True, logging_strategy="no"
    )


def _extract(
    model: KnnForImageClassification, splits: dict[str, Any], options: TrainOptions
) -> dict[str, ImageFeatures]:
    transformers_logging.enable_progress_bar()
    found: dict[str, ImageFeatures] = {}
    for name in ("train", "validation", "test"):
        if name in splits:
            found[name] = extract_features(
                model,
                splits[name],
                batch_size=options.batch_size,
                precision=options.precision,
                on_bad_image=options.on_bad_image,
            )
            _say_what_was_skipped(found[name])
    transformers_logging.disable_progress_bar()
    return found


def _divide(features: dict[str, ImageFeatures], options: TrainOptions) -> Rows:
    """Train, validation and test: what the source has, else held out from train."""
    train, test = features["train"], features.get("test")
    validation = features.get("validation")
    _report_small_classes(train)
    skipped = train.skipped
    if test is None and options.test_share > 0:
        fold = split_rows(train.labels, options.test_share, options.seed)
        if len(fold.held_out):
            train, test = train.select(fold.fitted), train.select(fold.held_out)
    if validation is None and len(train) > LARGEST_CROSS_VALIDATION:
        fold = split_rows(train.labels, 0.1, options.seed + 1)
        train, validation = train.select(fold.fitted), train.select(fold.held_out)
    train.skipped = skipped
    return Rows(train, validation, test)


def _report_small_classes(train: ImageFeatures) -> None:
    counts = torch.bincount(train.labels, minlength=len(train.label_names)).tolist()
    for name, count in zip(train.label_names, counts, strict=True):
        if count == 0:
            console.print(f"[yellow]Class[/] {escape(name)} has no picture that can be used.")
        elif count == 1:
            console.print(
                f"[yellow]Class[/] {escape(name)} has one picture: it is trained on and "
                "remembered, but nothing is left to measure it with."
            )


def _arguments(options: TrainOptions, folder: str) -> KnnTrainingArguments:
    return KnnTrainingArguments(
        folder,
        freeze_backbone=True,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        weight_decay=0.1,
        per_device_train_batch_size=256,
        knn_loss_alpha=options.alpha,
        probe_grid=options.sweep,
        class_weights=options.class_weights,
        knn_index=options.index,
        knn_max_memory=options.max_memory,
        seed=options.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def _answer(
    model: KnnForImageClassification, path: Path, top: int, neighbors: int
) -> dict[str, Any]:
    if model.image_processor is None:
        raise ValueError("Expected a checkpoint with an image processor, but it has none.")
    try:
        image = decode_image(path)
    except BadImageError as error:
        raise ValueError(f"Expected {path} to be a picture, but: {error}.") from error
    pixels = model.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        output = model(pixel_values=pixels.to(model.device, model.dtype), return_neighbors=True)
    names = model.config.class_names
    probabilities = output.logits[0].exp()
    head = output.head_logits[0].float().softmax(-1)
    votes = None if output.knn_log_probs is None else output.knn_log_probs[0].exp()
    classes = probabilities.topk(min(top, len(probabilities))).indices.tolist()
    answer: dict[str, Any] = {
        "image": str(path),
        "classes": [
            {
                "label": names[c],
                "probability": float(probabilities[c]),
                "head": float(head[c]) if c < len(head) else None,
                "knn": None if votes is None else float(votes[c]),
            }
            for c in classes
        ],
        "neighbors": [],
    }
    if output.neighbors is not None and model.datastore is not None:
        found = output.neighbors
        rows = zip(found.labels[0].tolist(), found.similarities[0].tolist(),
                   found.ids[0].tolist(), strict=True)  # fmt: skip
        answer["neighbors"] = [
            {
                "label": names[label],
                "similarity": similarity,
                "id": row_id,
                "path": model.datastore.path_of(row_id),
            }
            for label, similarity, row_id in list(rows)[:neighbors]
        ]
    return answer


def _print_answer(answer: dict[str, Any]) -> None:
    table = Table(title=escape(answer["image"]), title_justify="left")
    for column in ("class", "blend", "head", "neighbours"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for row in answer["classes"]:
        shares = [row["probability"], row["head"], row["knn"]]
        table.add_row(
            escape(row["label"]), *["-" if share is None else f"{share:.1%}" for share in shares]
        )
    console.print(table)
    if not answer["neighbors"]:
        return
    near = Table(title="nearest training pictures", title_justify="left")
    for column in ("label", "similarity", "id", "picture"):
        near.add_column(column, justify="right" if column in ("similarity", "id") else "left")
    for row in answer["neighbors"]:
        place = escape(row["path"] or "-")
        near.add_row(escape(row["label"]), f"{row['similarity']:.3f}", str(row["id"]), place)
    console.print(near)
