"""Pictures through an encoder: PyTorch's own, which every other backend is checked against.

Decoding runs ahead in threads, and memory stays bounded.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ..core.backbone import extract
from ..core.config import KnnConfig
from ..core.lazy import Lock
from ..data.batches import IMAGE, SAMPLE_ID, BadRow, Batch, read_batch
from ..model.pictures import encode

TORCH, COMPILE, ONNX, OPENVINO, AUTO = "torch", "compile", "onnx", "openvino", "auto"
BACKENDS = (AUTO, TORCH, COMPILE, ONNX, OPENVINO)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_BATCH = 4
"""Pictures per call on a CPU: the activations of more leave the caches of a core."""

MOST_READERS = 16
"""Threads that decode for one GPU."""

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Work:
    """What is to be encoded, and by what.

    Attributes:
        backbone: the vision model.
        config: names the poolings.
        mark: a name of the backbone's weights and architecture.
        precision: `fp32`, `bf16` or `fp16`.
        batch_size: pictures per forward pass, >= 1.
        processor: a name of the image processor's settings.
        missing: how many pictures a backend, by its name, would have to encode: those of which the
            cache holds no features by it.
        is_kept: whether the features are kept; those of a model that is being trained are not, and
            `auto` makes no graph of each of its states.
        sample: makes [b, 3, H, W] float32, at most so many pictures as the encoder will get them,
            b >= 1; None if none of them can be decoded.
    """

    backbone: PreTrainedModel
    config: KnnConfig
    mark: str
    precision: str
    batch_size: int
    processor: str
    missing: Callable[[str], int]
    is_kept: bool
    sample: Callable[[int], Tensor | None]

    @property
    def key(self) -> dict[str, Any]:
        """What features depend on, whichever backend makes them."""
        poolings = [self.config.pooling, self.config.store_pooling]
        same = {"backbone": self.mark, "poolings": poolings, "processor": self.processor}
        return same | {"precision": self.precision}


class Encoder(Protocol):
    """What turns pixels into features.

    Attributes:
        streams: how many threads should call it at the same time, >= 1; with 1, only the thread
            that made it.
        batch_size: the most pictures per call.
        pinned: whether pixels should come in memory that a GPU can copy from by itself.
    """

    streams: int
    batch_size: int
    pinned: bool

    def encode(self, pixels: Tensor) -> Callable[[], Tensor]:
        """Starts on [B, 3, H, W] float32; what it returns waits for [B, D] float32 on the CPU."""
        ...


class TorchEncoder:
    """The backbone as it is, on its device.

    On an NVIDIA GPU copies overlap with computing: pixels arrive on a stream of their own, and
    features leave before the next batch begins.

    Args:
        backbone: a vision model, in evaluation mode whenever this is called.
        config: names the poolings.
        precision: `fp32`, or `bf16` / `fp16` by autocast.
        batch_size: pictures per forward pass, >= 1; on a CPU at most 4.
        compiled: run it through `torch.compile`, which takes its time with the first batch.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        config: KnnConfig,
        precision: str,
        batch_size: int,
        compiled: bool = False,
    ) -> None:
        self.backbone, self.config = backbone, config
        self._extract = torch.compile(extract) if compiled else extract
        self.device = next(backbone.parameters()).device
        self.autocast = None if precision == "fp32" else PRECISIONS[precision]
        has_threads = self.device.type == "cpu" and not compiled
        self.streams = torch.get_num_threads() if has_threads else 1
        self.batch_size = min(batch_size, CPU_BATCH) if has_threads else batch_size
        self.pinned = self.device.type == "cuda"
        self._arrivals = torch.cuda.Stream(self.device) if self.pinned else None

    def encode(self, pixels: Tensor) -> Callable[[], Tensor]:
        """See `Encoder`."""
        context: Any = nullcontext()
        if self.autocast is not None:
            context = torch.autocast(self.device.type, self.autocast)
        with torch.inference_mode(), context:
            moved = self._moved(pixels)
            return self._leaving(encode(self.backbone, self.config, moved, self._extract))

    def _moved(self, pixels: Tensor) -> Tensor:
        """Pixels on their way to a GPU while it computes the batch before."""
        if self._arrivals is None:
            return pixels
        with torch.cuda.stream(self._arrivals):
            moved = pixels.to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._arrivals)
        moved.record_stream(computing)  # else its memory could be given away too early
        return moved

    def _leaving(self, features: Tensor) -> Callable[[], Tensor]:
        """On a GPU the copy to the CPU starts here and is waited for one batch later."""
        if self._arrivals is None:
            return features.cpu
        copied = features.to("cpu", non_blocking=True)
        done = torch.cuda.current_stream(self.device).record_event()

        def wait() -> Tensor:
            done.synchronize()
            return copied

        return wait


_COUNTING = Lock()
_before: list[int] = []
"""Torch's threads before, once for each block that is under way; the first is what was set."""


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """For threads that are started inside: each is to keep to its own core.

    The number holds for the process, so the last of several at once puts it back.
    """
    with _COUNTING:
        _before.append(torch.get_num_threads())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _COUNTING:
            if len(_before) == 1:
                torch.set_num_threads(_before[0])
                _before.clear()
            else:
                _before.pop()


class Encoded(NamedTuple):
    """Some pictures and their features.

    Attributes:
        features: [B, D] float32; None where no picture could be decoded.
        rows: the row numbers of the features.
        bad: the rows that could not be decoded.
        contents: [B, 16] uint8, the prints of the pictures, see `content_of`.
    """

    features: Tensor | None
    rows: list[int]
    bad: list[BadRow]
    contents: NDArray[np.uint8]


def encode_rows(
    rows: Any, numbers: list[int], processor: Any, encoder: Encoder
) -> Iterator[Encoded]:
    """Decodes, processes and encodes some rows, batch by batch, in their order.

    Args:
        rows: a prepared dataset.
        numbers: of the rows wanted.
        processor: an image processor.
        encoder: made in this thread.
    """
    lean = rows.select_columns([IMAGE, SAMPLE_ID])
    size = encoder.batch_size
    batches = [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def read(wanted: list[int]) -> Batch:
        batch = read_batch(lean, wanted, processor)
        if encoder.pinned and batch.pixel_values is not None:
            batch = batch._replace(pixel_values=batch.pixel_values.pin_memory())
        return batch

    def start(batch: Batch) -> Callable[[], Encoded]:
        _, numbers, bad, contents = batch
        assert contents is not None
        if batch.pixel_values is None:
            return lambda: Encoded(None, numbers, bad, contents)
        waiting = encoder.encode(batch.pixel_values)
        return lambda: Encoded(waiting(), numbers, bad, contents)

    # each thread takes a batch all the way: no core waits for another; a single one has all cores
    if encoder.streams > 1 and len(batches) > 1:
        with one_torch_thread():
            yield from in_order(lambda wanted: start(read(wanted))(), batches, encoder.streams)
        return
    # threads read ahead; a result is waited for when the next batch is under way
    finish: Callable[[], Encoded] | None = None
    for batch in in_order(read, batches, max(1, min(MOST_READERS, torch.get_num_threads()))):
        started = start(batch)
        if finish is not None:
            yield finish()
        finish = started
    if finish is not None:
        yield finish()


def in_order(work: Callable[[Given], Made], items: Iterable[Given], threads: int) -> Iterator[Made]:
    """Maps in threads; at most twice as many results as threads, plus one, are held.

    Args:
        work: what to do with an item.
        items: in their order, which is that of the results.
        threads: how many, >= 1.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="hf-knn-read")
    running: deque[Future[Made]] = deque()
    try:
        for item in items:
            running.append(pool.submit(work, item))
            if len(running) > 2 * threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
