"""From pictures to what a model takes or keeps: features, and small copies."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core.backbone import extract
from ..data.decode import BadImageError, decode_image
from ..store.backend import RowStore
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
    if not isinstance(images, Tensor) and model.image_processor is None:
        raise ValueError(
            "Expected a model with an `image_processor` to read pictures, but it has none; pass "
            "pixel values [M, 3, H, W] or set model.image_processor."
        )
    was_training, parts = model.training, []
    if was_training:
        model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(images), batch_size):
                batch = images[start : start + batch_size]
                if not isinstance(batch, Tensor):
                    decoded = [_decoded(image, start + i) for i, image in enumerate(batch)]
                    batch = model.image_processor(images=decoded, return_tensors="pt")
                    batch = batch["pixel_values"]
                pixels = batch.to(model.device, model.dtype)
                parts.append(extract(model.backbone, pixels, model.config)[0].float().cpu())
    finally:
        if was_training:
            model.train()
    if not parts:
        return torch.empty(0, model.config.feature_dim + model.config.extra_dim)
    return torch.cat(parts).clone()


def small_pictures(images: Any) -> list[bytes]:
    """WEBP files of pictures; none of pixel values, which no longer are pictures."""
    if isinstance(images, Tensor):
        return []
    return [small_webp(_decoded(image, place)) for place, image in enumerate(images)]


def thumbnails_of(store: RowStore | None, images: Mapping[int, Any]) -> Thumbnails:
    """Small pictures of stored rows; see `KnnForImageClassification.keep_thumbnails`."""
    ids = [] if store is None else store.ids.tolist()
    unknown = sorted(set(images) - set(ids))
    if unknown:
        raise ValueError(
            f"Expected ids of stored rows, but the datastore does not have {unknown[:10]}."
        )
    return Thumbnails({i: small_webp(_decoded(image, i)) for i, image in images.items()})


def _decoded(image: Any, place: int) -> Image.Image:
    try:
        return decode_image(Image.fromarray(image) if isinstance(image, np.ndarray) else image)
    except (BadImageError, OSError, TypeError) as error:
        raise BadImageError(f"Expected picture {place} to be readable, but {error}.") from error
