"""The model card of a checkpoint, from what was measured."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .modeling_knn import KnnForImageClassification
from .storage import write_durably

VOICE_NAMES = {"head": "head alone", "knn": "neighbours alone", "blend": "blend"}


def write_model_card(
    folder: Path,
    model: KnnForImageClassification,
    metrics: dict[str, float],
    *,
    name: str,
    dataset: str,
    notes: list[str] | None = None,
) -> None:
    """Writes `README.md` into a checkpoint.

    Args:
        folder: the checkpoint.
        model: what was saved there.
        metrics: what `KnnTrainer.evaluate` returned on the test set (`eval_…`).
        name: of the model.
        dataset: what the pictures are called.
        notes: sentences on how it was made.
    """
    data = _metadata(model, metrics, name, dataset)
    text = f"---\n{data.to_yaml()}\n---\n\n{_body(model, metrics, name, dataset, notes or [])}"
    write_durably(folder / "README.md", lambda path: _write(path, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _metadata(
    model: KnnForImageClassification, metrics: dict[str, float], name: str, dataset: str
) -> ModelCardData:
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="image-folder",
            dataset_name=dataset,
            metric_type="accuracy",
            metric_name=f"top-1 ({label})",
            metric_value=metrics[f"eval_{voice}_top1"],
        )
        for voice, label in VOICE_NAMES.items()
        if f"eval_{voice}_top1" in metrics
    ]
    values: dict[str, Any] = {"eval_results": results, "model_name": name} if results else {}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        base_model=getattr(model.config, "base_model", None),
        tags=["knn", "hf-knn", "image-classification"],
        **values,
    )


def _body(
    model: KnnForImageClassification,
    metrics: dict[str, float],
    name: str,
    dataset: str,
    notes: list[str],
) -> str:
    config, store = model.config, model.datastore
    rows = len(store) if store is not None else 0
    lines = [
        f"# {name}",
        "",
        "An image classifier that also remembers: a head on a vision backbone, blended with the "
        "votes of the nearest training pictures.",
        "",
        "```python",
        "from transformers import AutoModelForImageClassification",
        "",
        "model = AutoModelForImageClassification.from_pretrained(",
        f'    "{name}", trust_remote_code=True',
        ")",
        "```",
        "",
        "With `hf_knn` installed and imported, `trust_remote_code` is not needed.",
        "",
        "## Measured",
        "",
        *_table(metrics),
        "",
        f"Trained and measured on {dataset}. The blend uses k = {config.k}, temperature "
        f"{config.knn_temperature:g}, λ = {config.knn_weight:g}.",
        *[f"{note}" for note in notes],
        "",
        "## Datastore",
        "",
        f"{rows} rows over {config.classes} classes, {config.store_pooling} pooling, "
        f"{config.normalization} normalisation, {config.metric} similarity.",
        "",
        "## Limits and privacy",
        "",
        "The datastore holds features of the training pictures, which can reveal something about "
        "them: share it only where you may share that. Removing a row leaves no byte of it in the "
        "next save, but earlier commits of a repository still hold it.",
        "",
    ]
    return "\n".join(lines)


def _table(metrics: dict[str, float]) -> list[str]:
    present = [voice for voice in VOICE_NAMES if f"eval_{voice}_top1" in metrics]
    if not present:
        return ["Nothing was held out, so nothing was measured."]
    columns = ("top1", "mean_class", "nll", "ece")
    rows = [
        f"| {VOICE_NAMES[voice]} | "
        + " | ".join(f"{metrics[f'eval_{voice}_{column}']:.4f}" for column in columns)
        + " |"
        for voice in present
    ]
    head = ["| voice | top-1 | mean per class | NLL (p floored at 1e-12) | ECE |"]
    return [*head, "|---|---|---|---|---|", *rows]
