"""What travels is made from `hf_knn/core`, and nothing else can be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_knn.core.flatten import OUTPUTS, SOURCES, TARGET, flatten

CONFIG = '"""A configuration."""\n\n\nclass KnnConfig:\n    """Values."""\n'
MODEL = """\"\"\"A model.\"\"\"

import math

from .config import KnnConfig

LIMIT = 3
\"\"\"How much is too much.\"\"\"


class KnnForImageClassification:
    \"\"\"A model.\"\"\"

    def answer(self, config: "KnnConfig") -> float:
        \"\"\"The first paragraph.

        The second one.
        \"\"\"
        return math.sqrt(LIMIT)  # of course
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "model.py").write_text(MODEL)
    return tmp_path


def test_what_is_committed_is_what_the_sources_give() -> None:
    texts = flatten()
    assert sorted(texts) == sorted(f"{output.name}.py" for output in OUTPUTS)
    for name, text in texts.items():
        assert (TARGET / name).read_text(encoding="utf-8") == text, (
            "run `python -m hf_knn.core.flatten` and commit hf_knn/travels"
        )


def test_the_text_does_not_depend_on_the_order_of_sets() -> None:
    code = f"import runpy; print(runpy.run_path({str(SOURCES / 'flatten.py')!r})['flatten']())"
    said = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert "class KnnForImageClassification" in said[0]
    assert said[0] == said[1]


def test_two_files_with_what_is_needed(sources: Path) -> None:
    config, model = flatten(sources).values()
    assert "class KnnConfig" in config
    assert "class KnnConfig" not in model
    assert "from .configuration_hf_knn import (\n    KnnConfig\n)" in model
    assert 'LIMIT = 3\n"""How much is too much."""' in model
    assert "# of course" in model
    assert "The first paragraph." in model
    assert "The second one." not in model


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("from . import config", "from .name import X"),
        ("from .config import KnnConfig as C", "from .name import X"),
        ("from ..store import X", "from .name import X"),
        ("print(1)", "a definition or an import"),
        ("class KnnConfig:\n    pass", "one `KnnConfig`"),
        ("from cmath import sqrt as math", "one `math`"),
        ("def lonely():\n    pass", "lonely"),
        ("def math():\n    pass", "not both"),
    ],
)
def test_what_cannot_travel_is_refused(line: str, problem: str, sources: Path) -> None:
    (sources / "other.py").write_text(f'"""More."""\n\nimport math\n\n{line}\n')
    with pytest.raises((SyntaxError, NameError), match=problem):
        flatten(sources)


def test_a_module_without_a_docstring_is_refused(sources: Path) -> None:
    (sources / "other.py").write_text("LOST = 1\n")
    with pytest.raises(SyntaxError, match="begin with a docstring"):
        flatten(sources)


def test_a_docstring_that_looks_like_an_import_is_refused(sources: Path) -> None:
    """transformers finds imports by a regular expression, also in docstrings."""
    text = MODEL.replace("The first paragraph.", "Text.\n        from .nowhere import X")
    (sources / "model.py").write_text(text)
    with pytest.raises(SyntaxError, match="looks like an import"):
        flatten(sources)
