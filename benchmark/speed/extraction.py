"""From JPEG files to features: our backends, eager PyTorch, transformers' pipeline, plain timm.

Beside the rates stand their limits: the forward pass alone with pixels in memory, decoding alone,
processing alone, and what the three leave when they share the cores.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import timm
import torch
import typer
from harness import compare, report
from jpegs import jpeg_folder
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BaseImageProcessor,
    BitImageProcessor,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperModel,
    pipeline,
)

sys.path.append(str(Path(__file__).parents[1]))  # benchmark/, where the catalog lies

from catalog.backbones import build_backbone
from hf_knn import extract_features
from hf_knn.data import decode_image

EAGER, TORCH = "torch eager", "hf_knn, torch"
PIPELINE, PLAIN = "transformers pipeline", "plain timm"
OURS = {"hf_knn, onnx": "onnx", "hf_knn, openvino": "openvino"}
MODELS = {"efficientnet-lite0": "tf_efficientnet_lite0", "vit-tiny": "vit_tiny_patch16_224"}
_NEEDED = {"onnx": "onnxruntime", "openvino": "openvino"}
_BATCH, _BLOCK = 32, 4


def load_model(name: str) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A backbone of transformers that wraps one of timm, and its image processor."""
    if name == "efficientnet-lite0":
        folder = build_backbone(name)
        model, processor = (
            AutoModel.from_pretrained(folder),
            AutoImageProcessor.from_pretrained(folder),
        )
        return model.eval(), processor
    torch.manual_seed(0)
    model = TimmWrapperModel(TimmWrapperConfig(architecture=MODELS[name]))
    half = [0.5, 0.5, 0.5]
    processor = BitImageProcessor(
        size={"shortest_edge": 248}, crop_size={"height": 224, "width": 224}, image_mean=half,
        image_std=half,
    )  # fmt: skip
    return model.eval(), processor


def plain_timm(model: nn.Module, files: list[Path]) -> Tensor:
    """What timm's documentation does with pictures."""
    settings = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**settings, is_training=False)
    found = []
    with torch.inference_mode():
        for start in range(0, len(files), _BATCH):
            batch = [
                transform(Image.open(path).convert("RGB")) for path in files[start : start + _BATCH]
            ]
            found.append(model(torch.stack(batch)))
    return torch.cat(found)


def torch_eager(model: PreTrainedModel, processor: BaseImageProcessor, files: list[Path]) -> Tensor:
    """The same decoder, processor and pooling as ours, batch by batch, as one writes it first."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(files), _BATCH):
            pictures = [decode_image(path) for path in files[start : start + _BATCH]]
            pixels = processor(images=pictures, return_tensors="pt")["pixel_values"].contiguous()
            hidden = model(pixel_values=pixels).last_hidden_state
            found.append(hidden.mean(dim=(2, 3)) if hidden.ndim == 4 else hidden[:, 0])
    return torch.cat(found)


def in_threads(work: Callable[[Any], object], items: Iterable[Any]) -> float:
    """Seconds for all items on as many threads as torch would use."""
    items = list(items)
    work(items[0])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, items):
            pass
    elapsed = time.perf_counter() - started
    torch.set_num_threads(threads)
    return elapsed


def open_graph(backend: str, graph: Path) -> Callable[[Any], object]:
    """What runs the graph on an array of pixels, as our backends open it."""
    threads = torch.get_num_threads()
    if backend == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            str(graph), options, providers=["CPUExecutionProvider"]
        )
        return lambda block: session.run(None, {"pixel_values": block})
    import openvino

    core = openvino.Core()
    settings = {
        "NUM_STREAMS": threads, "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": openvino.Type.f32,
    }  # fmt: skip
    compiled = core.compile_model(core.read_model(str(graph)), "CPU", settings)
    return lambda block: compiled.create_infer_request().infer({0: block}, share_inputs=True)


def limits(
    files: list[Path], processor: BaseImageProcessor, graph: Path, rates: dict[str, float]
) -> dict[str, Any]:
    """Pictures per second of each step alone, and what they leave together on the same cores.

    Args:
        files: JPEG.
        processor: as transformers runs it; ours gives the same pixels in less time.
        graph: of the backbone.
        rates: pictures per second that were reached, by backend.
    """
    pictures = [decode_image(path) for path in files[:_BATCH]]
    parts = [pictures[start : start + _BLOCK] for start in range(0, len(pictures), _BLOCK)]
    found: dict[str, float] = {
        "decode": len(files) / in_threads(decode_image, files),
        "process": len(pictures)
        / in_threads(lambda part: processor(images=part, return_tensors="pt"), parts),
    }
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    blocks = [part.numpy() for part in pixels.split(_BLOCK)]
    accounts = {}
    for backend, reached in rates.items():
        started = time.perf_counter()
        run = open_graph(backend, graph)
        opening = time.perf_counter() - started
        forward = len(pixels) / in_threads(run, blocks)
        each = 1 / found["decode"] + 1 / found["process"] + 1 / forward
        accounts[backend] = {
            "forward alone": forward, "with decoding and processing": 1 / each,
            "with opening the graph too": len(files) / (len(files) * each + opening),
            "reached": reached, "% of forward alone": 100 * reached / forward,
            "seconds to open the graph": opening,
        }  # fmt: skip
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    started = time.perf_counter()
    for _ in range(20):
        torch.mm(left, right)
    found["matrix products, GFLOP/s"] = 20 * 2 * 1024**3 / (time.perf_counter() - started) / 1e9
    return {"alone, pictures per second": found, "account": accounts}


def nearest(features: Tensor) -> Tensor:
    """[N] the nearest other row by cosine."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    products = unit @ unit.T
    products.fill_diagonal_(-torch.inf)
    return products.argmax(dim=1)


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "efficientnet-lite0",
    pictures: Annotated[int, typer.Option(help="JPEG files.")] = 384,
    share: Annotated[float, typer.Option(help="Part that the slow contestants do.")] = 0.25,
    rounds: Annotated[int, typer.Option(min=2, help="Interleaved rounds.")] = 3,
    output: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
) -> None:
    """Time extraction from files, alternately, and compare the features."""
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    folder = jpeg_folder(pictures)
    files = sorted(folder.rglob("*.jpg"))
    rows = load_dataset("imagefolder", data_dir=str(folder), split="train")
    part = max(_BATCH, round(share * pictures))
    some = files[:part]
    backbone, processor = load_model(model)
    plain = backbone.timm_model
    assert isinstance(plain, nn.Module)
    backends = [name for name in OURS.values() if find_spec(_NEEDED[name]) is not None]
    peer_pipe = pipeline("image-feature-extraction", model=backbone, image_processor=processor)
    features: dict[str, Tensor] = {}

    def ours(backend: str, data: Any) -> None:
        found = extract_features(
            backbone, data, processor, backend=backend, use_cache=False, progress=False
        )
        features[backend] = found.features

    def eager() -> None:
        features[EAGER] = torch_eager(backbone, processor, some)

    contestants: dict[str, Callable[[], object]] = {
        EAGER: eager,
        TORCH: lambda: ours("torch", rows),
    }
    for title, name in OURS.items():
        if name in backends:
            contestants[title] = partial(ours, name, rows)
    contestants[PIPELINE] = lambda: peer_pipe([str(path) for path in some], batch_size=_BATCH)
    contestants[PLAIN] = lambda: plain_timm(plain, some)
    shares = dict.fromkeys((EAGER, PIPELINE, PLAIN), part / pictures)
    with TemporaryDirectory() as scratch:
        os.environ["HF_KNN_CACHE"] = scratch  # after the pictures were found: graphs of this run
        timings = compare(contestants, EAGER, rounds, shares)
        (graph,) = Path(scratch).rglob("graph.onnx")
        rates = {timing.name: pictures / median(timing.seconds) for timing in timings}
        reached = {name: rates[title] for title, name in OURS.items() if name in backends}
        facts = limits(files, processor, graph, reached)
    wanted = features[EAGER]
    agreement = {}
    for name in ["torch", *backends]:
        mine = features[name][: len(wanted)]
        gap = float(((mine - wanted).norm(dim=1) / wanted.norm(dim=1)).max())
        same = float((nearest(mine) == nearest(wanted)).double().mean())
        agreement[name] = {"largest relative difference": gap, "same nearest neighbour": same}
    facts |= {"pictures per second": rates, "agreement": agreement}
    print(json.dumps(facts, indent=2))
    place = output or Path(f"outputs/speed/extraction-{model}.json")
    report(f"{pictures} JPEG files of 500 x 375, {model}", timings, EAGER, place, **facts)


if __name__ == "__main__":
    typer.run(main)
