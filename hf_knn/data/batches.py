"""Rows of pictures to batches of pixels: decoded, augmented if wanted, and processed."""

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .augmentation import EPOCH, Augment
from .decode import BadImageError, decode_image

IMAGE, LABEL, SAMPLE_ID = "image", "label", "sample_id"


class BadRow(NamedTuple):
    """A row that could not be used, and why."""

    row: int
    sample_id: int
    path: str
    reason: str


class Batch(NamedTuple):
    """Some rows, decoded and processed.

    Attributes:
        pixel_values: [B, 3, H, W] float32; without the bad rows.
        rows: the row numbers of what was decoded, length B.
        bad: the rows that could not be decoded.
    """

    pixel_values: Tensor | None
    rows: list[int]
    bad: list[BadRow]


def read_batch(dataset: Any, rows: Sequence[int], processor: Any) -> Batch:
    """Decodes some rows and runs the image processor on them.

    Args:
        dataset: prepared.
        rows: row numbers.
        processor: an image processor.
    """
    entries = dataset[list(rows)]
    pairs = zip(entries[IMAGE], entries[SAMPLE_ID], strict=True)
    items = [{IMAGE: image, SAMPLE_ID: sample_id} for image, sample_id in pairs]
    pixels, good, bad = process_rows(items, processor)
    numbers = [int(row) for row in rows]
    return Batch(
        pixels, [numbers[i] for i in good], [row._replace(row=numbers[row.row]) for row in bad]
    )


def process_rows(
    items: list[dict[str, Any]], processor: Any, augment: Augment | None = None
) -> Batch:
    """Decodes rows that were read already; row numbers are places in the list.

    Args:
        items: rows of a prepared dataset.
        processor: an image processor.
        augment: what the pictures go through first; the rows then have an `epoch`.
    """
    images, good, bad = [], [], []
    for place, item in enumerate(items):
        try:
            image = decode_entry(item[IMAGE])
            if augment is not None:
                image = augment(image, item.get(EPOCH, 0), int(item[SAMPLE_ID]))
            images.append(image)
            good.append(place)
        except (BadImageError, OSError) as error:
            path = (item[IMAGE] or {}).get("path") or ""
            bad.append(BadRow(place, int(item[SAMPLE_ID]), path, str(error)))
    options = {} if augment is None else augment.processor_options
    pixels = None
    if images:
        processor = keeping_layout(processor)
        pixels = processor(images=images, return_tensors="pt", **options)["pixel_values"]
    return Batch(pixels, good, bad)


def keeping_layout(processor: Any) -> Any:
    """The same processor, the same pixels, in two thirds of the time.

    A decoder writes pixel after pixel, and torchvision resizes that layout fastest; transformers
    first copies each picture to one plane per colour.

    Args:
        processor: an image processor; one that reads pictures in its own way is returned as it is.
    """
    from transformers.image_processing_backends import TorchvisionBackend  # imports slowly

    kind: Any = type(processor)
    if getattr(kind, "process_image", None) is not TorchvisionBackend.process_image:
        return processor
    quick = copy.copy(processor)
    quick.__class__ = _keeping_layout(kind)
    return quick


@cache
def _keeping_layout(kind: Any) -> type:
    def process_image(self: Any, image: Any, *args: Any, **options: Any) -> Tensor:
        """[3, H, W] uint8, a view of [H, W, 3]; what is no RGB picture goes the usual way."""
        if getattr(image, "mode", None) == "RGB" and options.get("device") is None:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
        plain: Tensor = kind.process_image(self, image, *args, **options)
        return plain

    return type(kind.__name__, (kind,), {"process_image": process_image})


def decode_entry(entry: dict[str, Any] | None) -> Any:
    """The picture of one undecoded cell of a dataset: its bytes, or the file of its path.

    Raises:
        BadImageError: if there is none, or it cannot be decoded.
        OSError: if the file cannot be read.
    """
    if entry is None:
        raise BadImageError("the row has no picture")
    return decode_image(entry["bytes"] if entry.get("bytes") is not None else entry["path"])


class ReadyBatch:
    """Rows that were fetched at once: `KnnCollator` takes them whole, others row by row.

    Args:
        columns: by name, [B, ...] each.
    """

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: column[row] for name, column in self.columns.items()}


class KnnCollator:
    """Makes batches of rows of pictures, or of rows of features.

    Args:
        processor: the image processor.
        on_bad_image: `fail` or `skip` at pictures that cannot be decoded.
        augment: what training pictures go through, or None; rows then know their `epoch`.
    """

    def __init__(
        self, processor: Any, on_bad_image: str = "fail", augment: Augment | None = None
    ) -> None:
        self.processor, self.on_bad_image, self.augment = processor, on_bad_image, augment

    def __call__(self, rows: list[dict[str, Any]] | ReadyBatch) -> dict[str, Tensor]:
        """Rows to `features` or `pixel_values`, `labels`, `sample_ids` and maybe `knn_log_probs`.

        Raises:
            ValueError: at a picture that cannot be decoded, or a batch without any.
        """
        if isinstance(rows, ReadyBatch):
            return rows.columns
        if "features" in rows[0]:
            return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        pixel_values, good, bad = process_rows(rows, self.processor, self.augment)
        if bad and (self.on_bad_image == "fail" or not good):
            raise ValueError(
                f"Expected pictures that can be decoded, but {bad[0].path or 'a picture'} "
                f"(sample id {bad[0].sample_id}) cannot: {bad[0].reason}; repair or remove it, or "
                "pass on_bad_image='skip'."
            )
        labels = torch.tensor([rows[i][LABEL] for i in good])
        sample_ids = torch.tensor([rows[i][SAMPLE_ID] for i in good])
        assert pixel_values is not None
        return {"pixel_values": pixel_values, "labels": labels, "sample_ids": sample_ids}
