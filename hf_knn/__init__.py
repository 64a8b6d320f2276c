"""Image classifiers that also remember: k-NN over a datastore beside a head, in one model."""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .core.config import KnnConfig
from .core.lazy import lazy_names
from .model.modeling import KnnForImageClassification

if TYPE_CHECKING:
    from .core.model import KnnImageClassifierOutput as KnnImageClassifierOutput
    from .core.search import Neighbors as Neighbors
    from .core.votes import blend_log_probs as blend_log_probs
    from .core.votes import knn_log_probs as knn_log_probs
    from .data.decode import BadImageError as BadImageError
    from .data.loading import datastore_as_dataset as datastore_as_dataset
    from .data.loading import load_splits as load_splits
    from .features.extract import PictureEncoder as PictureEncoder
    from .features.extract import extract_features as extract_features
    from .fit.blend import tune as tune
    from .fit.weights import knn_loss_weights as knn_loss_weights
    from .milvus.datastore import MilvusDatastore as MilvusDatastore
    from .model.explain import Explanation as Explanation
    from .model.pipeline import KnnImageClassificationPipeline as KnnImageClassificationPipeline
    from .store.backend import SearchBackend as SearchBackend
    from .store.datastore import Datastore as Datastore
    from .training.arguments import KnnTrainingArguments as KnnTrainingArguments
    from .training.trainer import KnnTrainer as KnnTrainer

_HOMES = {
    "BadImageError": "data.decode",
    "Datastore": "store.datastore",
    "Explanation": "model.explain",
    "KnnImageClassificationPipeline": "model.pipeline",
    "KnnImageClassifierOutput": "core.model",
    "KnnTrainer": "training.trainer",
    "KnnTrainingArguments": "training.arguments",
    "MilvusDatastore": "milvus.datastore",
    "Neighbors": "core.search",
    "PictureEncoder": "features.extract",
    "SearchBackend": "store.backend",
    "blend_log_probs": "core.votes",
    "datastore_as_dataset": "data.loading",
    "extract_features": "features.extract",
    "knn_log_probs": "core.votes",
    "knn_loss_weights": "fit.weights",
    "load_splits": "data.loading",
    "tune": "fit.blend",
}
_MOVED = {
    "FactorControl": "fit",
    "PAGE_STYLE": "checkup",
    "ProbeConfig": "fit",
    "ProbeGrid": "fit",
    "ProbeScore": "fit",
    "ProbeSettings": "fit",
    "ShardedDatastore": "store",
    "choose_probe": "fit",
    "decode_image": "data",
    "default_grid": "fit",
    "draw_neighbors": "fit",
    "few_rows": "data",
    "few_shots": "data",
    "find_pairs": "checkup",
    "fit_ridge": "fit",
    "inspect_datastore": "checkup",
    "map_svg": "checkup",
    "out_of_fold": "fit",
    "place_features": "checkup",
    "print_of": "data",
    "score_labels": "checkup",
    "score_log_probs": "fit",
    "score_probes": "fit",
    "stratified_folds": "data",
    "thumbnail": "checkup",
    "train_probes": "fit",
}
"""Names of version 0.1 that are public names of a sub-package now."""

_PUBLIC_PACKAGES = ("checkup", "data", "fit", "labelling", "store")

__all__ = ["KnnConfig", "KnnForImageClassification", *_HOMES]
__version__ = "0.2.0"

AutoConfig.register(KnnConfig.model_type, KnnConfig)
AutoModel.register(KnnConfig, KnnForImageClassification)
AutoModelForImageClassification.register(KnnConfig, KnnForImageClassification)

_get, _ = lazy_names(__name__, _HOMES)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC_PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name not in _MOVED:
        return _get(name)
    place = f"{__name__}.{_MOVED[name]}"
    warnings.warn(
        f"`hf_knn.{name}` is `{place}.{name}` now; the old name goes with version 0.3.",
        DeprecationWarning, stacklevel=2,
    )  # fmt: skip
    return getattr(import_module(place), name)


def __dir__() -> list[str]:
    return sorted(__all__)
