"""One picture more or less on a large datastore, beside a refit.

Times are after the forward pass: from a feature to a model whose next answer knows it. A kernel
head has 4,096 random features; how long its sums take to be made again from the rows is said too.
"""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from harness import compare, report
from sklearn.linear_model import RidgeClassifier
from transformers import ViTConfig, ViTModel

from hf_knn import Datastore, KnnForImageClassification
from hf_knn.fit import refit

REFIT, TEACH, FORGET = "RidgeClassifier refit", "teach one", "forget one"
TEACH_LINEAR, FORGET_LINEAR = "teach one (linear head)", "forget one (linear head)"
TEACH_KERNEL, FORGET_KERNEL = "teach one (kernel head)", "forget one (kernel head)"
ANSWER = "the next answer"
FEW = 2_000
"""Rows that the kernel head chooses its regulariser and axes on."""


def make_model(
    rows: int, dim: int, classes: int, head: str
) -> tuple[KnnForImageClassification, torch.Tensor, torch.Tensor]:
    """A model whose datastore holds overlapping classes, and pictures to teach."""
    config = ViTConfig(
        hidden_size=dim, num_hidden_layers=1, num_attention_heads=4, intermediate_size=dim,
        image_size=32, patch_size=16,
    )  # fmt: skip
    model = KnnForImageClassification.from_backbone(ViTModel(config), classes, head=head)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, dim, generator=generator)
    labels = torch.randint(classes, (rows + 1000,), generator=generator)
    features = centres[labels] + 2 * torch.randn(len(labels), dim, generator=generator)
    if head == "kernel":
        model.datastore = Datastore.from_features(features[:FEW], labels[:FEW], index="flat")
        refit(model)
    model.datastore = Datastore.from_features(features[:rows], labels[:rows], index="flat")
    if head != "kernel":
        model.config.head_regularizer = 1.0
        model.forget([0], recenter=True)  # head and datastore have one mean, as after a training
    return model.eval(), features[rows:], labels[rows:]


def main(
    rows: Annotated[int, typer.Option(help="Rows of the datastore.")] = 100_000,
    dim: Annotated[int, typer.Option(help="Width of a row.")] = 384,
    classes: Annotated[int, typer.Option(help="Classes.")] = 100,
    rounds: Annotated[int, typer.Option(min=2, help="Interleaved rounds.")] = 15,
    kernel: Annotated[
        bool, typer.Option(help="Also a kernel head, whose sums take minutes.")
    ] = True,
    output: Annotated[Path, typer.Option(help="JSON file.")] = Path("outputs/speed/teaching.json"),
) -> None:
    """Time teaching, forgetting and a refit, and compare the weights at the end."""
    ridge, features, labels = make_model(rows, dim, classes, "ridge")
    linear, _, _ = make_model(rows, dim, classes, "linear")
    place = iter(range(len(features)))

    def teach(model: KnnForImageClassification) -> None:
        row = next(place)
        model.teach(features=features[row : row + 1], labels=[int(labels[row])])

    def forget(model: KnnForImageClassification) -> None:
        assert isinstance(model.datastore, Datastore)
        model.forget(model.datastore.ids[-1:])

    def answer() -> None:
        with torch.inference_mode():
            ridge(features=features[:1])

    def refit_peer() -> RidgeClassifier:
        return _refit(ridge)

    answer()
    contestants = {
        REFIT: refit_peer, TEACH: lambda: teach(ridge), ANSWER: answer,
        FORGET: lambda: forget(ridge),
        TEACH_LINEAR: lambda: teach(linear), FORGET_LINEAR: lambda: forget(linear),
    }  # fmt: skip
    facts: dict[str, float] = {}
    if kernel:
        expanded, _, _ = make_model(rows, dim, classes, "kernel")
        started = time.perf_counter()
        expanded.fingerprint_rows()
        facts = {"rebuild_seconds": time.perf_counter() - started}
        facts["state_megabytes"] = 2 * 8 * expanded.head.classifier.in_features**2 / 2**20
        contestants |= {
            TEACH_KERNEL: lambda: teach(expanded),
            FORGET_KERNEL: lambda: forget(expanded),
        }
    timings = compare(contestants, REFIT, rounds)
    oracle = refit_peer()
    wanted = torch.from_numpy(oracle.coef_) / 2  # its targets are -1 and 1
    weight = ridge.head.classifier.weight.detach().double()
    gap = float((weight - wanted).abs().max() / wanted.abs().max())
    title = f"{rows:,} x {dim}, {classes} classes; largest relative difference of weights {gap:.1e}"
    if facts:
        title += (
            f"; sums of the kernel head: {facts['rebuild_seconds']:.0f} s from the rows, "
            f"{facts['state_megabytes']:.0f} MB with their factor"
        )
    sizes = {"rows": rows, "dim": dim, "classes": classes, "difference": gap}
    report(title, timings, REFIT, output, **sizes, **facts)


def _refit(model: KnnForImageClassification) -> RidgeClassifier:
    """What scikit-learn makes of the rows that the datastore holds."""
    store = model.datastore
    assert isinstance(store, Datastore)
    rows = store.features.double() - store.mean.double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    fitted = RidgeClassifier(alpha=1.0, solver="cholesky")
    return fitted.fit(rows.numpy(), store.labels.numpy())


if __name__ == "__main__":
    typer.run(main)
