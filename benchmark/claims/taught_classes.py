"""A class that was taught later against one that was there from the start.

`python benchmark/claims/taught_classes.py` holds out each class in turn, trains on the others,
teaches 1, 5 and 30 pictures of it, and asks the test half: how many of the new class are found,
beside what the neighbours alone find, and what the old classes lose. In the form of *Towards
flexible perception with visual memory* (arXiv 2408.08172).
"""

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))  # benchmark/, where the catalog lies

from catalog.offline_backbones import build_backbone
from catalog.offline_tasks import load_pictures
from hf_knn import KnnForImageClassification, KnnTrainer, KnnTrainingArguments, extract_features
from hf_knn.data import few_rows
from study.provenance import write_findings

HEADS = ("linear", "ridge")
WEIGHTS = ("head", "tuned", "knn")
"""λ of 0, as tuned before the class was taught, and of 1."""


class Recalls(NamedTuple):
    """Of one taught class.

    Attributes:
        new: recall on it.
        old_loss: top-1 on the old classes before minus after.
    """

    new: float
    old_loss: float


def main(
    task: Annotated[
        str, typer.Option(help="See benchmark/catalog/tasks.py.")
    ] = "openmoji-categories",
    shots: Annotated[list[int] | None, typer.Option(help="Pictures taught.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Splits.")] = 3,
    head: Annotated[list[str] | None, typer.Option(help="linear, ridge; repeatable.")] = None,
    per_class: Annotated[
        int | None, typer.Option(min=1, help="Train on so many of each class; default: on half.")
    ] = None,
    backbone: Annotated[str, typer.Option(help="Frozen.")] = "efficientnet-lite0",
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("outputs/taught_classes"),
    cache_dir: Annotated[
        Path | None, typer.Option(help="Default: $HF_KNN_CACHE or ~/.cache/hf_knn.")
    ] = None,
) -> None:
    """Measure what a taught class is worth, and what it costs the others."""
    console, started = Console(), time.perf_counter()
    dataset = load_pictures(task, cache_dir)
    names = list(dataset.features["label"].names)
    place = build_backbone(backbone, cache_dir)
    model = KnnForImageClassification.from_backbone(place, names)
    cache = None if cache_dir is None else cache_dir / "features"
    features = extract_features(model, dataset, cache_dir=cache)
    counts, heads = shots or [1, 5, 30], head or list(HEADS)
    found: dict[str, list[Recalls]] = {}
    with tqdm(total=seeds * len(names) * len(heads), desc=task) as bar:
        for seed in range(seeds):
            for held_out in range(len(names)):
                for kind in heads:
                    rows = _measure(features, names, held_out, place, kind, counts, seed, per_class)
                    for name, recalls in rows.items():
                        found.setdefault(name, []).append(recalls)
                    bar.update()
    path = output / f"{task}.json"
    write_findings(
        path, task=task, backbone=backbone, seeds=seeds, per_class=per_class,
        seconds=time.perf_counter() - started,
        recalls={name: [row._asdict() for row in rows] for name, rows in found.items()},
    )  # fmt: skip
    console.print(_table(task, found, counts, heads))
    console.print(f"Numbers: {path}")


def _measure(
    features: Any,
    names: list[str],
    held_out: int,
    backbone: Path,
    head: str,
    counts: list[int],
    seed: int,
    per_class: int | None,
) -> dict[str, Recalls]:
    """Trains without a class, then teaches it."""
    order = [number for number in range(len(names)) if number != held_out] + [held_out]
    numbers = torch.empty(len(names), dtype=torch.int64)
    numbers[torch.tensor(order)] = torch.arange(len(names))
    labels = numbers[features.labels]  # the held-out class is the last
    new = len(names) - 1
    pool = torch.as_tensor(few_rows(features.labels, 0.5, seed))
    everyone = torch.arange(len(labels))
    test = everyone[~torch.isin(everyone, pool)]
    old_pool, new_pool = pool[labels[pool] != new], pool[labels[pool] == new]
    new_pool = new_pool[torch.randperm(len(new_pool), generator=_generator(seed))]
    if per_class is not None:
        old_pool = _at_most(per_class, old_pool, labels[old_pool], seed)
    old_test, new_test = test[labels[test] != new], test[labels[test] == new]

    model = KnnForImageClassification.from_backbone(
        backbone, [names[number] for number in order[:-1]], head=head
    )
    train = replace(features.select(old_pool), labels=labels[old_pool])
    with tempfile.TemporaryDirectory() as folder:
        arguments = KnnTrainingArguments(
            folder, freeze_backbone=True, probe_grid=None if head == "ridge" else "small",
            seed=seed, disable_tqdm=True, report_to=[], save_strategy="no",
        )  # fmt: skip
        trainer = KnnTrainer(model, arguments, train_dataset=train)
        trainer.train()
        trainer.tune()
    weights = dict(zip(WEIGHTS, (0.0, model.config.knn_weight, 1.0), strict=True))
    before = {
        name: _top1(model, features.features[old_test], labels[old_test], weight)
        for name, weight in weights.items()
    }
    found, taught = {}, 0
    for count in counts:
        more = new_pool[taught:count]
        taught += len(more)
        model.teach(features=features.features[more], labels=[names[held_out]] * len(more))
        for name, weight in weights.items():
            model.config.knn_weight = weight
            recall = _top1(model, features.features[new_test], labels[new_test], weight)
            after = _top1(model, features.features[old_test], labels[old_test], weight)
            found[f"{head} {name} {count}"] = Recalls(recall, before[name] - after)
    return found


def _at_most(count: int, rows: Tensor, labels: Tensor, seed: int) -> Tensor:
    """So many rows of each class, drawn at random."""
    order = torch.randperm(len(rows), generator=_generator(seed))
    return torch.cat([rows[order[labels[order] == label][:count]] for label in labels.unique()])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _top1(
    model: KnnForImageClassification, features: Tensor, labels: Tensor, weight: float
) -> float:
    model.config.knn_weight = weight
    with torch.inference_mode():
        logits = model.eval()(features=features).logits
    return float((logits.argmax(1) == labels).double().mean())


def _table(
    task: str, found: dict[str, list[Recalls]], counts: list[int], heads: list[str]
) -> Table:
    table = Table(
        title=f"{task}: in points, mean ± std over splits and classes", title_justify="left"
    )
    for column in ("head", "λ", "taught", "recall", "minus k-NN alone", "old classes lose"):
        table.add_column(column, justify="left" if column in ("head", "λ") else "right")
    for head in heads:
        for count in counts:
            alone = [row.new for row in found[f"{head} knn {count}"]]
            for name in WEIGHTS:
                rows = found[f"{head} {name} {count}"]
                gaps = [row.new - other for row, other in zip(rows, alone, strict=True)]
                table.add_row(
                    head, name, str(count), _spread([row.new for row in rows]), _spread(gaps),
                    _spread([row.old_loss for row in rows]),
                )  # fmt: skip
    return table


def _spread(values: list[float]) -> str:
    points = [100 * value for value in values]
    return f"{mean(points):.1f} ± {stdev(points):.1f}" if len(points) > 1 else f"{points[0]:.1f}"


if __name__ == "__main__":
    typer.run(main)
