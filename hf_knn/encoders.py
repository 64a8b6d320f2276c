"""Pixels to features, by PyTorch: what every other backend is measured and checked against.

On a CPU several small batches run at once, each on a thread of its own: the activations of four
pictures stay in the caches of a core, and no core waits for another.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .backbone import extract
from .configuration_knn import KnnConfig

TORCH, COMPILE, ONNX, OPENVINO, AUTO = "torch", "compile", "onnx", "openvino", "auto"
BACKENDS = (AUTO, TORCH, COMPILE, ONNX, OPENVINO)
CPU_BATCH = 4
"""Pictures per call on a CPU: the activations of more leave the caches of a core."""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Encoder(Protocol):
    """What turns pixels into features.

    Attributes:
        name: of the backend.
        streams: how many threads should call it at the same time, >= 1; with 1, only the thread
            that made it.
        batch_size: the most pictures per call.
        pinned: whether pixels should come in memory that a GPU can copy from by itself.
    """

    name: str
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
        self.name = COMPILE if compiled else TORCH
        self._extract = torch.compile(extract) if compiled else extract
        parameter = next(backbone.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
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
            moved = self._moved(pixels).to(self.dtype)
            moved = moved.contiguous(memory_format=torch.channels_last)
            features, _ = self._extract(self.backbone, moved, self.config)
            return self._leaving(features.float())

    def _moved(self, pixels: Tensor) -> Tensor:
        """Pixels on the device; on a GPU while it computes the batch before."""
        if self._arrivals is None:
            return pixels.to(self.device)
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


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """For threads that are started inside: each is to keep to its own core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def frozen_copy(backbone: PreTrainedModel) -> PreTrainedModel:
    """A copy to be traced: in evaluation mode, on the CPU, without gradients."""
    copied = copy.deepcopy(backbone).cpu().eval()
    return copied.requires_grad_(False)
