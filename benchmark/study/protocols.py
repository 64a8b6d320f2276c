"""The protocols: what is measured on one split. Each is a function from a study to its arms."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from study.arms import Arm, pair_accuracies
from study.arms_of import Voices
from study.heads import measure_heads
from study.losses import linear_arms, loss_settings
from study.lowdata import measure_few_losses, measure_lowdata
from study.peers import PEERS, measure_peers
from study.phases import PEERS as FIT_PEERS
from study.study import Study


@dataclass
class Measured:
    """What a protocol found on one split.

    Attributes:
        voices: with the split and its test pictures.
        arms: by name.
        heat: accuracy of the neighbours alone on validation, by k and temperature.
        extra: rates of how voices agree.
        pairs: test top-1 of every two voices as one.
    """

    voices: Voices
    arms: dict[str, Arm]
    heat: dict[str, Any] | None = None
    extra: dict[str, float] | None = None
    pairs: dict[str, float] | None = None


def measure_knn(study: Study, seed: int, option: Any) -> Measured:
    """Head, neighbours, their blend, the fixed cell, and the vote of DINO."""
    voices = study.voices(seed)
    arms = _base(voices) | {"fixed": voices.fixed, "dino": voices.dino}
    return Measured(voices, arms, heat_of(voices))


def measure_linear(study: Study, seed: int, option: Any) -> Measured:
    """The losses of method.md 4 and their controls, six trials each."""
    voices = study.voices(seed)
    arms = {"plain": voices.head, "knn": voices.knn, "blend": voices.blend}
    for name, configs in linear_arms().items():
        arms[name] = voices.probe(configs, voices.own_votes, **loss_settings(name))
    return Measured(voices, arms, heat_of(voices))


def measure_complementarity(study: Study, seed: int, option: Any) -> Measured:
    """Who is right where: the head, the neighbours, both or neither."""
    voices = study.voices(seed)
    labels = voices.split.test.labels
    head, knn = (arm.test.argmax(1) == labels for arm in (voices.head, voices.knn))
    rates = {
        "both_right": head & knn,
        "only_head": head & ~knn,
        "only_knn": ~head & knn,
        "neither": ~head & ~knn,
        "oracle": head | knn,
    }
    extra = {name: float(hits.double().mean()) for name, hits in rates.items()}
    return Measured(voices, _base(voices), heat_of(voices), extra)


def measure_robustness(study: Study, seed: int, option: Any) -> Measured:
    """Everything as in `knn`, the test pictures damaged; chosen on clean pictures."""
    clean = study.voices(seed)
    damaged = clean.split._replace(test=study.shifted_test(seed, str(option)))
    voices = study.voices_of(damaged, seed)
    arms = _base(voices) | {"fixed": voices.fixed, "dino": voices.dino}
    return Measured(voices, arms)


def measure_finetune(study: Study, seed: int, option: Any) -> Measured:
    """The whole backbone trained; then the neighbours of its new features beside its own head."""
    voices = study.finetuned(seed)
    return Measured(voices, _base(voices) | {"fixed": voices.fixed}, heat_of(voices))


def _measure_lowdata(study: Study, seed: int, option: Any) -> Measured:
    return Measured(*measure_lowdata(study, seed, int(option)))


def _measure_heads(study: Study, seed: int, option: Any) -> Measured:
    """The heads of `--head auto`; with few pictures per class if there is an option."""
    voices = study.voices(seed) if option is None else study.few_voices(seed, int(option))
    return Measured(voices, measure_heads(voices))


def _measure_few_losses(study: Study, seed: int, option: Any) -> Measured:
    return Measured(*measure_few_losses(study, seed, int(option)))


def _measure_peers(study: Study, seed: int, option: Any) -> Measured:
    voices = study.voices(seed)
    with study.phases.phase(FIT_PEERS):
        arms = measure_peers(voices)
        _, validation, test = voices.split
        chosen = {name: arms[name] for name in (*PEERS, "knn")}
        pairs = pair_accuracies(chosen, validation.labels, test.labels)
    return Measured(voices, arms, heat_of(voices), pairs=pairs)


PROTOCOLS: dict[str, Callable[[Study, int, Any], Measured]] = {
    "knn": measure_knn,
    "linear": measure_linear,
    "complementarity": measure_complementarity,
    "peers": _measure_peers,
    "heads": _measure_heads,
    "lowdata": _measure_lowdata,
    "lowdata_heads": _measure_heads,
    "lowdata_losses": _measure_few_losses,
    "robustness": measure_robustness,
    "finetune": measure_finetune,
}

FEW_PICTURES = ("lowdata", "lowdata_heads", "lowdata_losses")
"""Protocols with a cell for each number of pictures per class."""

COLLECTIVE = ("robustness", "finetune")
"""Protocols that all ranks work on together, since pictures go through the backbone."""

NEED_PICTURES = ("robustness", "finetune")
"""Protocols that cannot do with features of a stream."""


def heat_of(voices: Voices) -> dict[str, Any] | None:
    """Top-1 of the neighbours alone on validation, k by temperature."""
    if not voices.has_validation or voices.tuned is None:
        return None
    cells = [cell for cell in voices.tuned.table if cell.knn_weight == 1]
    ks = sorted({cell.k for cell in cells})
    temperatures = sorted({cell.temperature for cell in cells})
    top1 = torch.zeros(len(ks), len(temperatures))
    for cell in cells:
        top1[ks.index(cell.k), temperatures.index(cell.temperature)] = cell.accuracy
    return {"k": ks, "temperature": temperatures, "top1": top1.tolist()}


def _base(voices: Voices) -> dict[str, Arm]:
    return {"head": voices.head, "knn": voices.knn, "blend": voices.blend}
