"""The README's first example runs as written, with a local backbone in place of the Hub's."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor, ViTModel

README = Path(__file__).parent.parent / "README.md"


def first_example() -> str:
    found = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found.group(1)


def test_the_example_is_in_the_first_screen_and_short():
    text = README.read_text(encoding="utf-8")
    before = text[: text.index("```python")].count("\n")
    assert before < 25
    code = [line for line in first_example().splitlines() if line and "import" not in line]
    assert len(code) <= 12


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for label, low in {"cat": 0, "dog": 120}.items():
        (tmp_path / "my-pictures" / label).mkdir(parents=True)
        for i in range(12):
            pixels = generator.integers(low, low + 100, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "my-pictures" / label / f"{i}.jpg")
    Image.fromarray(pixels).save("cat.jpg")
    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    ViTModel(config).save_pretrained("backbone")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained("backbone")
    code = first_example()
    assert code.count('"facebook/dinov2-small"') == 1
    exec(code.replace("facebook/dinov2-small", "./backbone"), {})
    said = capsys.readouterr().out
    assert "eval_blend_top1" in said
    assert said.count("'score'") == 2
    assert (tmp_path / "knn-model" / "datastore.json").is_file()


@pytest.mark.parametrize("word", ["make quickstart", "make test"])
def test_the_two_commands_are_named(word):
    assert word in README.read_text(encoding="utf-8")
