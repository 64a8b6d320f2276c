"""Pictures through an encoder: decoding runs ahead in threads, and memory stays bounded.

Pillow and torchvision leave Python's lock while they work, so threads decode side by side; they
cost no start, no copies between processes, and no second import of torch.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .encoders import Encoder, one_torch_thread
from .reading import IMAGE, SAMPLE_ID, BadRow, Batch, read_batch

MOST_READERS = 16
"""Threads that decode for one GPU."""

Given = TypeVar("Given")
Made = TypeVar("Made")


class Encoded(NamedTuple):
    """Some pictures and their features.

    Attributes:
        features: [B, D] float32; None where no picture could be decoded.
        rows: the row numbers of the features.
        bad: the rows that could not be decoded.
    """

    features: Tensor | None
    rows: list[int]
    bad: list[BadRow]


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

    if encoder.streams > 1:
        yield from _side_by_side(batches, read, encoder)
    else:
        yield from _one_behind(batches, read, encoder)


def _side_by_side(
    batches: list[list[int]], read: Callable[[list[int]], Batch], encoder: Encoder
) -> Iterator[Encoded]:
    """Each thread takes a batch all the way: no core waits for another."""

    def work(wanted: list[int]) -> Encoded:
        batch = read(wanted)
        features = None
        if batch.pixel_values is not None:
            features = encoder.encode(batch.pixel_values)()
        return Encoded(features, batch.rows, batch.bad)

    with one_torch_thread():
        yield from in_order(work, batches, encoder.streams)


def _one_behind(
    batches: list[list[int]], read: Callable[[list[int]], Batch], encoder: Encoder
) -> Iterator[Encoded]:
    """Threads read ahead; a result is waited for when the next batch is under way."""
    readers = max(1, min(MOST_READERS, torch.get_num_threads()))
    pending: tuple[Callable[[], Tensor], Batch] | None = None
    for batch in in_order(read, batches, readers):
        started = None if batch.pixel_values is None else encoder.encode(batch.pixel_values)
        if pending is not None:
            yield Encoded(pending[0](), pending[1].rows, pending[1].bad)
            pending = None
        if started is None:
            yield Encoded(None, batch.rows, batch.bad)
        else:
            pending = started, batch
    if pending is not None:
        yield Encoded(pending[0](), pending[1].rows, pending[1].bad)


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
