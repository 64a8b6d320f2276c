"""One ONNX graph that answers as the model does, and the script beside it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny import LABELS, pixels, tiny_model
from transformers import BitImageProcessor, ViTImageProcessor

from hf_knn import KnnForImageClassification
from hf_knn.data import decode_image
from hf_knn.model.export import (
    _SCRIPT,
    GRAPH_NAME,
    OUTPUTS,
    SCRIPT_NAME,
    _settings,
    export_onnx,
)

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")


def answers(folder: Path, images: torch.Tensor) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(folder / GRAPH_NAME))
    return dict(zip(OUTPUTS, session.run(None, {"pixel_values": images.numpy()}), strict=True))


def assert_alike(folder: Path, model: KnnForImageClassification, images: torch.Tensor) -> None:
    found = answers(folder, images)
    with torch.inference_mode():
        wanted = model(pixel_values=images, return_neighbors=True)
    likely = wanted.logits.numpy() > np.log(1e-6)
    assert np.abs(found["log_probs"] - wanted.logits.numpy())[likely].max() < 1e-3
    assert (found["log_probs"].argmax(1) == wanted.logits.numpy().argmax(1)).all()
    np.testing.assert_allclose(found["head_logits"], wanted.head_logits, atol=1e-4)
    np.testing.assert_array_equal(found["neighbor_ids"], wanted.neighbors.ids)
    np.testing.assert_allclose(found["similarities"], wanted.neighbors.similarities, atol=1e-4)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, KnnForImageClassification]:
    model = tiny_model("vit", k=7)
    folder = tmp_path_factory.mktemp("onnx") / "out"
    exported = export_onnx(model, folder)
    assert exported.largest_gap < 1e-3
    assert exported.rows == 40
    return folder, model


@pytest.mark.parametrize("count", [1, 3, 17])
def test_any_number_of_pictures(count: int, vit: Any) -> None:
    folder, model = vit
    assert_alike(folder, model, pixels(count, seed=count))


VARIANTS: list[dict[str, Any]] = [
    {"family": "resnet", "knn_pooling": "max", "knn_weighting": "rank"},
    {"metric": "l2", "normalization": "none", "knn_weighting": "uniform", "k": 3},
    {"normalization": "l2", "head": "mlp", "blend_temperature": 1.7, "knn_weight": 1.0, "k": 100},
]


@pytest.mark.parametrize(
    "options", [VARIANTS[0], *(pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS[1:])],
    ids=str,
)  # fmt: skip
def test_other_models(options: dict[str, Any], tmp_path: Path) -> None:
    values = dict(options)
    model = tiny_model(values.pop("family", "vit"), **values)
    export_onnx(model, tmp_path / "out")
    assert_alike(tmp_path / "out", model, pixels(5, seed=3))


def test_equal_rows_come_in_the_order_of_their_ids(tmp_path: Path) -> None:
    model = tiny_model("vit", k=9)
    store = model.datastore
    assert store is not None
    rows = store.features[:1].float().repeat(12, 1)
    store.add(rows, torch.arange(12) % 4, torch.arange(10**6, 10**6 - 12, -1))
    export_onnx(model, tmp_path / "out")
    assert_alike(tmp_path / "out", model, pixels(4, seed=6))


def test_a_class_taught_later_keeps_its_votes(tmp_path: Path) -> None:
    model = tiny_model("vit", num_head_labels=3)
    export_onnx(model, tmp_path / "out")
    assert_alike(tmp_path / "out", model, pixels(8, seed=2))


def test_a_class_taught_to_a_ridge_head_keeps_its_votes(tmp_path: Path) -> None:
    model = tiny_model("vit", head="ridge", knn_weight=0.3)
    model.config.head_regularizer = 1.0
    taught = model(pixel_values=pixels(3, seed=9)).pooler_output.detach()
    model.teach(features=taught, labels=["elk"] * 3)
    assert model.config.blended_classes < model.config.classes
    export_onnx(model, tmp_path / "out")
    images = pixels(8, seed=9)
    assert_alike(tmp_path / "out", model, images)
    found = answers(tmp_path / "out", images)["log_probs"]
    assert found[:3].argmax(1).tolist() == [model.config.class_names.index("elk")] * 3


def test_the_script_answers_as_the_pipeline_does(vit: Any, tmp_path: Path) -> None:
    folder, model = vit
    generator = np.random.default_rng(0)
    paths = []
    for number, shape in enumerate([(32, 32, 3), (50, 40, 3)]):
        image = Image.fromarray(generator.integers(0, 256, shape, np.uint8))
        paths.append(tmp_path / f"{number}.png")
        image.save(paths[-1])
    blocked = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
    blocked += f"sys.argv = ['classify.py', *{[str(path) for path in paths]!r}]\n"
    script = (folder / SCRIPT_NAME).read_text()
    (tmp_path / "run.py").write_text(
        blocked + f"__file__ = {str(folder / SCRIPT_NAME)!r}\n" + f"exec({script!r})"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "run.py")], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    for place, path in enumerate(paths):
        inputs = model.image_processor(images=[Image.open(path)], return_tensors="pt")
        with torch.inference_mode():
            wanted = model(pixel_values=inputs["pixel_values"]).logits[0].exp()
        name, best, *_ = lines[2 * place]
        assert name == str(path)
        label, share = best.rsplit(" ", 1)
        assert label == LABELS[int(wanted.argmax())]
        assert float(share.rstrip("%")) == pytest.approx(100 * float(wanted.max()), abs=0.6)
    assert len(script.splitlines()) < 200


def kinds_of_pictures(folder: Path) -> list[Path]:
    """Pictures, not noise, of every kind whose pixels could be read in several ways."""
    x, y = np.meshgrid(np.linspace(0, 255, 90), np.linspace(0, 255, 60))
    scene = Image.fromarray(np.stack([x, y, np.where(x > y, 220, 30)], -1).astype(np.uint8))
    glass = scene.copy()
    glass.putalpha(Image.fromarray(x.astype(np.uint8)))
    palette = scene.quantize(16)
    turned = Image.Exif()
    turned[0x0112] = 6
    grey = (x * 257).astype(np.uint16)
    made: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("plain.png", scene, {}), ("alpha.png", glass, {}), ("alpha.webp", glass, {}),
        ("palette.png", palette, {"transparency": 3}), ("grey alpha.png", glass.convert("LA"), {}),
        ("16.png", Image.fromarray(grey), {}), ("16.tif", Image.fromarray(grey), {}),
        ("float.tif", Image.fromarray((x / 255).astype(np.float32)), {}),
        ("32.tif", Image.fromarray(grey.astype(np.int32)), {}),
        ("turned.jpg", scene, {"exif": turned}), ("ink.jpg", scene.convert("CMYK"), {}),
        ("ink.tif", scene.convert("CMYK"), {}), ("bit.png", scene.convert("1"), {}),
        ("frames.gif", scene, {"save_all": True, "append_images": [scene.rotate(90)]}),
        ("pages.tif", scene, {"save_all": True, "append_images": [scene.rotate(90)]}),
        ("web.avif", glass, {}), ("wide.jpg", scene.resize((333, 51)), {}),
    ]  # fmt: skip
    for name, image, options in made:
        image.save(folder / name, **options)
    return [folder / name for name, _, _ in made]


@pytest.mark.parametrize("crop", [False, True])
def test_the_script_reads_the_pixels_that_the_library_reads(crop: bool, tmp_path: Path) -> None:
    kind = BitImageProcessor if crop else ViTImageProcessor
    size = {"shortest_edge": 36} if crop else {"height": 32, "width": 32}
    model = tiny_model("vit")
    model.image_processor = kind(size=size, crop_size={"height": 32, "width": 32})
    settings = _settings(model)
    assert settings["height"] == 32
    (tmp_path / "model.json").write_text(json.dumps(settings))
    script = ModuleType("classify")
    script.__file__ = str(tmp_path / "classify.py")
    exec(compile(_SCRIPT, script.__file__, "exec"), vars(script))
    before = Image.MAX_IMAGE_PIXELS
    steps = 1.5 / 255 / min(settings["std"])  # resizing rounds in another way
    for path in kinds_of_pictures(tmp_path):
        images = [decode_image(path)]
        wanted = model.image_processor(images=images, return_tensors="pt")["pixel_values"][0]
        assert np.abs(script.load(path) - wanted.numpy()).max() < steps, path.name
    Image.MAX_IMAGE_PIXELS = before


def test_what_cannot_be_exported_is_refused_with_a_reason(tmp_path: Path) -> None:
    cases: list[tuple[KnnForImageClassification, str]] = [
        (tiny_model("vit", knn_weighting="inverse_distance"), "zero distances all the weight"),
        (tiny_model("vit").bfloat16(), "in float32"),
    ]
    without = tiny_model("vit")
    without.datastore = None
    cases.append((without, "with a datastore"))
    padded = tiny_model("vit")
    padded.image_processor = None
    cases.append((padded, "that resizes, crops and normalises"))
    for model, reason in cases:
        with pytest.raises(ValueError, match=reason):
            export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    import hf_knn_cli

    tiny_model("resnet").save_pretrained(tmp_path / "model")
    command = ["export", str(tmp_path / "model"), "--onnx", str(tmp_path / "out")]
    done = CliRunner(env={"COLUMNS": "200"}).invoke(hf_knn_cli.app, command)
    assert done.exit_code == 0, done.stderr
    assert "with 40 rows" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.onnx", "model.json", "classify.py"
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "model.json").read_text())["labels"] == LABELS
