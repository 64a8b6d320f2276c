"""The offline backbones: local folders in transformers format, made from installed packages."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import (
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from catalog.cache import build_once, cache_root, unknown_name, versioned
from hf_knn import KnnForImageClassification
from hf_knn_cli.backbones import known_backbones

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


LITES = {each.name: each for each in known_backbones().values() if each.is_offline}
"""EfficientNet-Lites of 2020, whose ImageNet weights a package holds."""


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
    model = KnnForImageClassification.from_backbone(name, 1)
    model.backbone.save_pretrained(folder)
    model.image_processor.save_pretrained(folder)


def _build_random_lite(folder: Path, name: str) -> None:
    architecture = LITES[name].architecture
    TimmWrapperModel(TimmWrapperConfig(architecture=architecture)).save_pretrained(folder)
    KnnForImageClassification.from_backbone(name, 1).image_processor.save_pretrained(folder)


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
        lite.licence,
        (lite.place, "timm", "transformers"),
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
