"""Damaged copies of pictures: what the test pictures of the robustness protocol go through."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset, Features
from datasets import Image as ImageColumn
from PIL import Image, ImageEnhance, ImageFilter


def _blur(image: Image.Image, row: int) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(max(image.size) / 112))


def _noise(image: Image.Image, row: int) -> Image.Image:
    pixels = np.asarray(image, np.float64)
    noisy = pixels + np.random.default_rng(row).normal(0, 0.1 * 255, pixels.shape)
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def _jpeg(image: Image.Image, row: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=10)
    return Image.open(stream).convert("RGB")


def _brightness(image: Image.Image, row: int) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(0.5)


SHIFTS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "blur": _blur,
    "noise": _noise,
    "jpeg": _jpeg,
    "brightness": _brightness,
}
"""One strength each: a blur of 1/112 of the side, noise of 0.1, JPEG quality 10, half the light."""


def shifted(pictures: Dataset, shift: str) -> Dataset:
    """The pictures, each damaged; the same ones each time.

    Args:
        pictures: with `image` and `label`.
        shift: a key of `SHIFTS`.
    """
    damage = SHIFTS[shift]
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(pictures):
        stream = io.BytesIO()
        damage(row["image"].convert("RGB"), number).save(stream, "PNG")
        rows.append({"image": {"bytes": stream.getvalue(), "path": None}, "label": row["label"]})
    features = Features({"image": ImageColumn(), "label": pictures.features["label"]})
    return Dataset.from_list(rows, features=features)
