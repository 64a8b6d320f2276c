"""What the commands of `hf-knn` do with a checkpoint: evaluate, tune, predict."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import typer
from rich.markup import escape
from rich.table import Table
from transformers import PrinterCallback

from ..data.loading import load_splits, prepare
from ..features.extract import ImageFeatures, extract_features, progress_bars
from ..fit.metrics import COMPLEMENTARITY
from ..fit.plots import draw_tuning
from ..model.export import GRAPH_NAME, SCRIPT_NAME, export_onnx
from ..model.modeling import KnnForImageClassification
from ..model.pictures import features_of
from ..store.folders import exclusive_lock
from ..training.arguments import KnnTrainingArguments
from ..training.trainer import KnnTrainer
from .console import console, metrics_table, say_what_was_skipped


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
    calibrate: bool,
    on_bad_image: str,
    plot: Path | None,
) -> None:
    """Chooses k, temperature and λ on labelled pictures and saves them into the checkpoint.

    Args:
        checkpoint: a folder.
        pictures: see `load_splits`; none that the model was trained on.
        split: which one; None takes `validation`, else the only one there is.
        criterion: see `hf_knn.tune`.
        calibrate: also scale the temperatures of head and blend.
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
    with exclusive_lock(Path(checkpoint).resolve()):
        _tune(Path(checkpoint), pictures, split, criterion, calibrate, on_bad_image, plot)


def _tune(
    checkpoint: Path,
    pictures: str,
    split: str | None,
    criterion: str | None,
    calibrate: bool,
    on_bad_image: str,
    plot: Path | None,
) -> None:
    model, rows = _open(str(checkpoint), pictures, split or "validation", on_bad_image)
    if model.datastore is None:
        raise ValueError(f"Expected {checkpoint} to hold a datastore, but it has none.")
    known = set(model.datastore.paths or [])
    if known - {""} and len(known & set(rows.paths)) > len(rows) / 2:
        console.print(
            "[yellow]Most of these pictures are named like those in the datastore.[/] If they are "
            "the same, k-NN has seen them, and what is chosen here will favour it."
        )
    with tempfile.TemporaryDirectory() as folder:
        result = KnnTrainer(model, _silent(folder)).tune(rows, criterion, calibrate)
    model.save_pretrained(checkpoint)
    console.print(
        f"Chosen by {result.criterion} on {len(rows)} pictures: k = {result.k}, temperature = "
        f"{result.temperature:g}, λ = {result.knn_weight:g}. Saved in {escape(str(checkpoint))}."
    )
    if plot is not None:
        draw_tuning(result, plot)
        console.print(f"Drawn: {escape(str(plot))}")


def push_checkpoint(
    checkpoint: Path,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    parent_commit: str | None,
    message: str,
    token: str | None,
    model_license: str | None = None,
) -> None:
    """Checks a checkpoint as a reader would and pushes it.

    Args:
        checkpoint: a folder.
        repo_id: `org/name`.
        private: whether a repository that is made is private.
        revision: a branch; None is main.
        create_pr: open a pull request instead.
        parent_commit: the commit that the branch must be at; None is where it is.
        message: of the commit.
        token: a token; None is the one that is logged in.
        model_license: for the card; None keeps what it says.

    Raises:
        ValueError: if it is no checkpoint folder, or a damaged one.
        OSError: if the Hub refuses, or the branch moved on.
    """
    if not checkpoint.is_dir():
        raise ValueError(f"Expected {checkpoint} to be a checkpoint folder.")
    model = KnnForImageClassification.from_pretrained(checkpoint)
    commit = model.push_to_hub(
        repo_id, commit_message=message, private=private, token=token, revision=revision,
        create_pr=create_pr, parent_commit=parent_commit, license=model_license,
    )  # fmt: skip
    console.print(f"Pushed: {escape(commit.pr_url or commit.commit_url)}")
    console.print(f"Next: [bold]hf-knn predict {escape(repo_id)} PICTURE.jpg[/]", soft_wrap=True)


def export_checkpoint(checkpoint: str, folder: Path) -> None:
    """Exports a checkpoint to ONNX.

    Args:
        checkpoint: a folder or a Hub id.
        folder: where graph, settings and script go.

    Raises:
        ImportError: without onnx and onnxruntime.
        ValueError: for what cannot be exported, with the reason.
        OSError: if something is not there or cannot be written.
    """
    model = KnnForImageClassification.from_pretrained(checkpoint)
    with console.status("Tracing the model …"):
        exported = export_onnx(model, folder)
    size = sum(path.stat().st_size for path in folder.glob(f"{GRAPH_NAME}*"))
    console.print(
        f"Exported {escape(str(folder / GRAPH_NAME))}: {size / 1e6:.1f} MB with "
        f"{exported.rows:,} rows, log-probabilities within {exported.largest_gap:.0e} of PyTorch's."
    )
    console.print(
        f"Next: [bold]python {escape(str(folder / SCRIPT_NAME))} PICTURE.jpg[/]", soft_wrap=True
    )


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


def _open(
    checkpoint: str, pictures: str, split: str, on_bad_image: str
) -> tuple[KnnForImageClassification, ImageFeatures]:
    """A model and the features of one split of labelled pictures."""
    model = KnnForImageClassification.from_pretrained(checkpoint)
    splits = load_splits(pictures)
    if split not in splits and len(splits) > 1:
        raise ValueError(f"Expected a split {split!r}, but {pictures} has {sorted(splits)}.")
    dataset = prepare(splits.get(split, next(iter(splits.values()))), model.config.class_names)
    with progress_bars():
        rows = extract_features(model, dataset, on_bad_image=on_bad_image)
    say_what_was_skipped(rows)
    return model, rows


def _silent(folder: str) -> KnnTrainingArguments:
    return KnnTrainingArguments(
        folder, freeze_backbone=True, report_to=[], disable_tqdm=True, logging_strategy="no"
    )


def _answer(
    model: KnnForImageClassification, path: Path, top: int, neighbors: int
) -> dict[str, Any]:
    features = features_of(model, [path]).to(model.device)
    with torch.inference_mode():
        output = model(features=features, return_neighbors=True)
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
