"""Grids of heads, the paper's presets, and settings that are refused."""

import math
from typing import Any

import pytest

from hf_knn.fit.grids import (
    PAPER_ALPHAS,
    PAPER_SELF_SUPERVISED,
    PAPER_SETTINGS,
    PAPER_SUPERVISED,
    ProbeConfig,
    ProbeGrid,
    ProbeSettings,
)


def test_the_paper_s_grids() -> None:
    assert len(PAPER_SUPERVISED.configs()) == 8 * 4 * 4
    assert len(PAPER_SELF_SUPERVISED.configs()) == 9 * 4 * 4
    assert {c.alpha for c in PAPER_SUPERVISED.configs()} == set(PAPER_ALPHAS)
    assert max(c.learning_rate for c in PAPER_SELF_SUPERVISED.configs()) == 40
    settings = PAPER_SETTINGS
    assert (settings.batch_size, settings.epochs, settings.warmup_epochs) == (2048, 100, 10)
    assert (settings.optimizer, settings.momentum, settings.rate_batch) == ("sgd", 0.9, 256)


def test_a_grid_has_no_two_equal_heads() -> None:
    grid = ProbeGrid((0.1,), (0.0,), (0.0, 0.1), (0.0,), ("none", "shuffled", "constant"))
    assert grid.configs() == [
        ProbeConfig(0.1),
        ProbeConfig(0.1, alpha=0.1),
        ProbeConfig(0.1, alpha=0.1, control="shuffled"),
        ProbeConfig(0.1, alpha=0.1, control="constant"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "`epochs`.*-1"),
        ({"batch_size": 0}, "`batch_size`.*0"),
        ({"rate_batch": 0}, "`rate_batch`.*0"),
        ({"warmup_epochs": -1}, "`warmup_epochs`"),
        ({"warmup_epochs": math.nan}, "`warmup_epochs`.*nan"),
        ({"momentum": 1.0}, "`momentum`.*below 1.*1.0"),
        ({"label_smoothing": 1.0}, "`label_smoothing`.*below 1"),
        ({"hidden_layers": -1}, "`hidden_layers`.*-1"),
        ({"hidden_layers": 1, "hidden_width": 0}, "`hidden_width`.*0"),
        ({"hidden_width": 5}, "`hidden_layers` > 0 with `hidden_width`"),
        ({"optimizer": "lion"}, "lion"),
        ({"class_weighting": "some"}, "some"),
        ({"knn_loss_normalize": "sum"}, "sum"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbeSettings(**options)
