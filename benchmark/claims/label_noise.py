"""Planted label errors: how well they are ranked, beside cleanlab where that is installed.

    python benchmark/claims/label_noise.py [--share 0.05] [--seeds 5] [--output DIR]

A share of the labels is replaced by another class, drawn evenly. The features are those of a frozen
EfficientNet-Lite0; the voices are asked out of fold. `AUROC` is that of a score against what was
planted: 1 ranks every planted error above every other label, 0.5 is chance. Labels that were wrong
from the start, or matters of taste, count against every method alike.

`pip install cleanlab` (Apache-2.0) for the peers: its scores on the same out-of-fold probabilities
of the blend, and Datalab on the same graph of neighbours and the same probabilities.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))  # benchmark/, where the catalog lies

from catalog.offline_backbones import build_backbone
from catalog.offline_tasks import load_pictures
from hf_knn import Datastore, KnnForImageClassification, extract_features
from hf_knn.checkup import score_labels
from hf_knn.data import stratified_folds
from hf_knn.fit import out_of_fold
from study.provenance import write_findings
from study.results import mean_and_std

TASKS = ("digits", "openmoji-categories", "openmoji")
FIRST_SEED = 0  # the score was chosen on seeds 200 to 202
NEIGHBORS = 10

Floats = NDArray[np.float64]


def plant(labels: Tensor, classes: int, share: float, seed: int) -> tuple[Tensor, Floats]:
    """Labels of which a share is another class, and [N] 1 where that is so."""
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(labels), round(share * len(labels)), replace=False)
    noisy, is_planted = labels.clone(), np.zeros(len(labels))
    shifts = torch.from_numpy(generator.integers(1, classes, len(chosen)))
    noisy[chosen] = (labels[chosen] + shifts) % classes
    is_planted[chosen] = 1
    return noisy, is_planted


def peers(features: Tensor, noisy: Tensor, blend: Tensor, asked: Tensor) -> dict[str, Any]:
    """Scores [M] (higher is worse) and named rows of cleanlab; nothing where it is missing."""
    try:
        from cleanlab import Datalab
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        return {}
    rows = asked.nonzero().flatten()
    labels, probabilities = noisy[rows].numpy(), blend[rows].exp().double().numpy()
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    scores: dict[str, Any] = {
        f"cleanlab, {method}": 1 - get_label_quality_scores(labels, probabilities, method=method)
        for method in ("self_confidence", "normalized_margin")
    }
    lab = Datalab({"label": labels.tolist()}, label_name="label", verbosity=0)
    graph = knn_graph(features[rows])
    lab.find_issues(pred_probs=probabilities, knn_graph=graph, issue_types={"label": {}})
    scores["cleanlab, Datalab"] = 1 - lab.get_issues("label")["label_score"].to_numpy()
    scores["named by cleanlab"] = find_label_issues(labels, probabilities)
    return scores


def knn_graph(features: Tensor) -> Any:
    """The leave-one-out neighbours of a datastore as the sparse matrix that Datalab takes."""
    from scipy.sparse import csr_matrix

    store = Datastore.from_features(features, torch.zeros(len(features), dtype=torch.int64))
    parts = list(store.leave_one_out(NEIGHBORS))
    near = torch.cat([part.ids for part in parts]).numpy()
    distances = 1 - torch.cat([part.similarities for part in parts]).double().numpy()
    ends = np.arange(0, near.size + 1, NEIGHBORS)
    return csr_matrix((distances.ravel().clip(0), near.ravel(), ends), (len(near), len(near)))


def measure(
    features: Tensor, labels: Tensor, classes: int, share: float, seed: int
) -> dict[str, float]:
    """AUROC of every score, and precision and recall of what is named."""
    noisy, is_planted = plant(labels, classes, share, seed)
    started = time.perf_counter()
    voices = out_of_fold(features, noisy, classes, stratified_folds(noisy, 5, seed))
    ours = score_labels(voices, noisy)
    found: dict[str, float] = {"seconds": time.perf_counter() - started}
    asked = voices.asked.numpy()
    truth = is_planted[asked]

    def auroc(score: Floats) -> float:
        return float(roc_auc_score(truth, score))

    found["AUROC, ours"] = auroc(ours.score[asked])
    found |= _named(ours.is_named[asked], truth, "ours")
    for name, values in peers(features, noisy, voices.blend, voices.asked).items():
        if name.startswith("named"):
            found |= _named(values, truth, "cleanlab")
        else:
            found[f"AUROC, {name}"] = auroc(values)
    return found


def _named(named: NDArray[np.bool_], truth: Floats, who: str) -> dict[str, float]:
    return {
        f"named, {who}": float(named.sum()),
        f"precision, {who}": float(truth[named].mean()) if named.any() else float("nan"),
        f"recall, {who}": float(named[truth == 1].mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=0.05, help="of the labels, made wrong")
    parser.add_argument("--seeds", type=int, default=5, help="sets of planted errors")
    parser.add_argument("--task", action="append", choices=TASKS, help="repeatable")
    parser.add_argument("--output", "-o", type=Path, default=Path("outputs/doctor"))
    options = parser.parse_args()
    folder = build_backbone("efficientnet-lite0")
    found: dict[str, list[dict[str, float]]] = {}
    for task in options.task or TASKS:
        dataset = load_pictures(task)
        names = dataset.features["label"].names
        model = KnnForImageClassification.from_backbone(folder, names)
        rows = extract_features(model, dataset)
        seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
        runs = [
            measure(rows.features, rows.labels, len(names), options.share, seed) for seed in seeds
        ]
        found[task] = runs
        print(f"{task}: {len(rows)} pictures, {options.seeds} seeds")
        for name in runs[0]:
            mean, std = mean_and_std([run[name] for run in runs])
            print(f"   {name}: {mean:.4f} ± {std:.4f}")
    path = options.output / "label_noise.json"
    write_findings(path, share=options.share, tasks=found)
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
