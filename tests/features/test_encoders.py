"""The order of copies and work on a GPU, on one that is played here; and on a real one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.pictures import dataset_of, small_backbone, small_model, small_processor
from torch import Tensor

from hf_knn import extract_features
from hf_knn.core.config import KnnConfig
from hf_knn.features.encoders import TorchEncoder

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


class Stream:
    def __init__(self, name: str, steps: list[str]) -> None:
        self.name, self.steps = name, steps

    def __enter__(self) -> None:
        self.steps.append(f"on {self.name}")

    def __exit__(self, *_: Any) -> None:
        self.steps.append(f"off {self.name}")

    def wait_stream(self, other: "Stream") -> None:
        self.steps.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> SimpleNamespace:
        self.steps.append("event")
        return SimpleNamespace(synchronize=lambda: self.steps.append("wait for event"))


def test_copies_overlap_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    computing = Stream("computing", steps)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    backbone, config = small_backbone(), KnnConfig(pooling="cls", feature_dim=16)
    pixels = torch.randn(3, 3, 8, 8)
    wanted = TorchEncoder(backbone, config, "fp32", 3).encode(pixels)()
    encoder = TorchEncoder(backbone, config, "fp32", 3)
    monkeypatch.setattr(encoder, "_arrivals", Stream("arrivals", steps))
    backbone.register_forward_pre_hook(lambda *_: steps.append("forward"))
    move = Tensor.to

    def move_and_say(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        if options.pop("non_blocking", False):
            steps.append(f"copy of {'pixels' if tensor is pixels else 'features'}")
        return move(tensor, *args, **options)

    monkeypatch.setattr(Tensor, "to", move_and_say)
    monkeypatch.setattr(
        Tensor, "record_stream", lambda _, stream: steps.append(f"kept for {stream.name}")
    )
    waiting = encoder.encode(pixels)
    assert steps == [
        "on arrivals", "copy of pixels", "off arrivals", "computing waits for arrivals",
        "kept for computing", "forward", "copy of features", "event",
    ]  # fmt: skip
    assert torch.equal(waiting(), wanted)
    assert steps[-1] == "wait for event"


@CUDA
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_gpu_gives_what_a_cpu_gives(precision: str) -> None:
    rows = dataset_of([row % 3 for row in range(97)])
    options: dict[str, Any] = {"use_cache": False, "progress": False, "batch_size": 8}
    wanted = extract_features(small_model(), rows, small_processor(), **options).features
    model: Any = small_model()
    model.to("cuda")
    found = extract_features(model, rows, small_processor(), precision=precision, **options)
    gap = (found.features - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert gap.max() < (1e-4 if precision == "fp32" else 0.03)
