"""The choices among which options of `hf-knn` are made; nothing heavy is imported."""

import os
from enum import StrEnum
from typing import Annotated

import typer

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


class Backend(StrEnum):
    """What runs the backbone when features are computed."""

    AUTO = "auto"
    TORCH = "torch"
    COMPILE = "compile"
    ONNX = "onnx"
    OPENVINO = "openvino"


def _use(context: typer.Context, backend: Backend | None) -> Backend | None:
    """Every extraction of this command reads the variable, also those of a trainer."""
    if backend is not None:
        before = os.environ.get("HF_KNN_BACKEND")
        os.environ["HF_KNN_BACKEND"] = str(backend)
        context.call_on_close(lambda: _restore(before))
    return backend


def _restore(before: str | None) -> None:
    if before is None:
        del os.environ["HF_KNN_BACKEND"]
    else:
        os.environ["HF_KNN_BACKEND"] = before


BackendOption = Annotated[
    Backend | None,
    typer.Option(
        callback=_use,
        help="What computes features; auto takes the fastest installed that agrees with PyTorch. "
        "Default: $HF_KNN_BACKEND, else auto.",
        show_default=False,
    ),
]
