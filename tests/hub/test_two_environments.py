"""Pushed from an environment with the package, opened in one that has transformers and torch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hub_checks import REPO
from support.hub_server import Hub
from support.tiny import pixels

ROOT = Path(__file__).parents[2]
STRANGER = f"""
from importlib.util import find_spec
assert find_spec("hf_knn") is None and find_spec("faiss") is None and find_spec("datasets") is None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification

torch.set_num_threads(1)
answers = {{}}
for opener in (AutoModel, AutoModelForImageClassification):
    model = opener.from_pretrained({REPO!r}, trust_remote_code=True).eval()
    with torch.no_grad():
        images = load_file("pixels.safetensors")["pixels"]
        answers[opener.__name__] = model(pixel_values=images).logits
save_file(answers, "answers.safetensors")
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_environment_without_the_package(hub: Hub, model: Any, tmp_path: Path) -> None:
    model.push_to_hub(REPO)
    save_file({"pixels": pixels(3, seed=4)}, tmp_path / "pixels.safetensors")
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    wanted = ["torch", "torchvision", "transformers", "pillow"]
    constraints = ["-c", str(ROOT / "constraints.txt")]
    subprocess.run([python, "-m", "pip", "install", "-q", *constraints, *wanted], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    done = subprocess.run(
        [python, "-c", STRANGER], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        expected = model(pixel_values=pixels(3, seed=4)).logits
    for name, logits in load_file(tmp_path / "answers.safetensors").items():
        assert torch.equal(logits, expected), name
