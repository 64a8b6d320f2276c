"""Pictures of a model: their features, and small copies of stored ones, kept in one file."""

import io
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..core.backbone import extract
from ..core.config import KnnConfig
from ..core.manifest import DatastoreError
from ..core.reading import THUMBNAILS_NAME
from ..data.batches import pixel_batches
from ..data.decode import read_picture
from ..store.backend import RowStore
from .backbones import evaluating

if TYPE_CHECKING:
    from .modeling import KnnForImageClassification

THUMBNAIL_SIDE = 192
"""The longer side in pixels."""

_MOST_BYTES = 64 * 2**10
_LARGEST_FILE = 4 * 2**30
_QUALITY = 82


class Thumbnails:
    """Small WEBP files by row id; never changed, so that copies of a model share them.

    Args:
        pictures: row id to the bytes of a WEBP file.

    Raises:
        ValueError: for what is no small WEBP file, naming the row.
    """

    def __init__(self, pictures: Mapping[int, bytes]) -> None:
        for row_id, data in pictures.items():
            if not 0 < len(data) <= _MOST_BYTES or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
                raise ValueError(
                    f"Expected the thumbnail of row {row_id} to be a WEBP file of at most "
                    f"{_MOST_BYTES} bytes, but got {len(data)} bytes; make it with `small_webp`."
                )
        self._pictures = dict(pictures)

    def __len__(self) -> int:
        return len(self._pictures)

    def __deepcopy__(self, _: Any) -> Self:
        return self

    def get(self, row_id: int) -> bytes | None:
        """The WEBP file of a row; None if there is none.

        Args:
            row_id: of the row.
        """
        return self._pictures.get(row_id)

    def only(self, ids: Iterable[int]) -> "Thumbnails":
        """Those of some rows, where there are any.

        Args:
            ids: of the rows.
        """
        return Thumbnails({i: self._pictures[i] for i in ids if i in self._pictures})

    def without(self, ids: Iterable[int]) -> "Thumbnails":
        """All but those of some rows.

        Args:
            ids: of the rows.
        """
        gone = set(ids)
        return Thumbnails({i: data for i, data in self._pictures.items() if i not in gone})

    def joined(self, other: "Thumbnails") -> "Thumbnails":
        """These and others, which win where both have one.

        Args:
            other: the others.
        """
        return Thumbnails(self._pictures | other._pictures)

    def save(self, folder: Path) -> None:
        """Writes the file into a folder, in the order of the ids.

        Args:
            folder: of a checkpoint.
        """
        pairs = sorted(self._pictures.items())
        ends = torch.tensor([len(data) for _, data in pairs], dtype=torch.int64).cumsum(0)
        tensors = {
            "ids": torch.tensor([row_id for row_id, _ in pairs], dtype=torch.int64),
            "ends": ends,
            "bytes": torch.frombuffer(
                bytearray(b"".join(data for _, data in pairs)), dtype=torch.uint8
            ),
        }
        save_file(tensors, folder / THUMBNAILS_NAME)

    @classmethod
    def load(cls, path: Path | None) -> Self | None:
        """Reads a file that `save` wrote, trusting nothing in it.

        Args:
            path: of the file; None if there is none.

        Raises:
            DatastoreError: for a file that is not what `save` writes.
        """
        if path is None:
            return None
        if path.stat().st_size > _LARGEST_FILE:
            raise DatastoreError(f"Expected {THUMBNAILS_NAME} below 4 GiB; it is no such file.")
        try:
            with safe_open(path, "pt") as file:
                ids, ends, data = (file.get_tensor(name) for name in ("ids", "ends", "bytes"))
            return cls(_split(ids, ends, data))
        except (SafetensorError, ValueError) as error:
            raise DatastoreError(
                f"Expected {THUMBNAILS_NAME} to hold small pictures, but: {error} Download or save "
                "the checkpoint again."
            ) from error


def small_webp(image: Any) -> bytes:
    """A small copy of a picture, encoded anew from its pixels, so without its metadata.

    Args:
        image: RGB, as `decode_image` returns it.

    Returns:
        A WEBP file, 192 pixels on its longer side at most.
    """
    small = image.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=_QUALITY)
    return buffer.getvalue()


def _split(ids: torch.Tensor, ends: torch.Tensor, data: torch.Tensor) -> dict[int, bytes]:
    kinds = (ids.dtype, ends.dtype, data.dtype) == (torch.int64, torch.int64, torch.uint8)
    if not kinds or ids.ndim != 1 or ends.shape != ids.shape or data.ndim != 1:
        raise ValueError("its tensors have other types or shapes.")
    stops = ends.tolist()
    starts = [0, *stops[:-1]] if stops else []
    is_sound = all(a < b for a, b in zip(starts, stops, strict=True))
    if not is_sound or (stops[-1] if stops else 0) != len(data) or len(ids.unique()) != len(ids):
        raise ValueError("its parts disagree.")
    content = data.numpy().tobytes()
    spans = zip(ids.tolist(), starts, stops, strict=True)
    return {row_id: content[start:stop] for row_id, start, stop in spans}


def features_of(model: "KnnForImageClassification", images: Any, batch_size: int = 32) -> Tensor:
    """[M, D] float32 on the CPU: features of pictures, see `look_at`."""
    return look_at(model, images, batch_size)[0]


def look_at(
    model: "KnnForImageClassification", images: Any, batch_size: int = 32
) -> tuple[Tensor, Tensor | None]:
    """Features of pictures, as the datastore's were made, and their prints.

    Args:
        model: whose backbone makes them.
        images: [M, 3, H, W] pixel values, or pictures: paths, file contents, PIL images or arrays.
        batch_size: pictures per forward pass.

    Returns:
        [M, D] float32 on the CPU, and [M, 16] uint8, see `content_of`; None for pixel values.

    Raises:
        BadImageError: naming the picture that cannot be decoded.
        ValueError: for pictures without an image processor.
    """
    parts = [torch.empty(0, model.config.feature_dim + model.config.extra_dim)]
    prints = []
    with evaluating(model):
        for values, contents in pixel_batches(images, model.image_processor, batch_size):
            parts.append(encode(model.backbone, model.config, values).cpu())
            prints += [] if contents is None else [torch.tensor(contents)]
    # out here, so that it is a tensor like any other
    return torch.cat(parts), torch.cat(prints) if prints else None


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

    def make(row_id: int) -> bytes:
        return small_webp(read_picture(images[row_id], row_id))

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding and encoding hold no lock
        return Thumbnails(dict(zip(images, pool.map(make, images), strict=True)))
