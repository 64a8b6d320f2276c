"""Head, neighbours and blend of a model, asked about rows that they have not seen."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..core.backbone import split_features
from ..core.config import KnnConfig
from ..core.search import Neighbors
from ..core.votes import blend_log_probs, floor_log_probs, soften
from ..features.extract import ImageFeatures
from ..model.backbones import evaluating
from ..model.modeling import KnnForImageClassification
from ..model.stored import find_copies
from ..store.backend import even_parts
from .blend import Criterion, TuneResult, head_alone, untuned
from .choice import FEWEST_LABELS, HeadChoice
from .held_out import (
    Blended,
    BlendOf,
    HeldOut,
    choose_cell,
    is_chosen_on_all,
    judged_by_halves,
    widest,
)
from .metrics import ERROR_RATES, complementarity, measure, reliability, thresholds
from .temperature import fit_temperature

_ROWS = 1024
_SAME = 2
"""Of the nearest rows, so many are looked at: a stored copy is among them."""

NEAREST = 5
"""Of the nearest rows, so many are kept, to be shown."""

WITHOUT_STORED = "without_stored_"
"""What the names of numbers begin with that leave stored pictures out."""

_VOICES = ("head", "knn", "blend")
STORED_NOTE = "{} of {} pictures are stored in the model and were left out."
ALL_STORED_NOTE = "All of them are stored in the model: this is no measure of what it can do."
OWN_NOTE = "k, temperature and λ were chosen on the same pictures."


def ask_head(model: KnnForImageClassification, features: Tensor, device: torch.device) -> Tensor:
    """[B, C_head] log-probabilities of the head of a model, on the CPU.

    Args:
        model: that is asked.
        features: [B, D] the part of features that the head sees.
        device: of the head.
    """
    with evaluating(model):
        logits = model.head(features.to(device)).float()
    return functional.log_softmax(logits, dim=-1).cpu()


def ask_voices(
    model: KnnForImageClassification, features: ImageFeatures, device: torch.device
) -> HeldOut:
    """Asks the datastore and the head of a model about rows, for as many neighbours as are tried.

    Args:
        model: with a datastore.
        features: the rows, which it has not seen.
        device: of the head.
    """
    head_part, store_part = split_features(features.features, model.config)
    store = model.datastore
    assert store is not None
    head_log_probs = ask_head(model, head_part, device)
    k = widest(len(store), len(features), model.config.classes)
    found = store.search(store_part, k)
    return HeldOut(found, head_log_probs, features.labels, features.groups)


def choose_blend(
    model: KnnForImageClassification,
    held_out: HeldOut | None,
    criterion: str | None,
    calibrate: bool,
    progress: bool = False,
    choice: HeadChoice | None = None,
) -> TuneResult:
    """Chooses k, temperature and λ, and sets them in the configuration of a model.

    Where something is chosen, that is on one half of the rows, or with few labels on all. From
    which confidence on answers are right (`answer_thresholds`) can be told only of answers that
    their rows did not choose: each half is judged by what the other half chooses. What is fixed
    leaves all rows for that. With fewer than 3 labels a class the head answers alone.

    Args:
        model: what was asked.
        held_out: its answers; None where no row can be held out, which leaves a fixed cell.
        criterion: see `choose_cell`.
        calibrate: also scale the temperatures of head and blend.
        progress: show a progress bar.
        choice: of the head, on the first half of the same rows, if there was one: its cell is
            taken, unless another criterion is asked for or other temperatures; then the second half
            alone has chosen nothing, and is judged.
    """
    config = model.config
    known = choice.result if choice is not None and choice.criterion == criterion else None
    if known is None and criterion is None and _are_too_few(model, held_out):
        known = head_alone()
    if held_out is None:
        result = known or untuned()
        _set_cell(config, result)
        config.answer_thresholds = {}
        return result
    is_compared = choice is not None and bool(choice.table)
    is_fixed = criterion == Criterion.FIXED or (known is not None and not known.table)
    count, stored = len(held_out.labels), 0 if model.datastore is None else len(model.datastore)
    blend = BlendOf(config.classes, config.metric, config.knn_weighting)

    def choose(heads: Mapping[str, HeldOut]) -> tuple[str, TuneResult]:
        (said,) = heads.values()
        cell = choose_cell(
            said, count, stored, config.classes, criterion,
            metric=config.metric, weighting=config.knn_weighting, progress=progress,
        )  # fmt: skip
        return config.head, cell

    is_few = not calibrate and is_chosen_on_all(count, config.classes, criterion)
    rows = fresh = held_out
    if calibrate or (not is_few and (is_compared or not is_fixed)):
        rows, fresh = held_out.halves()
    if calibrate:
        temperature = _calibrate_head(model, rows)
        rows, fresh = rows.softened(temperature), fresh.softened(temperature)
    if known is not None and not known.table:  # nothing was chosen, and nothing is
        result, is_few = replace(known, rows=count), False
    elif known is not None and not calibrate:
        result = known
    else:
        _, result = choose({config.head: rows})
    _set_cell(config, result)
    if calibrate:
        config.blend_temperature = fit_temperature(
            floor_log_probs(blend.at(result, rows)), rows.labels
        )
    told = None if calibrate or known is None or choice is None else choice.judged
    if told is None and (is_few or not (calibrate or is_compared or is_fixed)):
        first = None if is_few else (config.head, result)
        told = judged_by_halves({config.head: held_out}, choose, blend, first)
    elif told is None:
        told = Blended(blend.at(result, fresh), fresh.labels)
    sure = soften(told.log_probs, config.blend_temperature)
    config.answer_thresholds = thresholds(sure, told.labels, ERROR_RATES)
    return result


def _are_too_few(model: KnnForImageClassification, held_out: HeldOut | None) -> bool:
    """Whether neither what is stored nor what is held out has 3 labels a class, on average."""
    fewest, store = FEWEST_LABELS * model.config.classes, model.datastore
    asked = 0 if held_out is None else len(held_out.labels)
    return store is not None and max(len(store), asked) < fewest


def _set_cell(config: KnnConfig, result: TuneResult) -> None:
    config.k, config.knn_temperature = result.k, result.temperature
    config.knn_weight, config.blend_temperature = result.knn_weight, 1.0
    config.num_tuned_labels = None


class Heard(NamedTuple):
    """What head, neighbours and blend of a model said of some rows.

    Attributes:
        voices: [N, C] log-probabilities of `head`, `blend`, and `knn` where there are neighbours;
            -inf for a class that a voice gives nothing.
        nearest: [N, k'] the nearest rows of each, at most `NEAREST`; None without neighbours.
        stored: [M] places of the rows that are in the datastore, which are judged by their copies.
    """

    voices: dict[str, Tensor]
    nearest: Neighbors | None
    stored: Tensor

    @property
    def measurable(self) -> Tensor:
        """[N - M] places of the others; all places, if there are no others."""
        count = len(self.voices["blend"])
        return torch.arange(count) if len(self.stored) == count else rows_but(count, self.stored)


class Measured(NamedTuple):
    """What head, neighbours and blend of a model said of some rows, in numbers.

    Attributes:
        numbers: by name.
        reliability: of the blend, see `metrics.reliability`.
        logits: [N, C] of the blend, on the CPU.
    """

    numbers: dict[str, float]
    reliability: list[list[float]]
    logits: Tensor


def hear_voices(
    model: KnnForImageClassification, features: ImageFeatures, device: torch.device
) -> Heard:
    """Asks head, neighbours and blend about rows.

    Args:
        model: what is asked.
        features: the rows.
        device: of the head.
    """
    voices: dict[str, list[Tensor]] = {voice: [] for voice in _VOICES}
    classes, nearest = model.config.classes, []
    with evaluating(model):
        for rows in even_parts(len(features), -(-len(features) // _ROWS)):
            output = model(features=features.features[rows].to(device), return_neighbors=True)
            if output.neighbors is not None:
                nearest.append([part[:, :NEAREST].cpu() for part in output.neighbors])
            head = functional.log_softmax(output.head_logits.float(), dim=-1)
            missing = (0, classes - head.shape[1])
            voices["head"].append(functional.pad(head, missing, value=-torch.inf))
            voices["blend"].append(voices["head"][-1])
            if output.knn_log_probs is not None:
                voices["knn"].append(output.knn_log_probs)
                voices["blend"][-1] = _blend(model.config, head, output.knn_log_probs)
    joint = {voice: torch.cat(parts) for voice, parts in voices.items() if parts}
    near = Neighbors(*map(torch.cat, zip(*nearest, strict=True))) if nearest else None
    ids = None if near is None else near.ids[:, :_SAME]
    return Heard(joint, near, stored_places(model, features, ids))


def measure_voices(
    model: KnnForImageClassification, features: ImageFeatures, device: torch.device
) -> Measured:
    """Measures head, neighbours and blend.

    Args:
        model: what is asked.
        features: the rows.
        device: of the head.

    Returns:
        The numbers by name, the reliability of the blend, and its `logits`. The number `stored`
        is how many of the rows are in the datastore, so that they are judged by their own copies;
        if some are, there are all numbers `without_stored_…` too, and the reliability is that of
        the others.
    """
    return measure_heard(hear_voices(model, features, device), features.labels)


def measure_heard(heard: Heard, labels: Tensor) -> Measured:
    """The numbers of what was said; see `measure_voices`.

    Args:
        heard: of N rows.
        labels: [N] int64.
    """
    joint, rest = heard.voices, heard.measurable
    results, logits = _numbers(joint, labels), floor_log_probs(joint["blend"]).cpu()
    results["stored"] = len(heard.stored)
    if len(rest) < len(labels):
        joint, labels = {voice: said[rest] for voice, said in joint.items()}, labels[rest]
        others = _numbers(joint, labels)
        results |= {f"{WITHOUT_STORED}{name}": value for name, value in others.items()}
    return Measured(results, reliability(joint["blend"], labels), logits)


def _numbers(joint: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
    results: dict[str, float] = {}
    for voice, log_probs in joint.items():
        scores = measure(log_probs, labels)
        results |= {f"{voice}_{name}": value for name, value in scores.items()}
    if "knn" in joint:
        results |= complementarity(joint["head"], joint["knn"], joint["blend"], labels)
    return results | {"loss": results["head_nll"], "accuracy": results["blend_top1"]}


def stored_places(
    model: KnnForImageClassification, features: ImageFeatures, nearest: Tensor | None = None
) -> Tensor:
    """Which pictures a model has in its datastore: the same pixels, or the same features.

    Args:
        model: with a datastore or without.
        features: N pictures.
        nearest: [N, n] ids of the nearest rows of each, if they were searched for already.

    Returns:
        [M] int64, their places, ascending.
    """
    if model.datastore is None:
        return torch.empty(0, dtype=torch.int64)
    _, rows = split_features(features.features, model.config)
    known = model.memory.contents
    copies = find_copies(model.datastore, known, rows, features.contents, nearest)
    return torch.tensor([place for place, ids in enumerate(copies) if ids], dtype=torch.int64)


def rows_but(count: int, places: Tensor) -> Tensor:
    """[N - M] int64: the places that are not named.

    Args:
        count: N.
        places: [M] int64 below N.
    """
    kept = torch.ones(count, dtype=torch.bool)
    kept[places] = False
    return kept.nonzero().flatten()


def _blend(config: KnnConfig, head: Tensor, votes: Tensor) -> Tensor:
    """[B, C] `logits` of a model without the floor: -inf for a class that neither voice knows."""
    blend = blend_log_probs(head, votes, config.knn_weight, config.blended_classes)
    softened = soften(blend, config.blend_temperature)
    return softened.masked_fill(blend == -torch.inf, -torch.inf)


def describe_measurement(
    metrics: dict[str, float],
    prefix: str,
    rows: int,
    dataset: Any,
    is_tuned_on: bool,
) -> dict[str, Any]:
    """What a model card says of a measurement, without the reliability.

    Args:
        metrics: numbers whose names have the prefix.
        prefix: as given to `evaluate`.
        rows: how many were asked about.
        dataset: the pictures, as given to `evaluate`.
        is_tuned_on: whether k, temperature and λ were chosen on them.
    """
    numbers = {k.removeprefix(f"{prefix}_"): v for k, v in metrics.items()}
    stored, notes = int(numbers.pop("stored", 0)), [OWN_NOTE] if is_tuned_on else []
    others = {
        k.removeprefix(WITHOUT_STORED): v
        for k, v in numbers.items()
        if k.startswith(WITHOUT_STORED)
    }
    if stored:
        notes.append(STORED_NOTE.format(stored, rows) if others else ALL_STORED_NOTE)
    voices = {
        f"eval_{k}": v
        for k, v in (others or numbers).items()
        if "_per_second" not in k and "runtime" not in k
    }
    info = getattr(dataset, "info", None)
    return {
        "metrics": voices,
        "rows": rows - stored if others else rows,
        "dataset": getattr(info, "dataset_name", None) or "",
        "split": str(getattr(dataset, "split", None) or ""),
        "note": " ".join(notes),
    }


def _calibrate_head(model: KnnForImageClassification, rows: HeldOut) -> float:
    """Scales the head's temperature; returns the factor."""
    known = rows.labels < rows.head_log_probs.shape[1]
    if not known.any():
        return 1.0
    temperature = fit_temperature(floor_log_probs(rows.head_log_probs[known]), rows.labels[known])
    model.head.soften(temperature)
    model.config.head_temperature *= temperature
    return temperature
