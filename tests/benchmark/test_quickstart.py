"""The offline benchmark end to end, on a slice of it."""

import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import resvg_py
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

import hf_knn

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmark" / "run.py"


def run_here(arguments: Sequence[str]) -> str:
    """Runs the script in this process, which has all imports, on pictures that are drawn small."""
    draw = resvg_py.svg_to_bytes

    def draw_small(**options: Any) -> bytes:
        return draw(**options | {"width": 48, "height": 48})

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(resvg_py, "svg_to_bytes", draw_small)
        patch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
    assert not end.value.code
    return said.getvalue()


def run_as_typed(arguments: Sequence[str]) -> str:
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(
    scope="module", params=[run_here, pytest.param(run_as_typed, marks=pytest.mark.slow)]
)
def finished(request, tmp_path_factory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("quickstart") / "results"
    cache = tmp_path_factory.mktemp("cache")
    arguments = ["--output", output, "--limit", 96, "--seeds", 2, "--epochs", 5]
    arguments += ["--scratch-epochs", 2, "--cache-dir", cache]
    return output, request.param(list(map(str, arguments)))


@pytest.mark.slow
def test_a_model_from_scratch_learns_the_digits(tmp_path):
    from study.experiments import run_from_scratch

    result = run_from_scratch("digits", "tiny-vit-digits", 1, 40, None, tmp_path, lambda said: None)
    (split,) = result.splits
    assert split.test["eval_head_top1"] > 0.93  # 0.48 on digits that are cropped and mirrored
    assert split.test["eval_blend_top1"] > 0.93


def test_it_prints_a_table_and_the_next_command(finished):
    _, said = finished
    assert "Top-1 on test" in said
    assert "Seconds per phase" in said
    assert "hf-knn predict" in said


def test_results_hold_every_split_with_provenance(finished):
    output, _ = finished
    document = json.loads((output / "results.json").read_text())
    assert document["provenance"]["versions"]["torch"]
    openmoji, digits = document["tasks"]
    assert [split["seed"] for split in openmoji["splits"]] == [0, 1]
    for task in (openmoji, digits):
        for split in task["splits"]:
            assert sum(split["rows"].values()) <= 96
            assert {"eval_head_top1", "eval_knn_top1", "eval_blend_top1"} <= set(split["test"])
        values = [split["test"]["eval_blend_top1"] for split in task["splits"]]
        assert task["top1"]["blend"]["mean"] == pytest.approx(sum(values) / len(values))


def test_the_picture_is_a_picture_with_something_on_it(finished):
    output, _ = finished
    with Image.open(output / "neighbors.png") as image:
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(2**24) or []) > 50


def test_the_checkpoint_opens_and_answers(finished):
    output, _ = finished
    model = AutoModel.from_pretrained(output / "checkpoint")
    assert isinstance(model, hf_knn.KnnForImageClassification)
    processor = AutoImageProcessor.from_pretrained(output / "checkpoint")
    with Image.open(output / "query.png") as image:
        pixels = processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        logits = model(pixel_values=pixels).logits
    assert float(logits.exp().sum()) == pytest.approx(1, abs=1e-4)
