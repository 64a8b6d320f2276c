# The configuration of a k-NN image classifier.
#
# Made from hf_knn/core of the package hf-knn; do not edit. Sources: sha256 4506683f2806682c84b377589900f4d86631717b522339409d2df81dc3867502.
# `hf-knn code FOLDER` says whether these files are those of the installed package.
# Licence: Apache-2.0.

import re
from collections.abc import Callable
from dataclasses import field
from enum import StrEnum
from typing import Any, ClassVar

from transformers import AutoConfig, CONFIG_MAPPING, PreTrainedConfig


# ---- votes.py: The method as pure functions on tensors, in log space.

class Choice(StrEnum):
    """Names to choose from; another one is refused with what there is."""

    @classmethod
    def _missing_(cls, value: object) -> None:
        option = re.sub(r"\B([A-Z])", r"_\1", cls.__name__).lower()
        raise ValueError(
            f"Expected `{option}` to be one of {[str(choice) for choice in cls]}, "
            f"but got {value!r}."
        )

class Metric(Choice):
    """How two feature vectors are compared."""

    COSINE = "cosine"
    L2 = "l2"

class Weighting(Choice):
    """How the vote of a neighbour depends on its distance or rank."""

    SOFTMAX = "softmax"
    UNIFORM = "uniform"
    INVERSE_DISTANCE = "inverse_distance"
    RANK = "rank"

class ClassWeighting(Choice):
    """How the loss of an example depends on how frequent its class is."""

    NONE = "none"
    INVERSE = "inverse"
    INVERSE_SQRT = "inverse_sqrt"


# ---- config.py: The configuration of a k-NN image classifier.

_CODE_KEYS = frozenset(
    {"auto_map", "_name_or_path", "attn_implementation", "_attn_implementation"}
    | {"experts_implementation", "_experts_implementation"}
)
_MODEL_KEYS = (
    "backbone", "backbone_config", "backbone_kwargs", "use_pretrained_backbone",
    "vision_config", "text_config",
)  # fmt: skip
_MOST_FEATURES = 2**16
_POSITIVE = ("> 0", lambda value: 0 < value < float("inf"))
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "knn_temperature": _POSITIVE,
    "blend_temperature": _POSITIVE,
    "head_temperature": _POSITIVE,
    "head_regularizer": (">= 0", lambda value: 0 <= value < float("inf")),
    "knn_weight": ("in [0, 1]", lambda value: 0 <= value <= 1),
}

class Pooling(Choice):
    """How a backbone's last hidden state becomes one feature vector."""

    CLS = "cls"
    MEAN = "mean"
    MAX = "max"
    POOLER = "pooler"
    CLS_MEAN = "cls_mean"

class Normalization(Choice):
    """What is done to stored and query features before they are compared."""

    L2_CENTERED = "l2_centered"
    L2 = "l2"
    NONE = "none"

class Head(Choice):
    """The classifier beside the datastore."""

    LINEAR = "linear"
    MLP = "mlp"
    RIDGE = "ridge"
    KERNEL = "kernel"
    LDA = "lda"

HEAD_FEATURES, HEAD_COMPONENTS = 4096, 128
"""How many random features a `kernel` head has, of how many principal components at most."""

class Kernel(Choice):
    """What the random features of a `kernel` head come to."""

    RBF = "rbf"
    RELU = "relu"

class KnnConfig(PreTrainedConfig):
    """Configuration of `KnnForImageClassification`.

    Args:
        backbone_config: the configuration of the vision model, as object or dict with `model_type`.
        feature_dim: width of one pooled feature of the head (D).
        knn_feature_dim: width of the datastore's, if it pools differently; None is the same.
        k: how many neighbours vote, >= 1.
        knn_temperature: divides squared distances in the votes, > 0 (0.14 here is DINO's 0.07).
        knn_weight: λ of the blend in [0, 1]; 0 is the head alone, 1 the neighbours alone.
        knn_weighting: `softmax`, `uniform`, `inverse_distance` or `rank`.
        blend_temperature: divides the blend's log-probabilities, > 0; 1 leaves them as they are,
            `KnnTrainer.tune(calibrate=True)` chooses another.
        answer_thresholds: error rate, as text, to the confidence from which on answers were wrong
            no more often on held-out pictures; `KnnTrainer.tune` fills it.
        pooling: feature of the head: `cls`, `mean`, `max`, `pooler` or `cls_mean`.
        knn_pooling: feature of the datastore; None means the same as `pooling`.
        metric: `cosine` or `l2`.
        normalization: `l2_centered`, `l2` or `none`; `cosine` with `none` is refused.
        learned_metric: whether the datastore has a learned map, which rows and queries go through.
        head: `linear`, `mlp`, `ridge`, `kernel` or `lda`.
        head_hidden_sizes: widths of the hidden layers of an `mlp`; empty means one as wide as a
            feature.
        head_kernel: `rbf` or `relu`, the random features of a `kernel` head.
        head_features: how many of them, an even number; 0 means 4,096, and for other heads none.
        head_components: of how many principal components; 0 means 128, or as many as there are.
        head_regularizer: what a head in closed form was solved with, >= 0; 0 for others, or
            unknown.
        head_temperature: > 0, what the logits of such a head were divided by, once and for all.
        head_class_weighting: `none`, `inverse` or `inverse_sqrt`: how rows of such a head weigh.
        num_head_labels: classes the head was trained on, at most `num_labels`; None means all.
        num_tuned_labels: classes that there were when the blend was tuned; for those taught since,
            the neighbours speak in full. None means all that the head has.
        has_datastore: whether a checkpoint with this configuration comes with a datastore.

    Raises:
        ValueError: for a value outside these ranges.
    """

    model_type = "hf_knn"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "head_logits", "knn_log_probs", "pooler_output",
    ]  # fmt: skip

    backbone_config: PreTrainedConfig | dict[str, Any] | None = None
    feature_dim: int = 0
    knn_feature_dim: int | None = None
    k: int = 20
    knn_temperature: float = 0.14
    knn_weight: float = 0.5
    knn_weighting: str = "softmax"
    blend_temperature: float = 1.0
    pooling: str = "cls"
    knn_pooling: str | None = None
    metric: str = "cosine"
    normalization: str = "l2_centered"
    learned_metric: bool = False
    head: str = "linear"
    head_hidden_sizes: list[int] = field(default_factory=list)
    head_kernel: str = "rbf"
    head_features: int = 0
    head_components: int = 0
    head_regularizer: float = 0.0
    head_temperature: float = 1.0
    head_class_weighting: str = "none"
    answer_thresholds: dict[str, float] = field(default_factory=dict)
    num_head_labels: int | None = None
    num_tuned_labels: int | None = None
    has_datastore: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Builds the backbone configuration and checks every value."""
        # a file may not choose an attention kernel from the Hub
        named = {key: value for key, value in kwargs.items() if not _names_hub_code(key, value)}
        self.backbone_config = _build_backbone_config(self.backbone_config)
        super().__post_init__(**named)
        if self.num_head_labels is None:
            self.num_head_labels = self.num_labels
        self.fill_head()
        self.check()

    def fill_head(self) -> None:
        """Chooses the widths in the head that are left open, once that of a feature is known."""
        if self.head == Head.MLP and not self.head_hidden_sizes and self.feature_dim > 0:
            self.head_hidden_sizes = [self.feature_dim]
        if self.head == Head.KERNEL and self.feature_dim > 0:
            self.head_features = self.head_features or HEAD_FEATURES
            self.head_components = self.head_components or min(HEAD_COMPONENTS, self.feature_dim)

    def check(self) -> None:
        """Checks every value; called again before use, since attributes can be assigned."""
        _check_choice("pooling", self.pooling, Pooling)
        if self.knn_pooling is not None:
            _check_choice("knn_pooling", self.knn_pooling, Pooling)
        _check_choice("metric", self.metric, Metric)
        _check_choice("normalization", self.normalization, Normalization)
        _check_choice("knn_weighting", self.knn_weighting, Weighting)
        _check_choice("head", self.head, Head)
        sizes = self.head_hidden_sizes
        are_widths = isinstance(sizes, list) and all(type(n) is int and n > 0 for n in sizes)
        if not are_widths or (sizes and self.head != Head.MLP):
            raise ValueError(
                "Expected `head_hidden_sizes` to be widths >= 1, and empty unless head='mlp', "
                f"but got {sizes!r} for head={self.head!r}."
            )
        _check_choice("head_kernel", self.head_kernel, Kernel)
        counts = (self.head_features, self.head_components)
        are_counts = all(type(n) is int and 0 <= n <= _MOST_FEATURES for n in counts)
        if not are_counts or counts[0] % 2 or (any(counts) and self.head != Head.KERNEL):
            raise ValueError(
                f"Expected `head_features` to be an even number and `head_components` a number, "
                f"both up to {_MOST_FEATURES}, and 0 unless head='kernel', but got {counts} for "
                f"head={self.head!r}."
            )
        check_metric(self.metric, self.normalization)
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise ValueError(f"Expected `k` to be a whole number >= 1, but got {self.k!r}.")
        _check_choice("head_class_weighting", self.head_class_weighting, ClassWeighting)
        for name, (wanted, is_right) in _NUMBERS.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"Expected `{name}` to be a number, but got {value!r}.")
            if not is_right(value):
                raise ValueError(f"Expected `{name}` to be {wanted}, but got {value}.")
        for name, width in (("feature_dim", self.feature_dim), ("knn_feature_dim", self.extra_dim)):
            if not isinstance(width, int) or width < 0:
                raise ValueError(f"Expected `{name}` to be >= 0, but got {width!r}.")
        names = {int(number): str(name) for number, name in (self.id2label or {}).items()}
        if sorted(names) != list(range(len(names))) or len(set(names.values())) != len(names):
            raise ValueError(
                "Expected `id2label` to number the classes from 0 on, each with a name of its own, "
                f"but got {str(names)[:200]}."
            )
        rates = self.answer_thresholds
        if not isinstance(rates, dict) or not all(
            isinstance(value, int | float) and 0 <= value <= 1 for value in rates.values()
        ):
            raise ValueError(
                "Expected `answer_thresholds` to map error rates to confidences in [0, 1], but got "
                f"{rates!r}."
            )
        tuned = self.num_tuned_labels
        if tuned is not None and not 1 <= int(tuned) <= self.classes:
            raise ValueError(
                f"Expected `num_tuned_labels` to be in [1, num_labels = {self.classes}], "
                f"but got {tuned}."
            )
        if not 1 <= self.head_classes <= self.classes:
            raise ValueError(
                f"Expected `num_head_labels` to be in [1, num_labels = {self.classes}], "
                f"but got {self.head_classes}."
            )

    @property
    def classes(self) -> int:
        """C: how many classes there are, `num_labels` as a number."""
        return int(self.num_labels or 0)

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, in the order of their numbers."""
        names = {int(number): str(name) for number, name in (self.id2label or {}).items()}
        return [names[number] for number in range(self.classes)]

    @property
    def head_classes(self) -> int:
        """C_head: how many of them the head was trained on."""
        return int(self.num_head_labels or 0)

    @property
    def blended_classes(self) -> int:
        """How many classes λ holds for; for the others the neighbours speak in full."""
        return min(self.head_classes, self.num_tuned_labels or self.head_classes)

    @property
    def backbone(self) -> PreTrainedConfig:
        """The backbone's configuration, which a model needs and a bare configuration may lack."""
        if not isinstance(self.backbone_config, PreTrainedConfig):
            raise ValueError(
                "Expected `backbone_config` to describe a vision model, but got None; build the "
                "model with KnnForImageClassification.from_backbone."
            )
        return self.backbone_config

    @property
    def extra_dim(self) -> int:
        """Width that the datastore's part adds to a feature: 0 when the poolings agree."""
        if self.store_pooling == self.pooling:
            return 0
        return self.feature_dim if self.knn_feature_dim is None else self.knn_feature_dim

    @property
    def store_pooling(self) -> str:
        """The pooling of the datastore's features."""
        return self.knn_pooling or self.pooling

def check_metric(metric: str, normalization: str) -> None:
    """Refuses the combination that has no meaning."""
    if Metric(metric) is Metric.COSINE and Normalization(normalization) is Normalization.NONE:
        raise ValueError(
            "Expected `normalization` to be 'l2' or 'l2_centered' with metric='cosine', but got "
            "'none'; use metric='l2' for features that must not be normalised."
        )

def _check_choice(name: str, value: str, choices: type[StrEnum]) -> None:
    allowed = [str(choice) for choice in choices]
    if value not in allowed:
        raise ValueError(f"Expected `{name}` to be one of {allowed}, but got {value!r}.")

def _build_backbone_config(
    config: PreTrainedConfig | dict[str, Any] | None,
) -> PreTrainedConfig | None:
    """A library configuration from a dict; code named by it is never loaded."""
    if config is None or isinstance(config, PreTrainedConfig):
        return config
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"Expected `backbone_config['model_type']` to be a model type of transformers, "
            f"but got {model_type!r}; upgrade transformers or choose another backbone."
        )
    foreign = [key for key in _MODEL_KEYS if config.get(key)]
    if foreign:
        raise ValueError(
            f"Expected `backbone_config` to describe one vision model, but its {foreign} brings "
            "another one along; refused."
        )
    values = {key: value for key, value in config.items() if key not in _CODE_KEYS}
    return CONFIG_MAPPING[model_type].from_dict(values)

def _names_hub_code(key: str, value: Any) -> bool:
    return key in _CODE_KEYS and key != "_name_or_path" and "/" in str(value)
