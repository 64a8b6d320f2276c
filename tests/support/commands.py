"""The commands of `hf-knn` as a user types them, in this process, and what they need."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import enable_progress_bars
from transformers import ViTConfig, ViTImageProcessor, ViTModel
from typer.testing import CliRunner, Result

import hf_knn_cli
from hf_knn.commands.console import console


def hf_knn(*arguments: object) -> Result:
    """Calls a command."""
    runner = CliRunner(env={"COLUMNS": "200"})
    return runner.invoke(hf_knn_cli.app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True, scope="module")
def wide_terminal() -> Iterator[None]:
    """So that rich does not break the lines that are looked for; and no setting outlives a test."""
    width = console.width
    console.width = 200
    yield
    console.width = width
    enable_progress_bars()


def save_backbone(folder: Path, patch_size: int = 8, layers: int = 1) -> Path:
    """A tiny vision transformer with its processor, of random weights."""
    config = ViTConfig(
        image_size=16, patch_size=patch_size, hidden_size=32, num_hidden_layers=layers,
        num_attention_heads=2, intermediate_size=64,
    )  # fmt: skip
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def as_checkpoint(folder: Path) -> Path:
    """What looks like a checkpoint to those who do not open it."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "hf_knn"}')
    (folder / "model.safetensors").touch()
    return folder
