"""Image classifiers that also remember: k-NN over a datastore beside a head, in one model."""

from importlib import import_module
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .core.config import KnnConfig
from .model.modeling import KnnForImageClassification

_LAZY = {
    "BadImageError": "data.decode",
    "Datastore": "store.datastore",
    "Explanation": "model.explain",
    "KnnImageClassificationPipeline": "model.pipeline",
    "KnnImageClassifierOutput": "core.model",
    "KnnTrainer": "training.trainer",
    "KnnTrainingArguments": "training.arguments",
    "FactorControl": "fit.grids",
    "MilvusDatastore": "milvus.datastore",
    "Neighbors": "core.search",
    "PAGE_STYLE": "checkup.html",
    "PictureEncoder": "features.extract",
    "ProbeConfig": "fit.grids",
    "ProbeGrid": "fit.grids",
    "ProbeScore": "fit.sweep",
    "ProbeSettings": "fit.grids",
    "SearchBackend": "store.backend",
    "ShardedDatastore": "store.sharded",
    "blend_log_probs": "core.votes",
    "choose_probe": "fit.sweep",
    "datastore_as_dataset": "data.loading",
    "decode_image": "data.decode",
    "default_grid": "fit.blend",
    "draw_neighbors": "fit.plots",
    "extract_features": "features.extract",
    "few_rows": "data.splits",
    "few_shots": "data.splits",
    "find_pairs": "checkup.duplicates",
    "fit_ridge": "fit.ridge",
    "inspect_datastore": "checkup.examine",
    "knn_log_probs": "core.votes",
    "knn_loss_weights": "fit.weights",
    "load_splits": "data.loading",
    "map_svg": "checkup.svg",
    "out_of_fold": "fit.out_of_fold",
    "place_features": "checkup.svg",
    "print_of": "data.keys",
    "score_labels": "checkup.labels",
    "score_log_probs": "fit.metrics",
    "score_probes": "fit.sweep",
    "stratified_folds": "data.splits",
    "thumbnail": "checkup.html",
    "train_probes": "fit.sweep",
    "tune": "fit.blend",
}

__all__ = ["KnnConfig", "KnnForImageClassification", *_LAZY]
__version__ = "0.1.0"

AutoConfig.register(KnnConfig.model_type, KnnConfig)
AutoModel.register(KnnConfig, KnnForImageClassification)
AutoModelForImageClassification.register(KnnConfig, KnnForImageClassification)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'hf_knn' has no attribute {name!r}")
    return getattr(import_module(f"hf_knn.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
