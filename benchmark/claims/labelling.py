"""In which order `hf-knn label` asks, against random order and the margin alone.

`python benchmark/claims/labelling.py` draws half of the pictures as unlabelled, asks for one label
after the other, and after each answer asks a ridge head about the other half: the area under that
curve up to 5 labels a class, over 10 draws. The default was chosen on other draws (100 to 103).
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import t
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))  # benchmark/, where the catalog lies

from catalog.offline_backbones import build_backbone
from catalog.offline_tasks import load_pictures
from hf_knn import KnnForImageClassification, extract_features
from hf_knn.labelling import Rule, next_pictures, rule_for, similarities, unsure_of
from study.provenance import write_findings

RANDOM = "random order"
ORDERS = {
    RANDOM: None,
    "margin alone": Rule.MARGIN,
    "MaxHerding alone": Rule.HERDING,
    "typical first, then margin": Rule.MARGIN,
    "typical first, then margin x density": Rule.MARGIN_DENSITY,
    "typical first, then margin x gain in coverage": Rule.MARGIN_GAIN,
    "typical first, then uncertain herding (default)": Rule.UNCERTAIN_HERDING,
}
"""`typical first` is MaxHerding until there is a label a class."""

REGULARIZER, TEMPERATURE = 0.1, 0.1
"""Of the ridge head, as a session guesses."""

_IMPOSSIBLE = -1e4


def main(
    task: Annotated[
        list[str] | None, typer.Option(help="See benchmark/catalog/tasks.py; repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=2, help="Draws.")] = 10,
    first: Annotated[int, typer.Option(help="Seed of the first draw.")] = 0,
    per_class: Annotated[int, typer.Option(min=1, help="Labels a class, on average.")] = 5,
    backbone: Annotated[str, typer.Option(help="Frozen.")] = "efficientnet-lite0",
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("outputs/labelling"),
    cache_dir: Annotated[
        Path | None, typer.Option(help="Default: $HF_KNN_CACHE or ~/.cache/hf_knn.")
    ] = None,
) -> None:
    """Measure what an order of questions is worth."""
    console = Console()
    for name in task or ["openmoji-categories", "digits"]:
        started = time.perf_counter()
        dataset = load_pictures(name, cache_dir)
        classes = len(dataset.features["label"].names)
        model = KnnForImageClassification.from_backbone(
            build_backbone(backbone, cache_dir), classes
        )
        cache = None if cache_dir is None else cache_dir / "features"
        rows = extract_features(model, dataset, cache_dir=cache)
        curves: dict[str, list[list[float]]] = {order: [] for order in ORDERS}
        with tqdm(total=seeds * len(ORDERS), desc=name) as bar:
            for seed in range(first, first + seeds):
                draw = Draw(rows.features, rows.labels, seed)
                for order, rule in ORDERS.items():
                    is_late = order.startswith("typical first")
                    curves[order].append(draw.curve(rule, per_class * classes, is_late))
                    bar.update()
        path = output / f"{name}.json"
        write_findings(
            path, task=name, backbone=backbone, seeds=seeds, first=first, per_class=per_class,
            seconds=time.perf_counter() - started, curves=curves,
        )  # fmt: skip
        console.print(_table(name, curves, classes))
        console.print(f"Numbers: {path}")


class Draw:
    """Half of the pictures to label, the others to ask about.

    Args:
        features: [N, D].
        labels: [N] int64.
        seed: of the halves and of the random order.
    """

    def __init__(self, features: Tensor, labels: Tensor, seed: int) -> None:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        self._count = len(labels) // 2
        pool = features[order[: self._count]]
        middle = pool.double().mean(dim=0)
        rows = functional.normalize(features[order].double() - middle, dim=1)
        self._products = rows @ rows[: self._count].T  # [N, N / 2]
        self._labels, self._classes = labels[order], int(labels.max()) + 1
        self._similar = similarities(pool, pool, middle)

    def curve(self, rule: Rule | None, steps: int, is_late: bool) -> list[float]:
        """Accuracy on the other half after each answer.

        Args:
            rule: None takes the pictures in their random order.
            steps: how many labels.
            is_late: the rule begins when there is a label a class, as `auto` does.
        """
        answers, found = self._answers(rule, is_late), []
        for _, shares in zip(range(steps), answers, strict=False):
            is_right = shares[self._count :].argmax(dim=1) == self._labels[self._count :]
            found.append(float(is_right.double().mean()))
        return found

    def _answers(self, rule: Rule | None, is_late: bool) -> Iterator[Tensor]:
        """After each label, what the head says of all pictures."""
        chosen: list[int] = []
        covered, left = torch.zeros(self._count), [*range(self._count)]
        shares = torch.empty(0, 0)
        while True:
            number = left[0]
            if rule is not None:
                known = int(self._labels[chosen].unique().numel())
                is_early = is_late and rule_for(len(chosen), known) == Rule.HERDING
                now = Rule.HERDING if is_early else rule
                unsure = torch.ones(self._count)
                if chosen:
                    there = self._labels[chosen].unique()
                    unsure = unsure_of(shares[: self._count, there])
                number = next(next_pictures(self._similar, covered, left, now, unsure))
            chosen.append(number)
            left.remove(number)
            covered = torch.maximum(covered, self._similar[number])
            labels = self._labels[chosen]
            shares = ridge(self._products[:, chosen], chosen, labels, self._classes)
            yield shares


def ridge(products: Tensor, chosen: list[int], labels: Tensor, classes: int) -> Tensor:
    """[N, C] probabilities of a ridge head, solved in its dual form: there are few rows.

    Args:
        products: [N, M] inner products of all rows with those that are labelled.
        chosen: which of the N rows these are.
        labels: [M] int64.
        classes: C.
    """
    targets = functional.one_hot(labels, classes).double()
    prior = targets.mean(dim=0)
    # about the mean of the labelled rows, on both sides
    about = products - products[chosen].mean(dim=0)
    about = about - about.mean(dim=1, keepdim=True)
    gram = about[chosen] + REGULARIZER * torch.eye(len(chosen), dtype=torch.float64)
    logits = about @ torch.linalg.solve(gram, targets - prior) + prior
    is_there = torch.bincount(labels, minlength=classes) > 0
    return torch.where(is_there, logits / TEMPERATURE, _IMPOSSIBLE).softmax(dim=1)


def _table(task: str, curves: dict[str, list[list[float]]], classes: int) -> Table:
    table = Table(title=f"{task}: area under the curve, 95 % intervals", title_justify="left")
    table.add_column("order")
    for column in ("area", "of random", "minus random", "minus margin", "1 a class", "at the end"):
        table.add_column(column, justify="right")
    areas = {order: [mean(curve) for curve in all_of] for order, all_of in curves.items()}
    for order, all_of in curves.items():
        base = areas[RANDOM]
        table.add_row(
            order, f"{mean(areas[order]):.1%}", f"{mean(areas[order]) / mean(base):.3f}",
            _gap(areas[order], base), _gap(areas[order], areas["margin alone"]),
            f"{mean(curve[classes - 1] for curve in all_of):.1%}",
            f"{mean(curve[-1] for curve in all_of):.1%}",
        )  # fmt: skip
    return table


def _gap(ours: list[float], theirs: list[float]) -> str:
    """Mean difference in points with its interval by Student's t, over the draws in pairs."""
    gaps = [100 * (one - other) for one, other in zip(ours, theirs, strict=True)]
    if not any(gaps):
        return "-"
    half = float(t.ppf(0.975, len(gaps) - 1)) * stdev(gaps) / len(gaps) ** 0.5
    return f"{mean(gaps):+.1f} [{mean(gaps) - half:+.1f}, {mean(gaps) + half:+.1f}]"


if __name__ == "__main__":
    typer.run(main)
