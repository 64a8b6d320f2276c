"""Pictures on disk and in memory, labelled, of one colour per class with a little noise.

Everything is seeded and 8 x 8, so that models of one layer tell the classes apart.
"""

import io
import zlib
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, ResNetConfig, ViTConfig, ViTImageProcessor

from hf_knn import KnnForImageClassification
from hf_knn.data.decode import ALLOWED_FORMATS
from hf_knn.features.extract import ImageFeatures

pillow_heif: Any = None  # then HEIC is not tried
if find_spec("pillow_heif") is not None:
    pillow_heif = import_module("pillow_heif")
    pillow_heif.register_heif_opener()
WRITTEN_FORMATS = tuple(kind for kind in ALLOWED_FORMATS if kind != "HEIF" or pillow_heif)
"""Pillow can write these here."""

SIDE = 8
NAMES = ("ant", "bee", "cat", "dog", "eel")


def picture(label: int, seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """A noisy picture whose colour depends on its label."""
    generator = np.random.default_rng([label, seed])
    colour = np.array([60 * (label % 5), 255 - 50 * (label % 6), 90 * (label % 3)])
    noise = generator.integers(-25, 26, (size[1], size[0], 3))
    return Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of a picture's file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(folder: Path, per_class: dict[str, int], seed: int = 0) -> Path:
    """One sub-folder of PNG files per label; no two pictures are the same."""
    for name, count in per_class.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        label = NAMES.index(name) if name in NAMES else 0
        first = seed if name in NAMES else seed + zlib.crc32(name.encode())
        for i in range(count):
            (folder / name / f"{i}.png").write_bytes(encoded(picture(label, first + i)))
    return folder


def dataset_of(
    labels: Sequence[int | None],
    seed: int = 0,
    *,
    names: Sequence[str] = NAMES,
    sizes: Sequence[tuple[int, int]] | None = None,
    broken: Sequence[int] = (),
) -> Dataset:
    """Pictures held in memory, with their paths; `broken` rows hold no picture at all."""
    rows = []
    for row, given in enumerate(labels):
        label = max(0, given or 0)
        size = sizes[row % len(sizes)] if sizes else (SIDE, SIDE)
        data = encoded(picture(label, 1000 * seed + row, size))
        if row in broken:
            data = b"not a picture"
        rows.append({"bytes": data, "path": f"{names[label]}/{row}.png"})
    kinds = Features({"image": ImageColumn(), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"image": rows, "label": list(labels)}, features=kinds)


def string_dataset(labels: Sequence[str], seed: int = 0) -> Dataset:
    """Pictures whose labels are names, as many Hub datasets have them."""
    numbers = [NAMES.index(label) for label in labels]
    images = dataset_of(numbers, seed).to_dict()["image"]
    kinds = Features({"image": ImageColumn(), "label": Value("string")})
    return Dataset.from_dict({"image": images, "label": list(labels)}, features=kinds)


def small_processor(**options: Any) -> ViTImageProcessor:
    """An image processor for 8 x 8 pictures."""
    return ViTImageProcessor(size={"height": SIDE, "width": SIDE}, **options)


def small_backbone(seed: int = 0, **options: Any) -> PreTrainedModel:
    """A ViT of one layer for 8 x 8 pictures, with random weights."""
    sizes: dict[str, Any] = {"image_size": SIDE, "patch_size": 4, "hidden_size": 16}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(seed)
    backbone = AutoModel.from_config(ViTConfig(**sizes | options), add_pooling_layer=False)
    with torch.no_grad():
        for value in backbone.parameters():
            value += 0.2 * torch.randn(value.shape)
    return backbone.eval()


def small_resnet(seed: int = 0) -> PreTrainedModel:
    """A residual network with batch norm, whose statistics are not the initial ones."""
    torch.manual_seed(seed)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    backbone = AutoModel.from_config(config)
    with torch.no_grad():
        for name, value in backbone.named_buffers():
            if value.is_floating_point():
                value += torch.rand(value.shape) * (2 if name.endswith("var") else 0.3)
    return backbone.eval()


def small_model(
    labels: Sequence[str] | int = NAMES[:3], seed: int = 0, **options: Any
) -> KnnForImageClassification:
    """A classifier on `small_backbone`, with a new head and no datastore."""
    backbone = options.pop("backbone", None) or small_backbone(seed)
    names = labels if isinstance(labels, int) else list(labels)
    torch.manual_seed(seed + 1)
    return KnnForImageClassification.from_backbone(
        backbone, names, image_processor=small_processor(), **options
    )


def random_features(
    labels: Sequence[int], dim: int = 16, seed: int = 0, spread: float = 1.0, first_id: int = 0
) -> ImageFeatures:
    """Features around one centre per class; the same centres for every seed."""
    wanted = torch.tensor(list(labels))
    centres = torch.randn(max(labels) + 1, dim, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(len(wanted), dim, generator=torch.Generator().manual_seed(seed))
    features: Tensor = centres[wanted] + spread * noise
    return ImageFeatures(features, wanted, torch.arange(first_id, first_id + len(wanted)))
