"""Backends against PyTorch, and the one place where they are chosen."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.pictures import dataset_of, small_backbone, small_model, small_processor, small_resnet
from torch import Tensor

from hf_knn import KnnTrainer, KnnTrainingArguments, extract_features
from hf_knn.features import backends as backend_choice
from hf_knn.features import backends as encoder_graphs
from hf_knn.features.backends import GraphError, choose_backend, largest_gap, open_encoder
from hf_knn.features.encoders import Work
from hf_knn.features.extract import ImageFeatures

LABELS = [2, 0, 1, 1, 0, 2, 0, 1, 2, 2, 0]
SIZES = [(8, 8), (31, 9), (5, 20), (1, 1)]
GRAPHS = [
    pytest.param(name, marks=pytest.mark.skipif(name not in found, reason="not installed"))
    for found in [encoder_graphs.installed_backends()]
    for name in ("onnx", "openvino")
]


def run(model: Any, rows: Any, processor: Any = None, **options: Any) -> ImageFeatures:
    return extract_features(model, rows, processor, progress=False, **options)


def work_of(rows: int | dict[str, int] = 10_000, **options: Any) -> Work:
    """Rows: how many are to be encoded, for all backends or for each by name."""
    model, pixels = small_model(), torch.randn(4, 3, 8, 8)
    values: dict[str, Any] = {"precision": "fp32", "mark": "m", "is_kept": True, "processor": "p"}
    values |= options
    return Work(
        model.backbone, model.config, batch_size=32, sample=lambda count: pixels[:count],
        missing=lambda name: rows if isinstance(rows, int) else rows[name], **values,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_equals_torch() -> None:
    model, rows = small_model(), dataset_of(LABELS, sizes=SIZES)
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    wanted = run(model, rows, backend="torch", use_cache=False)
    found = run(model, rows, backend="compile", use_cache=False, batch_size=4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    torch.testing.assert_close(found.features, wanted.features, rtol=1e-4, atol=1e-4)
    assert found.backend == "compile"


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: Any) -> Any:
        def raise_it(*_: Any) -> None:
            raise RuntimeError("No working C++ compiler found")

        return raise_it

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(GraphError, match=r"torch\.compile .*No working C\+\+ compiler.*'torch'"):
        open_encoder("compile", work_of())


def test_a_compiled_model_that_answers_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def off(function: Any) -> Any:
        return lambda *given: (function(*given)[0] * 1.1, None)

    monkeypatch.setattr(torch, "compile", off)
    with pytest.raises(GraphError, match=r"'compile' within 0\.01 of PyTorch's"):
        open_encoder("compile", work_of())


@pytest.mark.parametrize("backend", GRAPHS)
@pytest.mark.parametrize("threads", [1, 2])
def test_equals_torch(backend: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    rows = dataset_of(LABELS, sizes=SIZES, broken=[4])
    options: dict[str, Any] = {"on_bad_image": "skip", "use_cache": False}
    for backbone in (small_backbone(), small_resnet()):
        backbone.train()  # the graph is that of evaluation, and the mode stays
        wanted = run(backbone, rows, small_processor(), backend="torch", **options)
        found = run(backbone, rows, small_processor(), backend=backend, batch_size=3, **options)
        assert found.ids.tolist() == wanted.ids.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
        assert [bad.row for bad in found.skipped] == [4]
        torch.testing.assert_close(found.features, wanted.features, rtol=1e-4, atol=1e-4)
        assert wanted.features.std(dim=0).max() > 1e-4
        assert backbone.training
        assert found.features.dtype == torch.float32


@pytest.mark.parametrize("backend", GRAPHS)
def test_two_poolings_and_a_cache_of_its_own(backend: str, knn_cache: Path) -> None:
    model, rows = small_model(knn_pooling="mean"), dataset_of(LABELS)
    wanted = run(model, rows, backend="torch")
    found = run(model, rows, backend=backend)
    assert (found.computed, run(model, rows, backend=backend).computed) == (len(LABELS), 0)
    assert (wanted.backend, found.backend) == ("torch", backend)
    torch.testing.assert_close(found.features, wanted.features, rtol=1e-4, atol=1e-4)
    assert len(list(knn_cache.rglob("graph.onnx"))) == 1
    about = [json.loads(path.read_text()) for path in knn_cache.rglob("about.json")]
    assert sorted(entry["backend"] for entry in about) == sorted(["torch", backend])


@pytest.mark.parametrize("backend", GRAPHS)
def test_a_graph_is_exported_once_per_weights(backend: str, knn_cache: Path) -> None:
    model, rows = small_model(), dataset_of(LABELS)
    run(model, rows, backend=backend, use_cache=False)
    (graph,) = knn_cache.rglob("graph.onnx")
    before = graph.stat().st_ino
    (gap,) = [path.read_text() for path in graph.parent.glob("agrees-*-fp32.txt")]
    assert 0 <= float(gap) < 1e-4
    run(model, rows, backend=backend, use_cache=False)
    assert [path.stat().st_ino for path in knn_cache.rglob("graph.onnx")] == [before]
    other = small_model(seed=1)
    wanted = run(other, rows, backend="torch", use_cache=False).features
    found = run(other, rows, backend=backend, use_cache=False).features
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert len(list(knn_cache.rglob("graph.onnx"))) == 2


class Stub:
    """An encoder of a given speed and error."""

    streams, batch_size, pinned = 1, 32, False

    def __init__(self, name: str, slow: float, gap: float, clock: list[float]) -> None:
        self.name, self.slow, self.gap, self.clock = name, slow, gap, clock

    def encode(self, pixels: Tensor) -> Any:
        self.clock[0] += self.slow * len(pixels)
        return lambda: torch.full((len(pixels), 4), 1.0 + self.gap)


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, float]]:
    """Seconds per picture and relative error of each backend; a refusal is None."""
    clock = [0.0]
    speeds = {"torch": (0.1, 0.0), "onnx": (0.02, 1e-6), "openvino": (0.01, 1e-6)}

    def load(name: str, *_: Any) -> Stub:
        if speeds[name] is None:
            raise GraphError("no graph")
        return Stub(name, *speeds[name], clock)

    monkeypatch.setattr(backend_choice, "installed_backends", lambda: ["onnx", "openvino"])
    monkeypatch.setattr(backend_choice, "load_encoder", load)
    monkeypatch.setattr(backend_choice, "is_known_to_agree", lambda *_: False)
    monkeypatch.setattr(backend_choice, "note_agreement", lambda *_: None)
    monkeypatch.setattr(backend_choice, "TorchEncoder", lambda *_: load("torch"))
    monkeypatch.setattr(backend_choice.time, "perf_counter", lambda: clock[0])
    return speeds


def test_auto_takes_the_fastest_and_remembers_it(stubs: dict[str, Any], knn_cache: Path) -> None:
    assert choose_backend("auto", work_of()) == "openvino"
    (place,) = (knn_cache / "backends").iterdir()
    known = json.loads(place.read_text())
    assert known["pictures_per_second"] == pytest.approx({"torch": 10, "onnx": 50, "openvino": 100})
    stubs["openvino"] = (1.0, 0.0)
    assert choose_backend("auto", work_of()) == "openvino"  # not measured again
    assert choose_backend("auto", work_of(rows=3)) == "openvino"
    assert choose_backend("auto", work_of(mark="other")) == "onnx"
    assert choose_backend("auto", work_of(processor="of larger pixels")) == "onnx"
    place.write_text("{")
    assert choose_backend("auto", work_of()) == "onnx"


@pytest.mark.parametrize(
    ("torch_rows", "onnx_rows", "openvino_rows", "wanted"),
    [
        (0, 10_000, 10_000, "torch"),  # all of them were encoded before
        (10_000, 0, 10_000, "onnx"),
        (10_000, 4_000, 10_000, "onnx"),  # 80 s against 100 s
        (10_000, 6_000, 10_000, "openvino"),
        (900, 10_000, 10_000, "torch"),  # new pictures cost only themselves
        (1_100, 10_000, 10_000, "openvino"),
    ],
)
def test_auto_takes_what_is_soonest_done(
    torch_rows: int, onnx_rows: int, openvino_rows: int, wanted: str, stubs: dict[str, Any]
) -> None:
    rows = {"torch": torch_rows, "onnx": onnx_rows, "openvino": openvino_rows}
    choose_backend("auto", work_of())  # measured: 10, 50 and 100 pictures a second
    assert choose_backend("auto", work_of(rows)) == wanted


def test_auto_measures_for_new_pictures_only(stubs: dict[str, Any], knn_cache: Path) -> None:
    rows = {"torch": 499, "onnx": 10_000, "openvino": 10_000}
    assert choose_backend("auto", work_of(rows)) == "torch"
    assert choose_backend("auto", work_of(rows | {"openvino": 0})) == "openvino"
    assert not (knn_cache / "backends").exists()


def test_auto_does_not_encode_again_what_another_backend_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend_choice, "FEWEST_ROWS", 8)
    monkeypatch.setattr(backend_choice, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(backend_choice, "installed_backends", lambda: ["onnx"])
    asked: list[int] = []

    def measure(_: Work, __: Tensor, rows: int) -> dict[str, float]:
        asked.append(rows)
        return {"torch": 1.0, "onnx": 3.0}

    monkeypatch.setattr(backend_choice, "_measure", measure)
    model, rows = small_model(), dataset_of(LABELS)
    run(model, rows.select(range(7)))
    found = run(model, rows)  # 4 by torch, or 11 by a graph that is three times as fast
    assert (found.backend, found.computed, asked) == ("torch", 4, [])


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"openvino": (0.01, 0.011)}, "onnx"),
        ({"openvino": (0.01, float("nan"))}, "onnx"),
        ({"openvino": None}, "onnx"),
        ({"openvino": None, "onnx": (0.02, 0.5)}, "torch"),
        ({"torch": (0.005, 0.0)}, "torch"),
        ({"torch": (0.0029, 0.0), "onnx": None, "openvino": None}, "torch"),  # 29 s: not tried
    ],
)
def test_auto_keeps_what_agrees_and_pays(
    change: dict[str, Any], wanted: str, stubs: dict[str, Any], knn_cache: Path
) -> None:
    stubs |= change
    assert choose_backend("auto", work_of()) == wanted
    worth_it = stubs["torch"][0] * 10_000 >= 30
    assert (knn_cache / "backends").exists() is worth_it


def test_auto_is_torch_where_a_graph_does_not_pay_or_fit(stubs: dict[str, Any]) -> None:
    assert choose_backend("auto", work_of(rows=499)) == "torch"
    assert choose_backend("auto", work_of(precision="bf16")) == "torch"
    assert choose_backend("auto", work_of(is_kept=False)) == "torch"
    half = work_of(mark="half")
    half.backbone.bfloat16()
    assert choose_backend("auto", half) == "torch"


def test_a_named_backend_that_differs_is_refused(stubs: dict[str, Any]) -> None:
    stubs["onnx"] = (0.02, 0.02)
    with pytest.raises(ValueError, match=r"within 0\.01 of PyTorch's, but they differ by 2\.0e-02"):
        open_encoder("onnx", work_of())


def test_the_gap_is_that_of_the_worst_row() -> None:
    wanted = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    found = torch.tensor([[3.0, 4.5], [0.0, 1.05]])
    rows = np.linalg.norm((found - wanted).double(), axis=1) / np.array([5.0, 1.0])
    assert largest_gap(found, wanted) == pytest.approx(rows.max(), rel=1e-5)


@pytest.mark.parametrize("backend", GRAPHS)
def test_what_cannot_be_exported_says_so(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("data-dependent shape")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(ValueError, match="cannot be exported: data-dependent shape"):
        run(small_model(), dataset_of(LABELS), backend=backend)


@pytest.mark.parametrize(
    ("backend", "missing"), [("onnx", "onnxruntime"), ("openvino", "openvino")]
)
def test_a_backend_that_is_not_installed(
    backend: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        encoder_graphs, "find_spec", lambda name: None if name == missing else object()
    )
    with pytest.raises(ImportError, match=rf"Expected {missing}.*pip install .*\[{backend}\]"):
        run(small_model(), dataset_of(LABELS), backend=backend)
    assert backend not in encoder_graphs.installed_backends()


def test_bad_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"`backend` to be one of .*, but got 'tensorrt'"):
        run(small_model(), dataset_of([0]), backend="tensorrt")
    monkeypatch.setenv("HF_KNN_BACKEND", "tensorrt")
    with pytest.raises(ValueError, match="but got 'tensorrt'"):
        run(small_model(), dataset_of([0]))


def test_a_trainer_passes_the_backend_on(tmp_path: Path) -> None:
    arguments = KnnTrainingArguments(
        str(tmp_path), freeze_backbone=True, feature_backend="tensorrt", report_to=[]
    )
    with pytest.raises(ValueError, match="but got 'tensorrt'"):
        KnnTrainer(small_model(), arguments, train_dataset=dataset_of(LABELS)).train()


@pytest.mark.parametrize("backend", GRAPHS)
def test_what_a_graph_cannot_do_is_refused(backend: str) -> None:
    with pytest.raises(ValueError, match=f"another precision than fp16 for backend='{backend}'"):
        run(small_model(), dataset_of([0]), backend=backend, precision="fp16")
    with pytest.raises(ValueError, match=r"a model in float32, not torch\.bfloat16"):
        run(small_model().bfloat16(), dataset_of([0]), backend=backend)
