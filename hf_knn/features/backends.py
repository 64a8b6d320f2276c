"""Backends that encode: graphs for other runtimes, and which one is used for which model.

The one asked for encodes, or the fastest that agrees with PyTorch; a graph is exported once.
What `auto` measures is remembered per model, image processor and machine; it then takes what leaves
the least to wait for, so that pictures encoded by one backend are not encoded again by another. The
choice is made here and nowhere else.
"""

import copy
import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.backbone import extract
from ..core.config import KnnConfig
from ..core.plain_json import read_json
from ..store.advice import install
from ..store.folders import cache_root, short_name, written_whole
from .encoders import (
    AUTO,
    BACKENDS,
    COMPILE,
    CPU_BATCH,
    ONNX,
    OPENVINO,
    TORCH,
    Encoder,
    TorchEncoder,
    Work,
    one_torch_thread,
)

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
            f"run `{install(backend)}`, or choose backend='torch'."
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


TOLERANCE = 1e-2
"""The largest relative difference to PyTorch's features, of the longest row's difference."""

FEWEST_ROWS = 500
"""Pictures from which `auto` looks at anything but PyTorch."""

WORTH_SECONDS = 30.0
"""What PyTorch must be expected to take before a graph is exported."""

SAMPLE = 32
"""Pictures that a backend is measured and checked on."""

_ROUNDS = 3


def check_backend(backend: str | None) -> str:
    """The backend wanted; None takes `$HF_KNN_BACKEND`, else `auto`.

    Raises:
        ValueError: for a name there is not.
        ImportError: for one that is not installed.
    """
    backend = backend or os.environ.get("HF_KNN_BACKEND") or AUTO
    if backend not in BACKENDS:
        raise ValueError(f"Expected `backend` to be one of {list(BACKENDS)}, but got {backend!r}.")
    if backend not in (AUTO, TORCH, COMPILE):
        check_installed(backend)
    return backend


def choose_backend(wanted: str, work: Work) -> str:
    """The backend to use.

    Args:
        wanted: see `check_backend`; anything but `auto` is checked and returned.
        work: what it is for.

    Raises:
        ValueError: for a named backend that cannot do this, with the reason.
    """
    reason = _obstacle(wanted, work)
    if wanted != AUTO:
        if reason:
            raise ValueError(
                f"Expected {reason} for backend={wanted!r}; choose backend='torch', or 'auto'."
            )
        return wanted
    if reason or not installed_backends():
        return TORCH
    missing = {name: work.missing(name) for name in (TORCH, *installed_backends())}
    done = [name for name, rows in missing.items() if rows == 0]
    if done:
        return done[0]
    place = cache_root() / "backends" / f"{_key_of(work)}.json"
    rates = _read(place) or _measured(work, missing[TORCH], place)
    return min(rates, key=lambda name: missing[name] / rates[name]) if rates else TORCH


def _measured(work: Work, rows: int, place: Path) -> dict[str, float] | None:
    """Measures and remembers; None where PyTorch is soon done with so many pictures."""
    if rows < FEWEST_ROWS or not work.is_kept:
        return None
    pixels = work.sample(SAMPLE)
    rates = None if pixels is None else _measure(work, pixels, rows)
    if rates is not None:
        _remember(place, rates)
    return rates


def open_encoder(backend: str, work: Work) -> Encoder:
    """An encoder of a backend that `choose_backend` returned.

    Raises:
        ValueError: if the backbone cannot be exported or compiled, or then answers otherwise.
    """
    torch_encoder = TorchEncoder(work.backbone, work.config, work.precision, work.batch_size)
    pixels = None if backend == TORCH else work.sample(1)
    if pixels is None:  # asked for, or nothing to encode
        return torch_encoder
    if backend == COMPILE:  # its code is made, and checked, in every process
        encoder = TorchEncoder(work.backbone, work.config, work.precision, work.batch_size, True)
        _check_gap(backend, encoder, *_answered(work, torch_encoder))
        return encoder
    graph = load_encoder(backend, work, pixels)
    if not is_known_to_agree(graph):
        note_agreement(graph, _check_gap(backend, graph, *_answered(work, torch_encoder)))
    return graph


def _answered(work: Work, torch_encoder: Encoder) -> tuple[Tensor, Tensor]:
    """Pixels of some pictures and their features."""
    pixels = work.sample(SAMPLE)
    assert pixels is not None  # one of them could be decoded before
    return pixels, torch_encoder.encode(pixels)()


def _check_gap(backend: str, encoder: Encoder, pixels: Tensor, wanted: Tensor) -> float:
    """How far an encoder is from PyTorch's features."""
    try:
        gap = largest_gap(encoder.encode(pixels)(), wanted)
    except RuntimeError as error:
        if backend != COMPILE:
            raise
        raise GraphError(
            f"Expected a backbone that torch.compile can compile here, but got: {error}; install a "
            "C++ compiler if it misses one, or choose backend='torch'."
        ) from error
    if gap > TOLERANCE:
        raise GraphError(
            f"Expected features of backend={backend!r} within {TOLERANCE:g} of PyTorch's, but they "
            f"differ by {gap:.1e}; choose backend='torch'."
        )
    return gap


def largest_gap(found: Tensor, wanted: Tensor) -> float:
    """The largest difference of a row over that row's own length.

    Args:
        found: [B, D].
        wanted: [B, D].
    """
    lengths = wanted.norm(dim=1).clamp_min(1e-12)
    gap = float(((found - wanted).norm(dim=1) / lengths).max())
    return gap if gap == gap else float("inf")  # NaN is as far as can be


def _obstacle(backend: str, work: Work) -> str | None:
    """What a graph backend would want that is not so."""
    if backend in (TORCH, COMPILE):
        return None
    parameter = next(work.backbone.parameters())
    if parameter.device.type != "cpu":
        return f"a model on the CPU, not on {parameter.device},"
    if parameter.dtype != torch.float32:
        return f"a model in float32, not {parameter.dtype},"
    possible = ("fp32", "bf16") if backend == OPENVINO else ("fp32",)
    return None if work.precision in possible else f"another precision than {work.precision}"


def _measure(work: Work, pixels: Tensor, rows: int) -> dict[str, float] | None:
    """Pictures per second of what agrees with PyTorch, by turns; None if PyTorch is quick."""
    contestants: dict[str, Encoder] = {
        TORCH: TorchEncoder(work.backbone, work.config, work.precision, work.batch_size)
    }
    wanted = contestants[TORCH].encode(pixels)()
    if _seconds(contestants[TORCH], pixels) * rows / len(pixels) < WORTH_SECONDS:
        return None
    for name in installed_backends():
        try:
            graph = load_encoder(name, work, pixels)
            note_agreement(graph, _check_gap(name, graph, pixels, wanted))
            contestants[name] = graph
        except GraphError as error:
            logger.warning("Backend %s is not used: %s", name, error)
    seconds = {name: float("inf") for name in contestants}
    for _ in range(_ROUNDS):
        for name, contestant in contestants.items():
            seconds[name] = min(seconds[name], _seconds(contestant, pixels))
    return {name: len(pixels) / value for name, value in seconds.items()}


def _seconds(encoder: Encoder, pixels: Tensor) -> float:
    """How long some pictures take, on as many threads as the encoder wants."""
    parts = pixels.split(max(1, min(encoder.batch_size, -(-len(pixels) // encoder.streams))))
    started = time.perf_counter()
    if encoder.streams == 1:
        for part in parts:
            encoder.encode(part)()
    else:
        with one_torch_thread(), ThreadPoolExecutor(encoder.streams) as pool:
            for _ in pool.map(lambda part: encoder.encode(part)(), parts):
                pass
    return time.perf_counter() - started


def _key_of(work: Work) -> str:
    versions = {}
    for package in ("torch", "onnxruntime", "openvino"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = ""
    machine = [platform.node(), platform.machine(), torch.get_num_threads()]
    # encoders: of ours; what was measured with older ones is measured again
    return short_name(work.key | {"machine": machine, "versions": versions, "encoders": 3})


def _read(place: Path) -> dict[str, float] | None:
    """What was measured, of the backends that are installed; None if nothing was."""
    try:
        measured = read_json(place)["pictures_per_second"]
        rates = {str(name): float(rate) for name, rate in measured.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # not there, or damaged: measured again
    present = {name: rates[name] for name in (TORCH, *installed_backends()) if name in rates}
    return present if TORCH in present and min(present.values()) > 0 else None


def _remember(place: Path, rates: dict[str, float]) -> None:
    try:
        with written_whole(place) as temporary:
            text = json.dumps({"pictures_per_second": rates}, indent=2)
            temporary.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        logger.warning("What backends take is not remembered: %s", error)
