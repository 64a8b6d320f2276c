"""What the backbone sees is what the model's own image processor makes, however it is batched."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageColumn
from PIL import Image
from support.pictures import encoded, picture, small_processor
from torch import Tensor
from transformers import (
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    ViTImageProcessor,
    ViTImageProcessorPil,
)

from hf_knn.data import batches, decode_image
from hf_knn.data.batches import keeping_layout, pixel_batches, read_batch
from hf_knn.data.decode import BadImageError
from hf_knn.data.loading import prepare
from hf_knn.features.encoders import encode_rows

SIZES = [(50, 37), (37, 50), (64, 64), (33, 90), (20, 20), (50, 37)]
SQUARE = {"height": 32, "width": 32}
CROPPED: dict[str, Any] = {"size": {"shortest_edge": 36}, "crop_size": SQUARE}
PROCESSORS = {
    "vit": ViTImageProcessor(size=SQUARE),
    "bit": BitImageProcessor(**CROPPED),
    "clip": CLIPImageProcessor(**CROPPED),
    "deit": DeiTImageProcessor(size={"height": 36, "width": 36}, crop_size=SQUARE),
    "convnext": ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
}


class Pixels:
    """An encoder that hands the pixels through."""

    name, pinned = "pixels", False

    def __init__(self, streams: int, batch_size: int) -> None:
        self.streams, self.batch_size = streams, batch_size

    def encode(self, pixels: Tensor) -> Any:
        return lambda: pixels.flatten(1)


def jpegs() -> list[bytes]:
    found = []
    for seed, size in enumerate(SIZES):
        noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG")
        found.append(buffer.getvalue())
    return found


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_the_processor_one_by_one(name: str, streams: int) -> None:
    files, processor = jpegs(), PROCESSORS[name]
    kinds = Features({"image": ImageColumn(), "label": ClassLabel(names=["a"])})
    cells = [{"bytes": data, "path": None} for data in files]
    rows = prepare(Dataset.from_dict({"image": cells, "label": [0] * len(files)}, features=kinds))
    parts = list(encode_rows(rows, [5, 0, 1, 2, 3, 4], processor, Pixels(streams, 4)))
    assert [row for part in parts for row in part.rows] == [5, 0, 1, 2, 3, 4]
    found = torch.cat([part.features for part in parts if part.features is not None])
    for row, pixels in zip([5, 0, 1, 2, 3, 4], found, strict=True):
        with Image.open(io.BytesIO(files[row])) as opened:
            image = opened.convert("RGB")
        wanted = processor(images=image, return_tensors="pt")["pixel_values"].flatten()
        assert wanted.std() > 0.1
        assert (pixels - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("name", PROCESSORS)
def test_pictures_that_are_no_rows_come_to_the_same_pixels(name: str) -> None:
    files, processor = jpegs(), PROCESSORS[name]
    kinds = Features({"image": ImageColumn(), "label": ClassLabel(names=["a"])})
    cells = [{"bytes": data, "path": None} for data in files]
    rows = prepare(Dataset.from_dict({"image": cells, "label": [0] * len(files)}, features=kinds))
    wanted = read_batch(rows, range(len(files)), processor).pixel_values
    assert wanted is not None
    parts = list(pixel_batches(files, processor, 4))
    assert [len(part.values) for part in parts] == [4, 2]
    assert torch.equal(torch.cat([part.values for part in parts]), wanted)
    plain = list(pixel_batches(wanted, None, 5))
    assert torch.equal(torch.cat([part.values for part in plain]), wanted)
    assert [part.contents for part in plain] == [None, None]
    files[5] = b"nothing"
    with pytest.raises(BadImageError, match="picture 5"):
        list(pixel_batches(files, processor, 4))


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_layout_of_the_decoder_changes_no_bit(name: str) -> None:
    processor = PROCESSORS[name]
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in jpegs()]
    wanted = processor(images=images, return_tensors="pt")["pixel_values"]
    quick = keeping_layout(processor)
    assert type(quick).process_image is not type(processor).process_image
    assert torch.equal(quick(images=images, return_tensors="pt")["pixel_values"], wanted)
    assert wanted.is_contiguous()
    assert quick.to_dict() == processor.to_dict()
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    assert torch.equal(quick(images=tensors, return_tensors="pt")["pixel_values"], wanted)


def test_a_processor_that_reads_in_its_own_way_is_left_alone() -> None:
    class Inverted(ViTImageProcessor):
        def process_image(self, image: Any, *args: Any, **options: Any) -> Tensor:
            return 255 - super().process_image(image, *args, **options)

    own, in_pillow = Inverted(size=SQUARE), ViTImageProcessorPil(size=SQUARE)
    assert keeping_layout(own) is own
    assert keeping_layout(in_pillow) is in_pillow


def test_large_pictures_are_processed_before_the_next_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sides = [8, 30, 8, 8, 40, 8]
    files = [encoded(picture(0, n, (side, side))) for n, side in enumerate(sides)]
    items: list[dict[str, Any]] = [
        {"image": {"bytes": data, "path": None}, "sample_id": n} for n, data in enumerate(files)
    ]
    calls: list[int] = []
    real = batches.pixels_of

    def pixels_of(images: Any, processor: Any, **options: Any) -> torch.Tensor:
        calls.append(len(images))
        return real(images, processor, **options)

    monkeypatch.setattr(batches, "pixels_of", pixels_of)
    wanted = batches.process_rows(items, small_processor())
    assert calls == [6]
    monkeypatch.setattr(batches, "HELD_PIXELS", 100)
    calls.clear()
    found = batches.process_rows(items, small_processor())
    assert calls == [2, 3, 1]  # each call ends with a large one, or at the end
    assert found.pixel_values is not None
    assert wanted.pixel_values is not None
    assert torch.equal(found.pixel_values, wanted.pixel_values)
    ((values, contents),) = batches.pixel_batches(files, small_processor(), 9)
    assert torch.equal(values, wanted.pixel_values)
    assert contents is not None
    assert contents.tolist() == [list(batches.content_of(decode_image(data))) for data in files]
