"""The schedule against that of transformers; the steps are compared in test_probe.py."""

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from hf_knn.fit.sweep import learning_rate_factor


def test_the_schedule_is_that_of_transformers() -> None:
    for steps, warmup in ((10, 0), (10, 3), (10, 10), (1, 0), (5, 9)):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
        for step in range(steps):
            wanted = schedule.get_last_lr()[0]
            assert learning_rate_factor(step, steps, warmup) == pytest.approx(wanted, abs=1e-12)
            optimizer.step()
            schedule.step()
