"""What twice the pictures bring: what `hf-knn doctor` says, beside what they really brought.

    python benchmark/claims/learning_curve.py [--seeds 5] [--output DIR]

A fifth of a task's pictures is held out. Of the others a share is looked at as `doctor` would look
at it, which foretells what twice as many would bring. Then the same two voices are fitted on the
share and on twice the share, and asked about the pictures held out: the difference of the accuracy
of their blend is what the second half really brought. The features are those of a
frozen EfficientNet-Lite0. All figures are points of accuracy.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))  # benchmark/, where the catalog lies

from catalog.offline_backbones import build_backbone
from catalog.offline_tasks import load_pictures
from claims.label_noise import TASKS as ALL_TASKS
from hf_knn import Datastore, KnnForImageClassification, extract_features
from hf_knn.checkup import inspect_datastore
from hf_knn.data import few_rows, stratified_folds
from hf_knn.fit import out_of_fold
from study.provenance import write_findings
from study.results import mean_and_std

TASKS = ("digits", "openmoji-categories")
SHARES = (0.125, 0.25, 0.5)
"""Of the pictures that are not held out; as many again are added."""


def measure(
    features: Tensor, labels: Tensor, names: list[str], share: float, seed: int
) -> dict[str, float]:
    """What is said of a share of the rows and what twice the share brings, in points.

    Args:
        features: [N, D] raw features.
        labels: [N] int64.
        names: [C] of the classes.
        share: in (0, 0.5].
        seed: of the split and of the shares, which are nested.
    """
    fold = stratified_folds(labels, 5, seed)[0]
    pool = labels[fold.fitted]
    few = fold.fitted[few_rows(pool, share, seed)]
    many = fold.fitted[few_rows(pool, 2 * share, seed)]
    store = Datastore.from_features(features[few], labels[few])
    curve = inspect_datastore(store, names, seed=seed).curve
    right = []
    for fitted in (few, many):
        part = fold._replace(fitted=fitted)
        blend = out_of_fold(features, labels, len(names), [part]).blend[fold.held_out]
        right.append(blend.argmax(1) == labels[fold.held_out])
    gains = right[1].double() - right[0].double()
    says_so = curve is not None and not curve.reason
    foretold = 100 * curve.gain if curve is not None and says_so else float("nan")
    return {
        "pictures": float(len(few)),
        "accuracy, %": 100 * float(right[0].double().mean()),
        "foretold": foretold,
        "brought": 100 * float(gains.mean()),
        "error of what was brought": 100 * float(gains.std() / len(gains) ** 0.5),
        "off by": abs(foretold - 100 * float(gains.mean())),
        "said nothing": float(not says_so),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="splits")
    parser.add_argument("--task", action="append", choices=ALL_TASKS, help="repeatable")
    parser.add_argument("--output", "-o", type=Path, default=Path("outputs/doctor"))
    options = parser.parse_args()
    folder = build_backbone("efficientnet-lite0")
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for task in options.task or TASKS:
        dataset = load_pictures(task)
        names = dataset.features["label"].names
        model = KnnForImageClassification.from_backbone(folder, names)
        rows = extract_features(model, dataset)
        found[task] = {}
        for share in SHARES:
            runs = [
                measure(rows.features, rows.labels, names, share, seed)
                for seed in range(options.seeds)
            ]
            found[task][str(share)] = runs
            print(f"{task}, {share:g} of {len(rows)} pictures, {options.seeds} splits")
            for name in runs[0]:
                values = [run[name] for run in runs if not np.isnan(run[name])]
                mean, std = mean_and_std(values or [float("nan")])
                print(f"   {name}: {mean:.2f} ± {std:.2f}", flush=True)
    path = options.output / "learning_curve.json"
    write_findings(path, tasks=found)
    print(f"Written: {path}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
