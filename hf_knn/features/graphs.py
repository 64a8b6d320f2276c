"""The backbone and its pooling as one ONNX graph, run by onnxruntime or OpenVINO.

Both run several batches at once, each on a thread of its own: that scales better over cores than
one batch on all of them, and decoding finds its place in between.
"""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.backbone import extract
from ..core.config import KnnConfig
from .cache import cache_root
from .encoders import CPU_BATCH, ONNX, OPENVINO, frozen_copy

logger = logging.getLogger(__name__)
_NEEDED = {ONNX: ("onnx", "onnxruntime"), OPENVINO: ("onnx", "openvino")}
_INPUT, _OUTPUT = "pixel_values", "features"
_EMBEDDED = 1_500_000_000


# what tracing raises at models that are no graph, and the runtimes at graphs they do not know
_REFUSALS = (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, OSError)


class GraphError(ValueError):
    """A backbone that cannot be run as a graph here, with the reason."""


class FeatureGraph(nn.Module):
    """What is traced: pixels to features.

    Args:
        backbone: the vision model, in evaluation mode.
        config: names the poolings.
    """

    def __init__(self, backbone: PreTrainedModel, config: KnnConfig) -> None:
        super().__init__()
        self.backbone, self.config = backbone, config

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D]."""
        return extract(self.backbone, pixel_values, self.config)[0]


class OnnxEncoder:
    """The graph by onnxruntime, one thread per call.

    Args:
        path: of the graph.
        batch_size: the most pictures per call.
    """

    name = ONNX
    package = "onnxruntime"
    pinned = False

    def __init__(self, path: Path, batch_size: int) -> None:
        import onnxruntime

        self.path = path
        self.streams, self.batch_size = torch.get_num_threads(), min(batch_size, CPU_BATCH)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except _REFUSALS as error:
            raise GraphError(f"onnxruntime refuses the graph: {error}") from error

    def encode(self, pixels: Tensor) -> Callable[[], Tensor]:
        """See `Encoder`."""
        found = self._session.run([_OUTPUT], {_INPUT: pixels.numpy()})[0]
        return lambda: torch.from_numpy(found)


class OpenVinoEncoder:
    """The graph by OpenVINO, one stream per core.

    Args:
        path: of the graph.
        batch_size: the most pictures per call.
        precision: `fp32` or `bf16`.
    """

    name = OPENVINO
    package = "openvino"
    pinned = False

    def __init__(self, path: Path, batch_size: int, precision: str = "fp32") -> None:
        import openvino

        self.path = path
        self.streams, self.batch_size = torch.get_num_threads(), min(batch_size, CPU_BATCH)
        kinds = {"fp32": openvino.Type.f32, "bf16": openvino.Type.bf16}
        options: dict[str, Any] = {
            "NUM_STREAMS": self.streams,
            "INFERENCE_NUM_THREADS": self.streams,
            "INFERENCE_PRECISION_HINT": kinds[precision],
        }
        try:
            core = openvino.Core()
            self._model = core.compile_model(core.read_model(str(path)), "CPU", options)
        except _REFUSALS as error:
            raise GraphError(f"OpenVINO refuses the graph: {error}") from error

    def encode(self, pixels: Tensor) -> Callable[[], Tensor]:
        """See `Encoder`."""
        request = self._model.create_infer_request()  # one may not be shared by threads
        found = request.infer({0: pixels.numpy()}, share_inputs=True)[0]
        return lambda: torch.from_numpy(found)


def is_known_to_agree(encoder: OnnxEncoder | OpenVinoEncoder, precision: str) -> bool:
    """Whether this graph was compared with PyTorch before, in this version of the runtime."""
    return _agreement(encoder, precision).is_file()


def note_agreement(encoder: OnnxEncoder | OpenVinoEncoder, precision: str, gap: float) -> None:
    """Remembers that the graph was compared with PyTorch, and how well it agreed."""
    place = _agreement(encoder, precision)
    try:
        place.write_text(f"{gap:.3e}\n", encoding="utf-8")
    except OSError as error:  # compared again the next time
        logger.debug("%s: %s", place, error)


def _agreement(encoder: OnnxEncoder | OpenVinoEncoder, precision: str) -> Path:
    package = encoder.package
    return encoder.path.with_name(f"agrees-{package}-{version(package)}-{precision}.txt")


def installed_backends() -> list[str]:
    """The graph backends whose packages are here."""
    return [name for name in _NEEDED if not _missing(name)]


def check_installed(backend: str) -> None:
    """Checks that a graph backend can be imported.

    Raises:
        ImportError: naming what is missing and how to get it.
    """
    missing = _missing(backend)
    if missing:
        raise ImportError(
            f"Expected {' and '.join(missing)} for backend={backend!r}, but it is not installed; "
            f"run `pip install 'hf-knn[{backend}]'`, or choose backend='torch'."
        )


def load_encoder(
    backend: str, backbone: PreTrainedModel, config: KnnConfig, shape: tuple[int, int], mark: str,
    precision: str, batch_size: int,
) -> OnnxEncoder | OpenVinoEncoder:  # fmt: skip
    """Exports the graph unless that was done before, and opens it.

    Args:
        backend: `onnx` or `openvino`.
        backbone: with float32 weights.
        config: names the poolings.
        shape: height and width of the pixels.
        mark: a name of the backbone's weights and architecture.
        precision: `fp32`; OpenVINO also takes `bf16`.
        batch_size: the most pictures per call.

    Raises:
        GraphError: if the backbone is no graph, or the runtime refuses it.
        ImportError: if a package is missing.
    """
    check_installed(backend)
    path = _graph_of(backbone, config, shape, mark)
    if backend == ONNX:
        return OnnxEncoder(path, batch_size)
    return OpenVinoEncoder(path, batch_size, precision)


def _missing(backend: str) -> list[str]:
    return [name for name in _NEEDED[backend] if find_spec(name) is None]


def _graph_of(
    backbone: PreTrainedModel, config: KnnConfig, shape: tuple[int, int], mark: str
) -> Path:
    key = [mark, config.pooling, config.store_pooling, shape, version("torch"), 1]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    path = cache_root() / "graphs" / name / "graph.onnx"
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _export(FeatureGraph(frozen_copy(backbone), config).eval(), shape, path)
        except (*_REFUSALS, torch.onnx.errors.OnnxExporterError) as error:
            raise GraphError(f"{type(backbone).__name__} cannot be exported: {error}") from error
    os.utime(path)  # when it was last of use, for `hf-knn cache`
    return path


def _export(graph: FeatureGraph, shape: tuple[int, int], path: Path) -> None:
    size = sum(value.numel() * value.element_size() for value in graph.state_dict().values())
    if size > _EMBEDDED:
        raise ValueError(f"it has {size / 1e9:.1f} GB of weights, and a graph holds 2 GB")
    pixels = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer, about shapes that are constant here
            # the tracer takes seconds where torch.export takes half a minute
            torch.onnx.export(
                graph, (pixels,), str(temporary), dynamo=False, opset_version=18,
                input_names=[_INPUT], output_names=[_OUTPUT],
                dynamic_axes={_INPUT: {0: "batch"}, _OUTPUT: {0: "batch"}},
            )  # fmt: skip
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
