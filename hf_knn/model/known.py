"""Backbones by their short names, and those that an installed package holds the weights of."""

import json
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.resources import as_file, files
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..store.advice import install, needs

_HALF = [0.5, 0.5, 0.5]
"""Pixel mean and standard deviation of the EfficientNet-Lites, of values 0..1."""

_LITES = {
    "efficientnet-lite0": ("efficientnet-lite0-57934424.pth", 256),
    "efficientnet-lite1": ("efficientnet-lite1-77cc7160.pth", 272),
    "efficientnet-lite2": ("efficientnet-lite2-9656183e.pth", 292),
}
"""Their weights, and the shorter side of a picture before a square is cut out of its middle."""


class Known(NamedTuple):
    """What is needed to open one; the whole line is `hf-knn backbones --json`.

    Attributes:
        name: the short one.
        place: its id on the Hub; of an offline one the package with its weights.
        architecture: what timm calls it.
        image_size: side of the square that it sees, in pixels.
        is_offline: whether a package holds its weights.
    """

    name: str
    place: str
    architecture: str
    image_size: int
    is_offline: bool


@cache
def _table() -> dict[str, Known]:
    lines = json.loads((files("hf_knn.model") / "backbones.json").read_text("utf-8"))
    return {
        line["name"]: Known(*(line[field] for field in Known._fields)) for line in lines
    }  # fmt: skip


def find_known(name: str) -> Known | None:
    """The backbone of a short name; None if it is none.

    Args:
        name: such as `dinov2-s`.
    """
    return _table().get(name)


def open_offline(known: Known) -> tuple[PreTrainedModel, Any]:
    """A backbone whose weights lie in an installed package, and its image processor.

    Args:
        known: an offline one.

    Raises:
        ImportError: without timm or the package with the weights, saying what to install.
        ValueError: for weights that do not fit the installed timm.
    """
    module = known.place.replace("-", "_")
    wanted = {"timm": "timm", module: known.place}
    needs(wanted, f"The backbone {known.name}", install("offline"))
    weights = {
        name: tensor
        for name, tensor in efficientnet_lite(known).state_dict().items()
        if not name.startswith("classifier.")
    }
    settings = transformers.TimmWrapperConfig(architecture=known.architecture)
    model = transformers.TimmWrapperModel(settings)
    model.timm_model.load_state_dict(weights)
    resized, side = _LITES[known.name][1], known.image_size
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": resized},  # bicubic by default
        crop_size={"height": side, "width": side},
        image_mean=_HALF,
        image_std=_HALF,
    )
    return model.eval(), processor


def efficientnet_lite(known: Known) -> nn.Module:
    """Timm's EfficientNet-Lite with ImageNet weights and classifier, in eval mode.

    Args:
        known: an offline one.

    Raises:
        ValueError: for weights that do not fit the installed timm.
    """
    timm = import_module("timm")
    folder = files(known.place.replace("-", "_")) / "models"
    with as_file(folder / _LITES[known.name][0]) as path:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    model: nn.Module = timm.create_model(known.architecture)
    model.load_state_dict(rename_in_order(weights, model))
    return model.eval()


def rename_in_order(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Gives the tensors of another implementation the names `model` has for them, by position.

    Args:
        weights: the other implementation's state dict, in the order of its layers.
        model: to load it into.

    Returns:
        A state dict for `model`.

    Raises:
        ValueError: if the number of tensors, a shape or the last part of a name differs.
    """
    wanted = model.state_dict()
    if len(weights) != len(wanted):
        raise ValueError(
            f"Expected {len(wanted)} tensors in the weights, but got {len(weights)}; "
            "do check the versions of timm and of the package with the weights."
        )
    for (name, tensor), (target_name, target) in zip(weights.items(), wanted.items(), strict=True):
        same_part = name.rpartition(".")[2] == target_name.rpartition(".")[2]
        if tensor.shape != target.shape or not same_part:
            raise ValueError(
                f"Expected a tensor for {target_name} {list(target.shape)}, but got {name} "
                f"{list(tensor.shape)}; do check the versions of timm and of the package with the "
                "weights."
            )
    return dict(zip(wanted, weights.values(), strict=True))
