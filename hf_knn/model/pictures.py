"""From pictures to what a model takes or keeps: features, and small copies."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..core.backbone import extract
from ..core.config import KnnConfig
from ..data.batches import pixel_batches
from ..data.decode import read_picture
from ..store.backend import RowStore
from .backbones import evaluating
from .thumbnails import Thumbnails, small_webp

if TYPE_CHECKING:
    from .modeling import KnnForImageClassification


def features_of(model: "KnnForImageClassification", images: Any, batch_size: int = 32) -> Tensor:
    """Features of pictures, as the datastore's were made.

    Args:
        model: whose backbone makes them.
        images: [M, 3, H, W] pixel values, or pictures: paths, file contents, PIL images or arrays.
        batch_size: pictures per forward pass.

    Returns:
        [M, D] float32 on the CPU.

    Raises:
        BadImageError: naming the picture that cannot be decoded.
        ValueError: for pictures without an image processor.
    """
    batches = pixel_batches(images, model.image_processor, batch_size)
    with evaluating(model):
        parts = [encode(model.backbone, model.config, pixels).cpu() for pixels in batches]
    if not parts:
        return torch.empty(0, model.config.feature_dim + model.config.extra_dim)
    return torch.cat(parts)  # out here, so that it is a tensor like any other


def encode(
    backbone: PreTrainedModel,
    config: KnnConfig,
    pixels: Tensor,
    run: Callable[..., tuple[Tensor, Any]] = extract,
) -> Tensor:
    """Features of pixels, as a backbone and its pooling make them in the mode it is in.

    Args:
        backbone: the vision model.
        config: names the poolings.
        pixels: [B, 3, H, W], of any float type and on any device.
        run: `extract`, or what was compiled of it.

    Returns:
        [B, D] float32, on the device of the backbone.
    """
    parameter = next(backbone.parameters())
    features, _ = run(backbone, pixels.to(parameter.device, parameter.dtype), config)
    return features.float()


def small_pictures(images: Any) -> list[bytes]:
    """WEBP files of pictures; none of pixel values, which no longer are pictures."""
    if isinstance(images, Tensor):
        return []
    return [small_webp(read_picture(image, number)) for number, image in enumerate(images)]


def thumbnails_of(store: RowStore | None, images: Mapping[int, Any]) -> Thumbnails:
    """Small pictures of stored rows; see `KnnForImageClassification.keep_thumbnails`."""
    ids = [] if store is None else store.ids.tolist()
    unknown = sorted(set(images) - set(ids))
    if unknown:
        raise ValueError(
            f"Expected ids of stored rows, but the datastore does not have {unknown[:10]}."
        )
    return Thumbnails({i: small_webp(read_picture(image, i)) for i, image in images.items()})
