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
from .decode import BadImageError, decode_image, decoding, reading

IMAGE, LABEL, SAMPLE_ID, PATH = "image", "label", "sample_id", "path"

HELD_PIXELS = 4 * 10**6
"""A picture with more is processed as soon as it is decoded, before the next one is."""

CONTENT_BYTES = 16
"""Of the print of a picture, see `content_of`."""


class BadRow(NamedTuple):
    """A row that could not be used.

    Attributes:
        row: its number.
        sample_id: of its picture.
        path: of its picture; empty if unknown.
        reason: why.
        is_unread: whether the picture may be whole, of a format or size that is not read.
    """

    row: int
    sample_id: int
    path: str
    reason: str
    is_unread: bool = False

    def advice(self) -> str:
        """The reason, and what can be done about it."""
        return self.reason if self.is_unread else f"{self.reason}; repair or remove it"


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
        collected = _Collected(processor)
        for number, one in enumerate(part, start):
            with reading(one, number) as image:
                collected.add(image)
        values = collected.pixels()
        assert values is not None
        yield Pixels(values, collected.contents())


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
    collected = _Collected(processor)
    good, bad = _decode_rows(items, None, collected)
    named = [row._replace(row=int(rows[row.row])) for row in bad]
    numbers = [int(rows[place]) for place in good]
    return Batch(collected.pixels(), numbers, named, collected.contents())


def process_rows(
    items: list[dict[str, Any]], processor: Any, augment: Augment | None = None
) -> Batch:
    """Decodes rows that were read already; row numbers are places in the list.

    Args:
        items: rows of a prepared dataset.
        processor: an image processor.
        augment: what the pictures go through first; the rows then have an `epoch`.
    """
    options = {} if augment is None else augment.processor_options
    collected = _Collected(processor, with_contents=False, **options)
    good, bad = _decode_rows(items, augment, collected)
    return Batch(collected.pixels(), good, bad)


class _Collected:
    """Pictures on their way to pixels; a large one is processed at once, so that none pile up.

    Args:
        processor: an image processor.
        with_contents: take their prints, too.
        options: of the processor.
    """

    def __init__(self, processor: Any, *, with_contents: bool = True, **options: Any) -> None:
        self._processor, self._options = processor, options
        self._with_contents = with_contents
        self._prints: list[bytes] = []
        self._held: list[Any] = []
        self._done: list[Tensor] = []

    def add(self, image: Any) -> None:
        """One more; a decoded picture that is large is not needed any longer."""
        if self._with_contents:
            self._prints.append(content_of(image))
        self._held.append(image)
        is_large = isinstance(image, Image.Image) and image.width * image.height > HELD_PIXELS
        if is_large:
            self._process()

    def pixels(self) -> Tensor | None:
        """[B, 3, H, W] float32; None for no picture."""
        if self._held:
            self._process()
        return (
            self._done[0] if len(self._done) == 1 else torch.cat(self._done) if self._done else None
        )

    def contents(self) -> NDArray[np.uint8]:
        """[B, 16] uint8: the prints of the pictures, see `content_of`."""
        return np.frombuffer(b"".join(self._prints), np.uint8).reshape(-1, CONTENT_BYTES)

    def _process(self) -> None:
        self._done.append(pixels_of(self._held, self._processor, **self._options))
        self._held = []


def _decode_rows(
    items: list[dict[str, Any]], augment: Augment | None, collected: _Collected
) -> tuple[list[int], list[BadRow]]:
    """Collects pictures, augmented if wanted; their places, and those that cannot be decoded."""
    good: list[int] = []
    bad: list[BadRow] = []
    for place, item in enumerate(items):
        try:
            with decoding(cell_source(item[IMAGE])) as image:
                if augment is not None:
                    image = augment(image, item.get(EPOCH, 0), int(item[SAMPLE_ID]))
                collected.add(image)
            good.append(place)
        except (BadImageError, OSError) as error:
            path = (item[IMAGE] or {}).get("path") or ""
            is_unread = getattr(error, "is_unread", False)
            bad.append(BadRow(place, int(item[SAMPLE_ID]), path, _reason(error), is_unread))
    return good, bad


def _reason(error: Exception) -> str:
    """Why a picture cannot be used; the system's own words name the file once more."""
    if isinstance(error, OSError) and error.strerror:
        return f"the file cannot be read ({error.strerror})"
    return str(error)


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
    return decode_image(cell_source(dataset[row][IMAGE]))


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
                f"(sample id {bad[0].sample_id}) cannot: {bad[0].advice()}, or "
                "pass on_bad_image='skip'."
            )
        labels = torch.tensor([rows[i][LABEL] for i in good])
        sample_ids = torch.tensor([rows[i][SAMPLE_ID] for i in good])
        assert pixel_values is not None
        return {"pixel_values": pixel_values, "labels": labels, "sample_ids": sample_ids}


def cell_source(entry: dict[str, Any] | None) -> bytes | str:
    """What is to be decoded of one undecoded cell of a dataset: its bytes, or the file's path.

    A cell of a picture that lies elsewhere has `fetch`, which gets its bytes.
    """
    if entry is None:
        raise BadImageError("the row has no picture")
    if entry.get("fetch") is not None:
        fetched: bytes = entry["fetch"]()
        return fetched
    source: bytes | str = entry["bytes"] if entry.get("bytes") is not None else entry["path"]
    return source
