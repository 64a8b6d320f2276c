"""The losses of the linear head that are compared, and their controls."""

from typing import Any

from hf_knn.fit import FactorControl, ProbeConfig, ProbeGrid
from study.arms_of import PLAIN


def linear_arms() -> dict[str, list[ProbeConfig]]:
    """The trials of each arm beside `plain`, as many as it has.

    Factors are divided by their mean, so that they do not act as a larger learning rate, except
    in `constant`, which is that very control: each loss times the mean factor.
    """
    rates, alphas = (0.03, 0.01, 0.003), (0.03, 0.3)
    arms = {
        "reweighted": ProbeGrid(rates, alphas=alphas).configs(),
        "focal": ProbeGrid(rates, gammas=(0.5, 2.0)).configs(),
        "shuffled": ProbeGrid(rates, alphas=alphas, controls=(FactorControl.SHUFFLED,)).configs(),
        "constant": ProbeGrid(rates, alphas=alphas, controls=(FactorControl.CONSTANT,)).configs(),
    }
    assert {len(configs) for configs in arms.values()} == {len(PLAIN)}
    return arms


def loss_settings(name: str) -> dict[str, Any]:
    """How the factors of an arm are used; `plain` has none."""
    normalize = "none" if name in ("plain", "constant") else "mean"
    return {"knn_loss_clamp": 10.0, "knn_loss_normalize": normalize}
