"""The choices among which options of `hf-knn` are made; nothing heavy is imported.

The package has its own list of each and importing it takes seconds, so what `--help` shows is
written here too: `tests/commands/test_options.py` compares the two.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .places import fail, findings_csv
from .variables import set_during

LARGEST_SEED = 2**32 - 1
"""What numpy takes."""

DEFAULT_BACKBONE = "dinov2-s"
"""What `train` and `doctor` take where nobody names one."""

OnBadImage = Literal["skip", "fail"]
"""What to do at a picture that cannot be decoded."""

Precision = Literal["fp32", "bf16", "fp16"]
"""Precision of the backbone's forward pass."""

HeadKind = Literal["auto", "linear", "mlp", "ridge", "kernel", "lda"]
"""The classifier beside the datastore; `auto` compares some."""

Sweep = Literal["small", "paper", "paper_self_supervised"]
"""Grids of learning rates, weight decays and alphas."""

ClassWeights = Literal["none", "inverse", "inverse_sqrt"]
"""What a picture weighs in the loss, by the size of its class."""

Augmentation = Literal["paper", "flip", "none"]
"""What training pictures go through."""

Queries = Literal["snapshot", "live"]
"""Which features ask the datastore during fine-tuning."""

Splits = Literal["auto", "none"]
"""How folders that are called like splits are read."""

Criterion = Literal["one_standard_error", "accuracy", "mean_class", "log_likelihood", "fixed"]
"""What makes k, temperature and λ the best."""

FINDING_KINDS = (
    "broken", "not_read", "no_label", "cross_split_duplicate", "label_error", "exact_duplicate",
    "near_duplicate", "outlier",
)  # fmt: skip
"""Findings about one picture, by which it may be moved or forgotten."""

ALL_KINDS = (
    *FINDING_KINDS, "group_across_splits", "label_conflict", "look_alike_classes", "imbalance",
)  # fmt: skip
"""All findings of `hf-knn doctor`."""

Span = tuple[int, int]
_SPAN = re.compile(r"\s*(-?\d+)\s*(?:-\s*(-?\d+)\s*)?")
_IDS = "ids such as 3,17,20-40"


def _spans(texts: list[str]) -> list[Span]:
    """Ids as they are typed; of each part the first and the last."""
    return [_span(part) for text in texts for part in text.split(",")]


def _span(part: str) -> Span:
    found = _SPAN.fullmatch(part)
    if found is None:
        fail(f"Expected {_IDS}, but got {part.strip() or 'nothing between two commas'!r}.")
    first = int(found[1])
    last = first if found[2] is None else int(found[2])
    if last < first or max(-first, last) >= 2**63:
        fail(f"Expected {_IDS}, the lower end first, but got {part.strip()!r}.")
    return first, last


IdsOption = Annotated[
    list[str],
    typer.Option(
        "--ids",
        default_factory=list,
        show_default=False,
        callback=_spans,
        help="Ids of stored pictures, such as 3,17,20-40; of a span, those that are there.",
    ),
]
"""Becomes a list of spans."""


def _kinds(texts: list[str]) -> list[str]:
    kinds = [part.strip() for text in texts for part in text.split(",")]
    for kind in kinds:
        if kind not in FINDING_KINDS:
            fail(f"Expected --kind to be some of {', '.join(FINDING_KINDS)}, but got {kind!r}.")
    return kinds


def _kinds_of_all(texts: list[str]) -> list[str]:
    kinds = [part.strip() for text in texts for part in text.split(",")]
    for kind in kinds:
        if kind not in (*ALL_KINDS, "any"):
            raise typer.BadParameter(f"Expected any, or some of {', '.join(ALL_KINDS)}, but got "
                                     f"{kind!r}.")  # fmt: skip
    return [*ALL_KINDS] if "any" in kinds else kinds


FailOnOption = Annotated[
    list[str],
    typer.Option(
        "--fail-on",
        default_factory=list,
        show_default=False,
        callback=_kinds_of_all,
        metavar="KINDS",
        help="End with exit code 3 if one of these is found, to stop a script: "
        f"{', '.join(ALL_KINDS)}, or any.",
    ),
]


def kinds_option(what: str, panel: str | None = None) -> Any:
    """Declares which findings a command takes.

    Args:
        what: it does with them, and with which if none are named.
        panel: of the help that lists it.
    """
    return typer.Option(
        "--kind",
        default_factory=list,
        show_default=False,
        callback=_kinds,
        rich_help_panel=panel,
        help=f"{what}. Kinds: {', '.join(FINDING_KINDS)}.",
    )


FindingsOption = Annotated[
    Path | None,
    typer.Option(
        "--from",
        callback=findings_csv,
        help="The findings.csv of `hf-knn inspect`; delete lines or change labels in it first if "
        "you "
        "like.",
    ),
]

JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print JSON instead, and nothing else on stdout."),
]
"""Always called `json_output`: see `hand_over`."""

Backend = Literal["auto", "torch", "compile", "onnx", "openvino"]
"""What runs the backbone when features are computed."""

_GRAPHS = ("onnx", "openvino")
"""Those that need packages of their own."""


def _use(context: typer.Context, backend: Backend | None) -> Backend | None:
    """Every extraction of this command reads the variable, also those of a trainer."""
    chosen = backend or os.environ.get("HF_KNN_BACKEND")
    if chosen is not None and (backend is None or chosen in _GRAPHS):
        _check(chosen)
    if backend is not None:
        set_during(context, "HF_KNN_BACKEND", backend)
    return backend


def _check(backend: str) -> None:
    """Says what is missing before the work begins, which needs the same imports."""
    from hf_knn.features.backends import check_backend, check_installed

    try:
        check_backend(backend)
        if backend in _GRAPHS:
            check_installed(backend)
    except (ValueError, ImportError) as error:
        fail(str(error))


SplitsOption = Annotated[
    Splits,
    typer.Option(
        help="Whether folders called train, validation or test (or a csv's column split) divide "
        "the "
        "pictures: auto finds out, none reads such folders as classes.",
    ),
]
"""How splits are read."""

BackendOption = Annotated[
    Backend | None,
    typer.Option(
        callback=_use,
        help="The library that runs the backbone; auto takes the fastest that is installed and "
        "gives "
        "the same features as PyTorch. "
        "Default: $HF_KNN_BACKEND, else auto.",
        show_default=False,
    ),
]
"""Always called `backend`: it is said to the whole command by the variable, see `hand_over`."""
