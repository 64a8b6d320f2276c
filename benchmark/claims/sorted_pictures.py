"""Does `hf-knn sort` keep the error that it states: `python benchmark/claims/sorted_pictures.py`.

Trains and tunes on a part of a task, and sorts the rest as the command does: into a folder of a
class from the threshold for the stated error on, unless the picture is unlike anything seen. Each
seed holds out one of three shares. Counted are the wrong pictures among the sorted ones, which may
be the stated error plus one standard error over the seeds, and how many are sorted of those that
the best threshold in hindsight would sort: the lowest one at which the error is kept on these very
pictures. That should be 0.8 at least.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))  # benchmark/, where the catalog lies

from catalog.offline_backbones import build_backbone
from catalog.offline_tasks import load_pictures
from hf_knn import (
    Datastore,
    KnnForImageClassification,
    KnnTrainer,
    KnnTrainingArguments,
    extract_features,
)
from hf_knn.data import few_rows
from study.provenance import write_findings

TASKS = ("openmoji-categories", "digits")
HELD_OUT = (0.3, 0.5, 0.7)
STRANGE_BELOW = 0.05
LEAST_SHARE = 0.8


class Sorted(NamedTuple):
    """One split.

    Attributes:
        held_out: share of the pictures that are sorted.
        pictures: how many there are.
        sorted: share of them in folders of classes.
        wrong: share of these.
        of_best: sorted ones by how many the best threshold in hindsight sorts.
        unsure: share that is not sure enough.
        strange: share that is unlike anything seen.
        accuracy: of the best answers to all of them.
    """

    held_out: float
    pictures: int
    sorted: float
    wrong: float
    of_best: float
    unsure: float
    strange: float
    accuracy: float


def main(
    task: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    seeds: Annotated[int, typer.Option(min=2, help="Splits of each task.")] = 20,
    max_error: Annotated[float, typer.Option(help="That is stated.")] = 0.05,
    head: Annotated[str, typer.Option(help="Or auto, which compares all: ten times as long.")] = (
        "ridge"
    ),
    backbone: Annotated[str, typer.Option(help="Frozen.")] = "efficientnet-lite0",
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("outputs/sorted_pictures"),
    cache_dir: Annotated[
        Path | None, typer.Option(help="Default: $HF_KNN_CACHE or ~/.cache/hf_knn.")
    ] = None,
) -> None:
    """Measure the error among sorted pictures, and how many are sorted."""
    console, started = Console(), time.perf_counter()
    cache = None if cache_dir is None else cache_dir / "features"
    found: dict[str, list[Sorted]] = {}
    for name in task or TASKS:
        pictures = load_pictures(name, cache_dir)
        names = list(pictures.features["label"].names)
        place = build_backbone(backbone, cache_dir)
        model = KnnForImageClassification.from_backbone(place, names)
        features = extract_features(model, pictures, cache_dir=cache)
        for seed in tqdm(range(seeds), desc=name):
            held_out = HELD_OUT[seed % len(HELD_OUT)]
            pool = torch.as_tensor(few_rows(features.labels, 1 - held_out, seed))
            is_new = torch.ones(len(features), dtype=torch.bool)
            is_new[pool] = False
            model = KnnForImageClassification.from_backbone(place, names, head=head)
            with tempfile.TemporaryDirectory() as folder:
                arguments = KnnTrainingArguments(
                    folder, freeze_backbone=True, seed=seed, disable_tqdm=True, report_to=[],
                    save_strategy="no",
                )  # fmt: skip
                trainer = KnnTrainer(model, arguments, train_dataset=features.select(pool))
                trainer.train()
                trainer.tune()
            inbox = features.select(is_new.nonzero().flatten())
            one = sort(model, inbox.features, inbox.labels, max_error)
            found.setdefault(name, []).append(one._replace(held_out=held_out))
            write_findings(
                output / f"{head}.json", backbone=backbone, head=head, max_error=max_error,
                seconds=time.perf_counter() - started,
                found={name: [one._asdict() for one in rows] for name, rows in found.items()},
            )  # fmt: skip
    console.print(table_of(found, max_error))
    console.print(f"Numbers: {output / f'{head}.json'}")


def sort(
    model: KnnForImageClassification, features: torch.Tensor, labels: torch.Tensor, rate: float
) -> Sorted:
    """What becomes of pictures, and what could have.

    Args:
        model: with thresholds; without one for the rate nothing is sorted.
        features: [N, D].
        labels: [N] int64.
        rate: that is stated.
    """
    threshold = model.config.answer_thresholds.get(f"{rate:g}", np.inf)
    with torch.inference_mode():
        output = model(features=features, return_neighbors=True)
    confidence, answer = output.logits.exp().max(1)
    sure, is_wrong = confidence.numpy(), (answer != labels).numpy()
    is_strange = typicality(model, output.neighbors.similarities[:, 0]) < STRANGE_BELOW
    is_sorted = (sure >= threshold) & ~is_strange
    return Sorted(
        0.0, len(labels), float(is_sorted.mean()),
        float(is_wrong[is_sorted].mean()) if is_sorted.any() else 0.0,
        float(is_sorted.sum() / max(1, best_in_hindsight(sure, is_wrong, rate))),
        float((~is_sorted & ~is_strange).mean()), float(is_strange.mean()),
        float(1 - is_wrong.mean()),
    )  # fmt: skip


def typicality(model: KnnForImageClassification, nearest: torch.Tensor) -> NDArray[np.float64]:
    """As `explain` says it, without its other reasons: stored rows that lie as far from the others.

    Args:
        model: with a datastore.
        nearest: [N] similarities of pictures to their nearest row.
    """
    store = model.datastore
    assert isinstance(store, Datastore)
    rows = store.rows_of(store.ids)
    own = store.search(rows.features, 1, rows.ids).similarities.flatten().sort().values
    as_far = torch.searchsorted(own, nearest, right=True)
    return ((1 + as_far) / (1 + len(own))).numpy()


def best_in_hindsight(
    confidence: NDArray[np.float32], is_wrong: NDArray[np.bool_], rate: float
) -> int:
    """The most pictures above any threshold of which no larger share is wrong.

    Args:
        confidence: [N].
        is_wrong: [N].
        rate: of errors.
    """
    order = np.argsort(-confidence, kind="stable")
    counts = np.arange(1, len(order) + 1)
    kept = np.flatnonzero(is_wrong[order].cumsum() <= rate * counts)
    return int(counts[kept[-1]]) if len(kept) else 0


def table_of(found: dict[str, list[Sorted]], rate: float) -> Table:
    """Means over the splits of a task, and of each share that was held out."""
    table = Table(title=f"stated error {rate:.0%}: mean ± standard error", title_justify="left")
    titles = ("task", "held out", "splits", "accuracy", "sorted", "wrong of these",
              "of the best in hindsight", "unsure", "strange", "")  # fmt: skip
    for title in titles:
        table.add_column(title)
    for name, rows in found.items():
        for held_out in (*HELD_OUT, None):
            some = [one for one in rows if held_out in (None, one.held_out)]
            if len(some) < 2:
                continue
            wrong, share = _mean(some, "wrong"), _mean(some, "of_best")
            good = wrong[0] <= rate + wrong[1] and share[0] >= LEAST_SHARE
            cells = (_mean(some, column) for column in ("accuracy", "sorted"))
            rest = (_mean(some, column) for column in ("unsure", "strange"))
            table.add_row(
                name, "all" if held_out is None else f"{held_out:.0%}", str(len(some)),
                *(f"{m:.1%}" for m, _ in cells), f"{wrong[0]:.2%} ± {wrong[1]:.2%}",
                f"{share[0]:.3f} ± {share[1]:.3f}", *(f"{m:.1%}" for m, _ in rest),
                "PASS" if good else "FAIL",
            )  # fmt: skip
    return table


def _mean(rows: list[Sorted], column: str) -> tuple[float, float]:
    values = [getattr(row, column) for row in rows]
    return mean(values), stdev(values) / len(values) ** 0.5


if __name__ == "__main__":
    typer.run(main)
