"""Counts and times the backbones that have a short name: the numbers in `hf-knn backbones`.

Parameters and operations follow from the architecture alone, so weights are random and nothing is
fetched. `python benchmark/speed/backbones.py` prints one line for each.
"""

import time
from statistics import median
from typing import Any, NamedTuple

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_knn_cli.backbones import Backbone, known_backbones

ROUNDS = 5


class Counted(NamedTuple):
    """What a backbone is made of, without a classifier.

    Attributes:
        parameters: in millions.
        gflops: thousand million operations for one picture, a multiply-add being two.
    """

    parameters: float
    gflops: float


def architecture(backbone: Backbone) -> Any:
    """The network, with random weights, for pictures of the size that it is given.

    Args:
        backbone: from the table.
    """
    if backbone.is_convolutional:
        return timm.create_model(backbone.architecture, num_classes=0).eval()
    size = backbone.image_size
    return timm.create_model(backbone.architecture, num_classes=0, img_size=size).eval()


def count(backbone: Backbone) -> Counted:
    """Counts without computing anything.

    Args:
        backbone: from the table.
    """
    with torch.device("meta"):
        network = architecture(backbone)
        pixels = torch.empty(1, 3, backbone.image_size, backbone.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.forward_features(pixels)
    total = sum(parameter.numel() for parameter in network.parameters())
    return Counted(total / 1e6, counter.get_total_flops() / 1e9)


def seconds(backbone: Backbone) -> float:
    """Processor seconds of one picture on one thread: the median of a few.

    Args:
        backbone: from the table.
    """
    torch.set_num_threads(1)
    network = architecture(backbone)
    pixels = torch.zeros(1, 3, backbone.image_size, backbone.image_size)
    found = []
    with torch.inference_mode():
        network.forward_features(pixels)
        for _ in range(ROUNDS):
            started = time.process_time()
            network.forward_features(pixels)
            found.append(time.process_time() - started)
    return median(found)


def main() -> None:
    """Prints a line for each."""
    for backbone in known_backbones().values():
        found = count(backbone)
        print(
            f"{backbone.name:20} {found.parameters:7.1f} M parameters {found.gflops:7.1f} GFLOPs "
            f"{1000 * seconds(backbone):6.0f} ms", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
