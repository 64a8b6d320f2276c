"""The choices among which options of `hf-knn` are made; nothing heavy is imported."""

from enum import StrEnum

DEFAULT_BACKBONE = "facebook/dinov2-small"


class OnBadImage(StrEnum):
    """What to do at a picture that cannot be decoded."""

    SKIP = "skip"
    FAIL = "fail"


class Precision(StrEnum):
    """Precision of the backbone's forward pass."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class HeadKind(StrEnum):
    """The classifier beside the datastore."""

    LINEAR = "linear"
    MLP = "mlp"
    RIDGE = "ridge"


class Sweep(StrEnum):
    """Grids of learning rates, weight decays and alphas."""

    SMALL = "small"
    PAPER = "paper"
    PAPER_SELF_SUPERVISED = "paper_self_supervised"


class ClassWeights(StrEnum):
    """What a picture weighs in the loss, by the size of its class."""

    NONE = "none"
    INVERSE = "inverse"
    INVERSE_SQRT = "inverse_sqrt"


class Augmentation(StrEnum):
    """What training pictures go through."""

    PAPER = "paper"
    FLIP = "flip"
    NONE = "none"


class Queries(StrEnum):
    """Which features ask the datastore during fine-tuning."""

    SNAPSHOT = "snapshot"
    LIVE = "live"


class Criterion(StrEnum):
    """What makes k, temperature and λ the best."""

    ONE_STANDARD_ERROR = "one_standard_error"
    ACCURACY = "accuracy"
    MEAN_CLASS = "mean_class"
    LOG_LIKELIHOOD = "log_likelihood"


def text_of(choice: StrEnum | None) -> str | None:
    """A choice as the package takes it.

    Args:
        choice: made, or None.
    """
    return None if choice is None else str(choice)
