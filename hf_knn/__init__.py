"""Image classifiers that also remember: k-NN over a datastore beside a head, in one model."""

from importlib import import_module
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_knn import KnnConfig
from .modeling_knn import KnnForImageClassification

_LAZY = {
    "BadImageError": "images",
    "Datastore": "datastore",
    "Explanation": "explaining",
    "KnnImageClassificationPipeline": "pipeline_knn",
    "KnnImageClassifierOutput": "modeling_knn",
    "KnnTrainer": "trainer",
    "KnnTrainingArguments": "training_args",
    "FactorControl": "probe_settings",
    "MilvusDatastore": "milvus_store",
    "Neighbors": "search_backend",
    "PAGE_STYLE": "page_style",
    "PictureEncoder": "serving",
    "ProbeConfig": "probe_settings",
    "ProbeGrid": "probe_settings",
    "ProbeScore": "probe",
    "ProbeSettings": "probe_settings",
    "SearchBackend": "search_backend",
    "ShardedDatastore": "distributed_search",
    "blend_log_probs": "functional",
    "choose_probe": "probe",
    "datastore_as_dataset": "data",
    "decode_image": "images",
    "default_grid": "tuning",
    "draw_neighbors": "plots",
    "extract_features": "features",
    "few_rows": "folds",
    "few_shots": "folds",
    "find_pairs": "duplicates",
    "fit_ridge": "ridge",
    "inspect_datastore": "inspection",
    "knn_log_probs": "functional",
    "knn_loss_weights": "functional",
    "load_splits": "data",
    "map_svg": "drawings",
    "out_of_fold": "voices",
    "place_features": "feature_map",
    "print_of": "prints",
    "score_labels": "label_errors",
    "score_log_probs": "metrics",
    "score_probes": "probe",
    "stratified_folds": "folds",
    "thumbnail": "pages",
    "train_probes": "probe",
    "tune": "tuning",
}

__all__ = ["KnnConfig", "KnnForImageClassification", *_LAZY]
__version__ = "0.1.0"

AutoConfig.register(KnnConfig.model_type, KnnConfig)
AutoModel.register(KnnConfig, KnnForImageClassification)
AutoModelForImageClassification.register(KnnConfig, KnnForImageClassification)
KnnConfig.register_for_auto_class()
KnnForImageClassification.register_for_auto_class("AutoModelForImageClassification")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'hf_knn' has no attribute {name!r}")
    return getattr(import_module(f"hf_knn.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
