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
    """

    name: str
    streams: int
    batch_size: int

    def encode(self, pixels: Tensor) -> Callable[[], Tensor]:
        """Starts on [B, 3, H, W] float32; what it returns waits for [B, D] float32 on the CPU."""
        ...


class TorchEncoder:
    """The backbone as it is, on its device.

    On a GPU the pixels come from pinned memory, and copies overlap with computing.

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

    def encode(self, pixels: Tensor) -> Callable[[], Tensor]:
        """See `Encoder`."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            pixels = pixels.pin_memory()
        context: Any = nullcontext()
        if self.autocast is not None:
            context = torch.autocast(self.device.type, self.autocast)
        with torch.inference_mode(), context:
            moved = pixels.to(self.device, self.dtype, non_blocking=on_gpu)
            moved = moved.contiguous(memory_format=torch.channels_last)
            features, _ = self._extract(self.backbone, moved, self.config)
            found = features.float()
        # asked for one batch later: until then the GPU works and the CPU decodes
        return lambda: found.cpu()


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
