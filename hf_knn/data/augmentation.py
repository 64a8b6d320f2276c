"""Random crops and flips for training: a pure function of (seed, epoch, sample id).

So a picture comes out the same whichever worker, rank or batch meets it, and a run that goes on
after a kill sees what it would have seen.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import torch
from torchvision.transforms import InterpolationMode, v2

EPOCH = "epoch"
"""The column that tells a row its epoch."""

_CROP_SHARE = 0.875
_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


class Augmentation(StrEnum):
    """Which recipe training pictures go through.

    `paper`: resize, random crop, random flip (arXiv 2112.08459: 256, 224, one half).
    """

    PAPER = "paper"
    FLIP = "flip"
    NONE = "none"


class Augment:
    """Turns a training picture into what the image processor has only to normalise.

    Args:
        transform: of pictures, drawing from torch's global generator.
        seed: of the run.
        processor_options: what the image processor must leave out, such as `do_resize=False`.
    """

    def __init__(
        self,
        transform: Callable[[Any], Any],
        seed: int,
        processor_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.transform, self.seed = transform, seed
        self.processor_options = dict(processor_options or {})

    @classmethod
    def from_processor(cls, name: str, processor: Any, seed: int) -> "Augment | None":
        """The recipe for what an image processor makes of a picture.

        Args:
            name: see `Augmentation`.
            processor: the image processor, whose sizes and interpolation are kept.
            seed: of the run.

        Returns:
            None for `none`.

        Raises:
            ValueError: for another name, or a processor that has no size to crop to.
        """
        kind = Augmentation(name)
        if kind is Augmentation.NONE:
            return None
        if kind is Augmentation.FLIP:
            return cls(v2.RandomHorizontalFlip(), seed)
        resized, cropped = _sizes(processor)
        code = int(getattr(processor, "resample", None) or 2)
        interpolation = InterpolationMode(_INTERPOLATION[code])
        transform = v2.Compose(
            [
                v2.Resize(resized, interpolation, antialias=True),
                v2.RandomCrop(cropped, pad_if_needed=True),
                v2.RandomHorizontalFlip(),
            ]
        )
        return cls(transform, seed, {"do_resize": False, "do_center_crop": False})

    def __call__(self, image: Any, epoch: int, sample_id: int) -> Any:
        """The picture of one sample in one epoch.

        Args:
            image: decoded, RGB.
            epoch: from 0.
            sample_id: of the row.
        """
        text = f"{self.seed}|{epoch}|{sample_id}".encode()
        own_seed = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
        with seeded(own_seed):
            return self.transform(image)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A block that draws numbers of its own; afterwards torch's go on as if it had not been.

    Of the CPU only: `torch.manual_seed` would seed every GPU too, and so repeat dropout there.

    Args:
        seed: of the block.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class EpochRows:
    """Rows that know the epoch, wherever they are read.

    Args:
        rows: a prepared dataset.
    """

    def __init__(self, rows: Any) -> None:
        self.rows, self.epoch = rows, 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch, before workers copy the rows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.rows[row], EPOCH: self.epoch}


def _sizes(processor: Any) -> tuple[int | list[int], list[int]]:
    """What a picture is resized to (its shorter side, or both) and cropped to."""
    size = _as_dict(processor, "size")
    crop = _as_dict(processor, "crop_size") if getattr(processor, "do_center_crop", False) else {}
    if {"height", "width"} <= set(crop):
        cropped = [int(crop["height"]), int(crop["width"])]
        if size.get("shortest_edge"):
            return int(size["shortest_edge"]), cropped
        return [int(size["height"]), int(size["width"])], cropped
    if {"height", "width"} <= set(size):
        cropped = [int(size["height"]), int(size["width"])]
    elif size.get("shortest_edge"):
        cropped = [int(size["shortest_edge"])] * 2
    else:
        raise ValueError(
            f"Expected an image processor with a size to crop to, but got {size}; pass "
            "augmentation='flip' or 'none', or a train_transform of your own."
        )
    return round(min(cropped) / _CROP_SHARE), cropped


def _as_dict(processor: Any, name: str) -> dict[str, Any]:
    value = getattr(processor, name, None)
    return {} if value is None else {key: entry for key, entry in dict(value).items() if entry}
