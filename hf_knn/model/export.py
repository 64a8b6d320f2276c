"""One ONNX graph with everything: backbone, head, neighbours and blend.

The datastore becomes an initialiser of the graph: its rows, normalised, in the order of their ids,
so that equal similarities come out by id as they do here. Neighbours are a matrix product and a
TopK with constant k.
"""

import inspect
import json
import logging
import math
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.backbone import extract, split_features
from ..core.config import Normalization
from ..core.search import normalize_rows
from ..core.votes import PROBABILITY_FLOOR, Metric, Weighting
from ..data import pixels as pixels_of_a_picture
from ..store.advice import install, needs
from ..store.backend import learned_map_of
from .modeling import KnnForImageClassification

logger = logging.getLogger(__name__)
GRAPH_NAME, SETTINGS_NAME, SCRIPT_NAME = "model.onnx", "model.json", "classify.py"
OUTPUTS = ("log_probs", "head_logits", "neighbor_ids", "similarities")

LARGEST_EMBEDDED = 1_500_000_000
"""Bytes of weights from which they lie in a file beside the graph, which may have 2 GB."""

_TOLERANCE = 1e-3
_CHECKED_PICTURES = 4
_SMALLEST = 1e-30


@dataclass(frozen=True)
class Exported:
    """What was exported, and how well it agrees.

    Attributes:
        folder: with graph, settings and script.
        largest_gap: of log-probabilities between PyTorch and onnxruntime, on the pictures checked.
        rows: of the datastore in the graph.
    """

    folder: Path
    largest_gap: float
    rows: int


def check_export() -> None:
    """Checks that a graph can be written, before a model is opened for it.

    Raises:
        ImportError: without onnx, onnxscript and onnxruntime, naming what to install.
    """
    modules = {name: name for name in ("onnx", "onnxscript", "onnxruntime")}
    needs(modules, "The export", install("export"))


class GraphModel(nn.Module):
    """The model as a graph without branches: `forward` is what is traced.

    Args:
        model: with a datastore that is not empty.
    """

    def __init__(self, model: KnnForImageClassification) -> None:
        super().__init__()
        self.backbone, self.head, self.config = model.backbone, model.head, model.config
        store = model.datastore
        assert store is not None
        order = store.ids.argsort()
        mean = store.mean.double().numpy()
        learned = learned_map_of(store)
        rows = normalize_rows(store.features[order].numpy(), mean, store.normalization, learned)
        self.register_buffer("rows", torch.from_numpy(rows.astype(np.float32)))
        store.verify()  # afterwards: what was copied is what was stored
        self.register_buffer("labels", store.labels[order])
        self.register_buffer("ids", store.ids[order])
        self.register_buffer("mean", store.mean.float())
        self.register_buffer("learned_map", None if learned is None else learned.weight)
        self.is_l2 = store.metric == Metric.L2
        self.normalization = store.normalization
        self.k = min(self.config.k, len(store))

    rows: Tensor
    labels: Tensor
    ids: Tensor
    mean: Tensor
    learned_map: Tensor | None

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B, 3, H, W] -> log-probabilities [B, C], head logits, neighbours' ids, similarities."""
        features, _ = extract(self.backbone, pixel_values, self.config)
        head_part, store_part = split_features(features, self.config)
        head_logits = self.head(head_part).float()
        similarities, places = self._nearest(store_part.float())
        votes = self._votes(similarities, self.labels[places])
        log_probs = self._blend(functional.softmax(head_logits, dim=-1), votes)
        return log_probs, head_logits, self.ids[places], similarities

    def _nearest(self, features: Tensor) -> tuple[Tensor, Tensor]:
        if self.normalization == Normalization.L2_CENTERED:
            features = features - self.mean
        if self.learned_map is not None:
            features = features @ self.learned_map.T
        if self.normalization != Normalization.NONE:
            features = functional.normalize(features, dim=-1, eps=_SMALLEST)
        products = features @ self.rows.T  # [B, N]
        if self.is_l2:
            squares = features.square().sum(-1, keepdim=True) + self.rows.square().sum(-1)
            products = -(squares - 2 * products).clamp_min(0)
        found = products.topk(self.k, dim=-1)
        return found.values, found.indices

    def _votes(self, similarities: Tensor, labels: Tensor) -> Tensor:
        """[B, C] probabilities by the neighbours alone."""
        match Weighting(self.config.knn_weighting):
            case Weighting.SOFTMAX:
                distances = -similarities if self.is_l2 else 2 - 2 * similarities
                weights = functional.softmax(-distances / self.config.knn_temperature, dim=-1)
            case Weighting.UNIFORM:
                weights = torch.full_like(similarities, 1 / self.k)
            case _:
                ranks = 1 / (2 + torch.arange(self.k, dtype=torch.float32))
                weights = (ranks / ranks.sum()).expand_as(similarities)
        empty = torch.zeros(similarities.shape[0], self.config.classes)
        return empty.scatter_add(1, labels, weights)

    def _blend(self, head: Tensor, votes: Tensor) -> Tensor:
        """The blend of both voices, see `functional.blend_log_probs`."""
        config = self.config
        known, taught = votes.split(
            [config.blended_classes, config.classes - config.blended_classes], dim=-1
        )
        rest = 1 - taught.sum(-1, keepdim=True)
        head = functional.pad(head, (0, config.classes - head.shape[-1]))
        probs = torch.cat([config.knn_weight * known, taught], dim=-1)
        probs = probs + (1 - config.knn_weight) * rest * head
        log_probs = probs.clamp_min(PROBABILITY_FLOOR).log()
        if config.blend_temperature != 1:
            log_probs = functional.log_softmax(log_probs / config.blend_temperature, dim=-1)
            log_probs = log_probs.clamp_min(math.log(PROBABILITY_FLOOR))
        return log_probs


def export_onnx(model: KnnForImageClassification, folder: Path) -> Exported:
    """Writes graph, settings and a script that needs numpy, pillow and onnxruntime only.

    Args:
        model: with a datastore and an image processor.
        folder: where to; made if it is not there.

    Returns:
        Where it lies, and how well it agrees with PyTorch.

    Raises:
        ImportError: without onnx, onnxscript and onnxruntime.
        ValueError: for what cannot be exported, with the reason, or if the graph answers otherwise.
    """
    settings = _settings(model)
    _check_exportable(model)
    check_export()
    graph = GraphModel(model).eval()
    size = settings["height"], settings["width"]
    example = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        staged = Path(scratch) / GRAPH_NAME
        _write_graph(graph, example, staged)
        gap = _largest_gap(model, staged, example.shape)
        for path in sorted(Path(scratch).iterdir(), reverse=True):  # the data before the graph
            path.replace(folder / path.name)
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / SETTINGS_NAME).write_text(text + "\n", encoding="utf-8")
    (folder / SCRIPT_NAME).write_text(_SCRIPT, encoding="utf-8")
    return Exported(folder, gap, len(graph.rows))


def _write_graph(graph: GraphModel, example: Tensor, path: Path) -> None:
    size = sum(t.numel() * t.element_size() for t in graph.state_dict().values())
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, about its dependencies
        torch.onnx.export(
            graph,
            (example,),
            path,
            dynamo=True,
            input_names=["pixel_values"],
            output_names=list(OUTPUTS),
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch", min=1)}},
            external_data=size > LARGEST_EMBEDDED,
            verbose=False,
        )


def _largest_gap(model: KnnForImageClassification, path: Path, shape: torch.Size) -> float:
    """The largest difference of a log-probability on pictures of noise.

    Raises:
        ValueError: if it is above 1e-3, or a picture is another class.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(_CHECKED_PICTURES, *shape[1:], generator=generator)
    found = torch.from_numpy(session.run(["log_probs"], {"pixel_values": pixels.numpy()})[0])
    with torch.inference_mode():
        wanted = model(pixel_values=pixels).logits
    # a probability near the floor is decided by rounding
    likely = wanted > math.log(1e-6)
    gap = float((found - wanted)[likely].abs().max())
    if gap > _TOLERANCE or not torch.equal(found.argmax(1), wanted.argmax(1)):
        raise ValueError(
            f"Expected the graph to answer as PyTorch does, but log-probabilities differ by "
            f"{gap:.1e}; nothing was exported. Please report this backbone."
        )
    return gap


def _check_exportable(model: KnnForImageClassification) -> None:
    config, store = model.config, model.datastore
    if store is None or len(store) == 0:
        raise ValueError(
            "Expected a model with a datastore, but it has none; export the plain classifier with "
            "torch.onnx.export."
        )
    if config.knn_weighting == Weighting.INVERSE_DISTANCE:
        raise ValueError(
            "Expected `knn_weighting` to be softmax, uniform or rank, but inverse_distance gives "
            "zero distances all the weight, which float32 similarities of a graph cannot tell."
        )
    if model.dtype != torch.float32:
        raise ValueError(
            f"Expected a model in float32, but got {model.dtype}; open it with dtype=torch.float32."
        )


def _settings(model: KnnForImageClassification) -> dict[str, Any]:
    """What the script does to a picture, and the class names.

    Raises:
        ValueError: for an image processor that does something else.
    """
    processor = model.image_processor
    values = {} if processor is None else processor.to_dict()
    size, crop = values.get("size") or {}, values.get("crop_size") or {}
    final = crop if values.get("do_center_crop") else size
    height = final.get("height") or final.get("shortest_edge")
    width = final.get("width") or final.get("shortest_edge")
    odd = [name for name in ("do_pad", "do_flip_channel_order") if values.get(name)]
    if not values.get("do_resize") or not height or not width or odd:
        raise ValueError(
            f"Expected an image processor that resizes, crops and normalises, but got "
            f"{type(processor).__name__} with {odd or size}."
        )
    edge = size.get("shortest_edge")
    return {
        "resize": edge if edge else [size["width"], size["height"]],
        "height": height,
        "width": width,
        "resample": int(values.get("resample", 2)),
        "scale": float(values.get("rescale_factor", 1 / 255) if values.get("do_rescale") else 1),
        "mean": values["image_mean"] if values.get("do_normalize") else [0.0, 0.0, 0.0],
        "std": values["image_std"] if values.get("do_normalize") else [1.0, 1.0, 1.0],
        "labels": model.config.class_names,
    }


_SCRIPT = '''"""Classify pictures: python classify.py PICTURE ... (numpy, pillow, onnxruntime)."""

import json
import sys
from pathlib import Path

import onnxruntime

try:  # for HEIC
    from pillow_heif import register_heif_opener

    register_heif_opener()
except ImportError:
    pass

# ---- how hf_knn reads a picture ----

#PIXELS#
# ---- what the image processor and the graph make of it ----

HERE = Path(__file__).parent
S = json.loads((HERE / "model.json").read_text(encoding="utf-8"))
Image.MAX_IMAGE_PIXELS = 200_000_000


def load(path):
    """[3, H, W] float32, as the image processor makes it."""
    with Image.open(path) as opened:
        reduce_jpeg(opened)
        image = to_rgb(opened)
    size = S["resize"]
    if not isinstance(size, list):  # the shorter edge
        short, long = sorted(image.size)
        long = int(size * long / short)
        size = [size, long] if image.width <= image.height else [long, size]
    image = image.resize(size, S["resample"])
    left, top = (image.width - S["width"]) // 2, (image.height - S["height"]) // 2
    image = image.crop((left, top, left + S["width"], top + S["height"]))
    pixels = np.asarray(image, np.float32) * S["scale"]
    return ((pixels - S["mean"]) / S["std"]).astype(np.float32).transpose(2, 0, 1)


if __name__ == "__main__":
    session = onnxruntime.InferenceSession(str(HERE / "model.onnx"))
    pixels = np.stack([load(path) for path in sys.argv[1:]])
    log_probs, _, ids, similarities = session.run(None, {"pixel_values": pixels})
    for path, row, near, how in zip(sys.argv[1:], np.exp(log_probs), ids, similarities):
        best = row.argsort()[::-1][:5]
        print(path, *(f"{S['labels'][c]} {row[c]:.1%}" for c in best), sep="\\t")
        print("  nearest rows:", *(f"{i} ({s:.3f})" for i, s in zip(near[:5], how)))
'''.replace("#PIXELS#", inspect.getsource(pixels_of_a_picture))
