"""Few labelled pictures per class, those to choose on among them."""

from study.arms import Arm
from study.arms_of import PLAIN, Voices
from study.heads import closed_head
from study.losses import linear_arms, loss_settings
from study.study import Study


def measure_lowdata(study: Study, seed: int, shots: int) -> tuple[Voices, dict[str, Arm]]:
    """Head, ridge, neighbours, blend and fixed cell with so many pictures per class."""
    voices = study.few_voices(seed, shots)
    arms = {"head": voices.head, "knn": voices.knn, "blend": voices.blend}
    return voices, arms | {"ridge": closed_head(voices, "ridge"), "fixed": voices.fixed}


def measure_few_losses(study: Study, seed: int, shots: int) -> tuple[Voices, dict[str, Arm]]:
    """The losses of `linear`, all chosen on the same folds."""
    voices = study.few_voices(seed, shots)
    arms = {"plain": voices.chosen_probe(PLAIN)}
    for name, configs in linear_arms().items():
        arms[name] = voices.chosen_probe(configs, voices.own_votes, **loss_settings(name))
    return voices, arms
