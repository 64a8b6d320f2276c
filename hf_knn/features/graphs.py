"""The backbone and its pooling as one ONNX graph, run by onnxruntime or OpenVINO.

Both run several batches at once, each on a thread of its own: that scales better over cores than
one batch on all of them, and decoding finds its place in between.
"""

import copy
import logging
import os
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.backbone import extract
from ..core.config import KnnConfig
from ..store.folders import written_whole
from .cache import cache_root, short_name
from .encoders import CPU_BATCH, ONNX, OPENVINO, Work

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


class GraphEncoder:
    """A graph in memory, called by several threads at the same time.

    Args:
        backend: `onnx` or `openvino`.
        path: of the graph.
        batch_size: the most pictures per call.
        precision: `fp32`; OpenVINO also takes `bf16`.

    Attributes:
        note: the file that says how well it agreed with PyTorch, in this version of the runtime.

    Raises:
        GraphError: if the runtime refuses the graph.
    """

    pinned = False

    def __init__(self, backend: str, path: Path, batch_size: int, precision: str) -> None:
        package = _NEEDED[backend][-1]
        self.streams, self.batch_size = torch.get_num_threads(), min(batch_size, CPU_BATCH)
        self.note = path.with_name(f"agrees-{package}-{version(package)}-{precision}.txt")
        try:
            if backend == ONNX:
                self._run = _open_onnx(str(path))
            else:
                self._run = _open_openvino(str(path), self.streams, precision)
        except _REFUSALS as error:
            raise GraphError(f"{package} refuses the graph: {error}") from error

    def encode(self, pixels: Tensor) -> Callable[[], Tensor]:
        """See `Encoder`."""
        found = torch.from_numpy(self._run(pixels.numpy()))
        return lambda: found


def _open_onnx(path: str) -> Callable[[NDArray], NDArray]:
    """One thread per call."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run([_OUTPUT], {_INPUT: pixels})[0]


def _open_openvino(path: str, streams: int, precision: str) -> Callable[[NDArray], NDArray]:
    """One stream per core."""
    import openvino

    kinds = {"fp32": openvino.Type.f32, "bf16": openvino.Type.bf16}
    options: dict[str, Any] = {
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": streams,
        "INFERENCE_PRECISION_HINT": kinds[precision],
    }
    core = openvino.Core()
    graph = core.compile_model(core.read_model(path), "CPU", options)

    def run(pixels: NDArray) -> NDArray:
        request = graph.create_infer_request()  # one may not be shared by threads
        return request.infer({0: pixels}, share_inputs=True)[0]

    return run


def is_known_to_agree(encoder: GraphEncoder) -> bool:
    """Whether this graph was compared with PyTorch before, in this version of the runtime."""
    return encoder.note.is_file()


def note_agreement(encoder: GraphEncoder, gap: float) -> None:
    """Remembers that the graph was compared with PyTorch, and how well it agreed."""
    try:
        encoder.note.write_text(f"{gap:.3e}\n", encoding="utf-8")
    except OSError as error:  # compared again the next time
        logger.debug("%s: %s", encoder.note, error)


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


def load_encoder(backend: str, work: Work, pixels: Tensor) -> GraphEncoder:
    """Exports the graph unless that was done before, and opens it.

    Args:
        backend: `onnx` or `openvino`.
        work: with float32 weights.
        pixels: [B, 3, H, W], as large as all that will come.

    Raises:
        GraphError: if the backbone is no graph, or the runtime refuses it.
        ImportError: if a package is missing.
    """
    check_installed(backend)
    path = _graph_of(work, (pixels.shape[2], pixels.shape[3]))
    return GraphEncoder(backend, path, work.batch_size, work.precision)


def _missing(backend: str) -> list[str]:
    return [name for name in _NEEDED[backend] if find_spec(name) is None]


def _graph_of(work: Work, shape: tuple[int, int]) -> Path:
    config, backbone = work.config, work.backbone
    key = [work.mark, config.pooling, config.store_pooling, shape, version("torch"), 1]
    path = cache_root() / "graphs" / short_name(key) / "graph.onnx"
    if not path.is_file():
        try:
            own = copy.deepcopy(backbone).cpu().requires_grad_(False)
            _export(FeatureGraph(own, config).eval(), shape, path)
        except (*_REFUSALS, torch.onnx.errors.OnnxExporterError) as error:
            raise GraphError(f"{type(backbone).__name__} cannot be exported: {error}") from error
    os.utime(path)  # when it was last of use, for `hf-knn cache`
    return path


def _export(graph: FeatureGraph, shape: tuple[int, int], path: Path) -> None:
    size = sum(value.numel() * value.element_size() for value in graph.state_dict().values())
    if size > _EMBEDDED:
        raise ValueError(f"it has {size / 1e9:.1f} GB of weights, and a graph holds 2 GB")
    pixels = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    with written_whole(path) as temporary, torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about shapes that are constant here
        # the tracer takes seconds where torch.export takes half a minute
        torch.onnx.export(
            graph, (pixels,), str(temporary), dynamo=False, opset_version=18,
            input_names=[_INPUT], output_names=[_OUTPUT],
            dynamic_axes={_INPUT: {0: "batch"}, _OUTPUT: {0: "batch"}},
        )  # fmt: skip
