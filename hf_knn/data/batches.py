"""Pictures to batches of pixels: decoded, augmented if wanted, and processed."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .augmentation import EPOCH, Augment
from .decode import BadImageError, decode_image, read_picture

IMAGE, LABEL, SAMPLE_ID, PATH = "image", "label", "sample_id", "path"

CONTENT_BYTES = 16
"""Of the print of a picture, see `content_of`."""


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
        contents: [B, 16] uint8, their prints, see `content_of`; None where nobody asked.
    """

    pixel_values: Tensor | None
    rows: list[int]
    bad: list[BadRow]
    contents: NDArray[np.uint8] | None = None


def content_of(image: Image.Image) -> bytes:
    """A print of a picture: 16 bytes, the xxh3_128 of its size and of its pixels.

    It is equal for files of one picture that were renamed, saved again without loss, or rid of
    their metadata. Nobody can get the picture from it, but whoever has a picture can tell whether
    it is the same.

    Args:
        image: RGB, as `decode_image` returns it.
    """
    total = xxhash.xxh3_128(f"{image.width} {image.height} ".encode())
    total.update(image.tobytes())
    return total.digest()


def contents_of(images: Sequence[Image.Image]) -> NDArray[np.uint8]:
    """[B, 16] uint8: the prints of B pictures, see `content_of`."""
    joined = b"".join(map(content_of, images))
    return np.frombuffer(joined, np.uint8).reshape(-1, CONTENT_BYTES)


class Pixels(NamedTuple):
    """Pictures that are no rows of a dataset.

    Attributes:
        values: [B, 3, H, W].
        contents: [B, 16] uint8, their prints, see `content_of`; None if pixel values were given.
    """

    values: Tensor
    contents: NDArray[np.uint8] | None


def pixel_batches(images: Any, processor: Any, size: int) -> Iterator[Pixels]:
    """Pixels of pictures that are no rows of a dataset, batch by batch.

    Args:
        images: M pictures (see `read_picture`), or pixel values [M, 3, H, W], handed through.
        processor: an image processor; None will do for pixel values.
        size: pictures per batch.

    Yields:
        B pictures.

    Raises:
        BadImageError: naming the picture that cannot be read.
        ValueError: for pictures without an image processor.
    """
    if not isinstance(images, Tensor) and processor is None:
        raise ValueError(
            "Expected a model with an `image_processor` to read pictures, but it has none; pass "
            "pixel values [M, 3, H, W] or set model.image_processor."
        )
    for start in range(0, len(images), size):
        part = images[start : start + size]
        if isinstance(part, Tensor):
            yield Pixels(part, None)
            continue
        pictures = [read_picture(one, number) for number, one in enumerate(part, start)]
        yield Pixels(pixels_of(pictures, processor), contents_of(pictures))


def read_batch(dataset: Any, rows: Sequence[int], processor: Any) -> Batch:
    """Decodes some rows, runs the image processor on them, and takes their prints.

    Args:
        dataset: prepared.
        rows: row numbers.
        processor: an image processor.
    """
    entries = dataset[list(rows)]
    pairs = zip(entries[IMAGE], entries[SAMPLE_ID], strict=True)
    items = [{IMAGE: image, SAMPLE_ID: sample_id} for image, sample_id in pairs]
    images, good, bad = _decode_rows(items, None)
    named = [row._replace(row=int(rows[row.row])) for row in bad]
    pixels = pixels_of(images, processor) if images else None
    return Batch(pixels, [int(rows[place]) for place in good], named, contents_of(images))


def process_rows(
    items: list[dict[str, Any]], processor: Any, augment: Augment | None = None
) -> Batch:
    """Decodes rows that were read already; row numbers are places in the list.

    Args:
        items: rows of a prepared dataset.
        processor: an image processor.
        augment: what the pictures go through first; the rows then have an `epoch`.
    """
    images, good, bad = _decode_rows(items, augment)
    options = {} if augment is None else augment.processor_options
    return Batch(pixels_of(images, processor, **options) if images else None, good, bad)


def _decode_rows(
    items: list[dict[str, Any]], augment: Augment | None
) -> tuple[list[Any], list[int], list[BadRow]]:
    """Pictures, augmented if wanted, their places in the list, and those that cannot be decoded."""
    images: list[Any] = []
    good: list[int] = []
    bad: list[BadRow] = []
    for place, item in enumerate(items):
        try:
            image = _decode_entry(item[IMAGE])
            if augment is not None:
                image = augment(image, item.get(EPOCH, 0), int(item[SAMPLE_ID]))
            images.append(image)
            good.append(place)
        except (BadImageError, OSError) as error:
            path = (item[IMAGE] or {}).get("path") or ""
            bad.append(BadRow(place, int(item[SAMPLE_ID]), path, str(error)))
    return images, good, bad


def pixels_of(images: Sequence[Any], processor: Any, **options: Any) -> Tensor:
    """[B, 3, H, W] float32: what an image processor makes of decoded pictures.

    Args:
        images: B RGB pictures, as `decode_image` returns them.
        processor: an image processor.
        options: of the processor, for this call.
    """
    made = keeping_layout(processor)(images=images, return_tensors="pt", **options)
    pixels: Tensor = made["pixel_values"]
    return pixels


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


def picture_of(dataset: Any, row: int) -> Image.Image:
    """The picture of a row of a prepared dataset, decoded.

    Raises:
        BadImageError: if there is none, or it cannot be decoded.
        OSError: if its file cannot be read.
    """
    return _decode_entry(dataset[row][IMAGE])


class RowPictures(Mapping[int, Image.Image]):
    """Pictures of stored rows by their ids, decoded one at a time: large ones do not pile up.

    Args:
        dataset: prepared, that the rows came from.
        row_ids: of stored rows.
        sample_ids: of the same rows in the dataset; None means that they are the same.

    Raises:
        KeyError: for a sample id that the dataset does not have.
    """

    def __init__(
        self, dataset: Any, row_ids: Sequence[int], sample_ids: Sequence[int] | None = None
    ) -> None:
        places = {int(sample_id): place for place, sample_id in enumerate(dataset[SAMPLE_ID][:])}
        wanted = row_ids if sample_ids is None else sample_ids
        self._dataset = dataset
        self._places = {row: places[i] for row, i in zip(row_ids, wanted, strict=True)}

    def __getitem__(self, row_id: int) -> Image.Image:
        return picture_of(self._dataset, self._places[row_id])

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


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
        pixel_values, good, bad, _ = process_rows(rows, self.processor, self.augment)
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


def _decode_entry(entry: dict[str, Any] | None) -> Image.Image:
    """The picture of one undecoded cell of a dataset: its bytes, or the file of its path."""
    if entry is None:
        raise BadImageError("the row has no picture")
    return decode_image(entry["bytes"] if entry.get("bytes") is not None else entry["path"])
