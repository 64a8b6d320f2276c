"""Pictures of a class that was never seen: `python benchmark/claims/strangers.py`.

Holds out each class in turn, builds the datastore from half of the others, and asks the rest:
how many known pictures are called unlike anything seen at a level of 5 %, and how well the p-value
tells the held-out class from the known ones, beside the head's largest softmax (the usual baseline,
Hendrycks & Gimpel, 2017) and its largest logit.
"""

import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))  # benchmark/, where the catalog lies

from catalog.offline_backbones import build_backbone
from catalog.offline_tasks import load_pictures
from hf_knn import Datastore, KnnForImageClassification, extract_features
from hf_knn.data import few_rows
from hf_knn.fit import fit_ridge
from study.provenance import write_findings

LEVEL = 0.05
MOST_CLASSES = 12


class Rows(NamedTuple):
    """Features [N, D] and labels [N] int64."""

    features: Tensor
    labels: Tensor

    def select(self, rows: Tensor) -> "Rows":
        """Some of them."""
        return Rows(self.features[rows], self.labels[rows])


def main(
    task: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    seeds: Annotated[int, typer.Option(min=2, help="Splits.")] = 5,
    backbone: Annotated[str, typer.Option(help="Frozen.")] = "efficientnet-lite0",
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("outputs/strangers"),
    cache_dir: Annotated[
        Path | None, typer.Option(help="Default: $HF_KNN_CACHE or ~/.cache/hf_knn.")
    ] = None,
) -> None:
    """Measure false alarms and how well strangers are told."""
    console, started = Console(), time.perf_counter()
    cache = None if cache_dir is None else cache_dir / "features"
    found: dict[str, list[dict[str, float]]] = {}
    for name in task or ["openmoji-categories", "openmoji", "digits"]:
        pictures = load_pictures(name, cache_dir)
        classes = len(pictures.features["label"].names)
        # of many classes, some: each takes a fit
        held_out = np.linspace(0, classes - 1, min(classes, MOST_CLASSES)).round().astype(int)
        place = build_backbone(backbone, cache_dir)
        model = KnnForImageClassification.from_backbone(place, classes)
        features = extract_features(model, pictures, cache_dir=cache)
        rows = Rows(features.features, features.labels)
        pairs = [(seed, int(label)) for seed in range(seeds) for label in held_out]
        found[name] = [_measure(model, rows, classes, *pair) for pair in tqdm(pairs, desc=name)]
        console.print(_table(name, found[name]))
    path = output / "strangers.json"
    seconds = time.perf_counter() - started
    write_findings(path, backbone=backbone, level=LEVEL, seconds=seconds, found=found)
    console.print(f"Numbers: {path}")


def _measure(
    model: KnnForImageClassification, rows: Rows, classes: int, seed: int, held_out: int
) -> dict[str, float]:
    pool = torch.as_tensor(few_rows(rows.labels, 0.5, seed))
    everyone = torch.arange(len(rows.labels))
    train = rows.select(pool[rows.labels[pool] != held_out])
    test = rows.select(everyone[~torch.isin(everyone, pool)])
    model.datastore = Datastore.from_features(train.features, train.labels)
    explained = model.explain(features=test.features, level=LEVEL)
    assert isinstance(explained, list)
    p_values = np.array([one.typicality for one in explained])
    mu = train.features.mean(0)
    unit, asked = (functional.normalize(part.features - mu, dim=1) for part in (train, test))
    fit = fit_ridge(unit, train.labels, classes)
    log_probs = fit.log_probs(asked)
    logits = (asked.double() @ fit.weight.T + fit.bias).max(1).values
    is_strange = (test.labels == held_out).numpy()
    return {
        "false_alarms": float((p_values[~is_strange] < LEVEL).mean()),
        "found": float((p_values[is_strange] < LEVEL).mean()),
        "p_value": float(roc_auc_score(is_strange, -p_values)),
        "max_softmax": float(roc_auc_score(is_strange, -log_probs.max(1).values.numpy())),
        "max_logit": float(roc_auc_score(is_strange, -logits.numpy())),
    }


def _table(task: str, rows: list[dict[str, float]]) -> Table:
    table = Table(title=f"{task}: mean ± std over splits and classes", title_justify="left")
    titles = {
        "false_alarms": "false alarms at 5 %", "found": "strangers found", "p_value": "AUROC",
        "max_softmax": "AUROC of max softmax", "max_logit": "AUROC of max logit",
    }  # fmt: skip
    for title in titles.values():
        table.add_column(title, justify="right")
    columns = [[row[name] for row in rows] for name in titles]
    table.add_row(*(f"{mean(column):.3f} ± {stdev(column):.3f}" for column in columns))
    return table


if __name__ == "__main__":
    typer.run(main)
