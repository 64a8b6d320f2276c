"""A small backbone trained from scratch on pixels in memory: hundreds of trainings in minutes."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from study.pool import Rows

BATCH, LEAST_STEPS, LEARNING_RATE, WEIGHT_DECAY = 64, 60, 2e-3, 0.05


@contextmanager
def _one_thread() -> Iterator[None]:
    """So small a model waits for its threads more than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def train_scratch(
    backbone: PreTrainedModel,
    pixels: Tensor,
    labels: Tensor,
    train: Tensor | NDArray[np.int64],
    num_labels: int,
    seed: int,
    epochs: int,
) -> Rows:
    """Trains a backbone with a linear head and returns its features of all pictures.

    The same call gives the same features. A small set gets `LEAST_STEPS` steps at least.

    Args:
        backbone: with `last_hidden_state` [B, T, D] out of `pixel_values`, the first token CLS.
        pixels: [N, 3, H, W] of all pictures.
        labels: [N] int64; those of `train` alone are read.
        train: row numbers to train on.
        num_labels: C.
        seed: of the head and of the order.
        epochs: passes over the rows.
    """
    rows = torch.as_tensor(train, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        head = nn.Linear(int(backbone.config.hidden_size), num_labels)
    wanted = [*backbone.parameters(), *head.parameters()]
    batch = min(BATCH, len(rows))
    per_epoch = -(-len(rows) // batch)
    steps = max(LEAST_STEPS, epochs * per_epoch)
    optimizer = torch.optim.AdamW(wanted, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    backbone.train()
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.cat([order, rows[torch.randperm(len(rows), generator=generator)]])
        chosen, order = order[:batch], order[batch:]
        loss = functional.cross_entropy(head(_features(backbone, pixels[chosen])), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    backbone.eval()
    with torch.no_grad():
        found = torch.cat([_features(backbone, block) for block in pixels.split(512)])
    return Rows(found, found, labels)


def _features(backbone: PreTrainedModel, pixels: Tensor) -> Tensor:
    """[B, D] mean of the patch tokens."""
    tokens: Tensor = backbone(pixel_values=pixels).last_hidden_state
    return tokens[:, 1:].mean(1)
