"""What is missing is said before the work, and what ends a command ends all of it."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from importlib import util
from pathlib import Path
from typing import Any

import pytest
from support.commands import as_checkpoint, hf_knn, save_backbone
from support.pictures import write_folder
from support.tiny import tiny_model

from hf_knn.commands import console as shared
from hf_knn.commands.console import Terminal

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A checkpoint that cannot be opened, a backbone that cannot either, and pictures."""
    as_checkpoint(tmp_path / "model")
    (tmp_path / "pics" / "cat").mkdir(parents=True)
    (tmp_path / "pics" / "cat" / "1.png").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "module", "said"),
    [
        ("export {model} --onnx {new}", "onnxscript", r"The export needs onnxscript; .*\[export\]"),
        ("tune {model} {pics} --plot {new}.png", "matplotlib", "Drawing needs matplotlib"),
        ("train {pics} --backbone {model} --show-neighbors", "matplotlib", "Drawing needs"),
        ("demo {model}", "gradio", r"hf-knn demo needs gradio; .*\[space\]"),
        ("milvus {model} --uri x.db --collection c", "pymilvus", r"needs pymilvus; .*\[milvus\]"),
        ("milvus {model} --uri x.db --collection c", "milvus_lite", "needs milvus-lite"),
        ("train {pics} --backbone {model} --backend onnx", "onnxruntime", r"\[onnx\]"),
        ("evaluate {model} {pics} --backend openvino", "openvino", r"\[openvino\]"),
        ("teach {model} {pics} --backend openvino", "openvino", r"\[openvino\]"),
        ("doctor {pics} --backbone {model} --backend onnx", "onnxruntime", r"\[onnx\]"),
    ],
)
def test_a_package_that_is_missing_is_named_before_a_model_is_opened(
    typed: str, module: str, said: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = util.find_spec

    def without(name: str, *given: Any) -> Any:
        return None if name == module else (real(name, *given) or object())

    monkeypatch.setattr("hf_knn.store.advice.find_spec", without)
    monkeypatch.setattr("hf_knn.features.backends.find_spec", without)
    names = {name: place / name for name in ("model", "pics", "new")}
    done = hf_knn(*typed.format(**names).split())
    assert done.exit_code == 1, done.output
    assert re.search(rf"^Error: .*{said}.*pip install|^Error: .*{said}", done.stderr), done.stderr
    assert "pip install" in done.stderr
    assert done.stdout == ""  # nothing was read or opened


def test_a_backend_of_the_environment_is_checked_too(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_KNN_BACKEND", "tensorrt")
    done = hf_knn("evaluate", place / "model", place / "pics")
    assert done.exit_code == 1
    assert "but got 'tensorrt'" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--report-to", "nonsense"], "--report-to to be one of"),
        (["--report-to", "neptune"], "--report-to neptune needs a package"),
        (["--max-memory", "2XB"], "2XB"),
        (["--index", "IVF4,Flat"], "--index IVF4,Flat needs it"),
    ],
)
def test_values_are_looked_at_before_pictures(
    options: list[str], said: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_knn.store.faiss.has_faiss", lambda: False)
    done = hf_knn("train", place / "pics", "--backbone", place / "model", *options)
    assert done.exit_code == 1
    assert said in done.stderr
    assert done.stdout == ""


def test_a_split_that_is_not_there_is_not_replaced_by_another(tmp_path: Path) -> None:
    pictures = write_folder(tmp_path / "pics", {"ant": 2})
    tiny_model("vit").save_pretrained(tmp_path / "model")
    done = hf_knn("evaluate", tmp_path / "model", pictures, "--split", "tset")
    assert done.exit_code == 1
    assert "Expected a split 'tset'" in done.stderr


def test_a_reader_that_goes_away_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `hf-knn train … | head -1`: what is printed later is nobody's, the model is."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    let_go: list[object] = []
    monkeypatch.setattr(shared, "let_go", let_go.append)
    console = Terminal()
    console.file = Gone()
    console.print("the first line that nobody reads")
    console.print("the second")
    assert len(let_go) == 1


def command(*words: object, **variables: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'space'}"} | variables
    return subprocess.Popen(
        [sys.executable, "-m", "hf_knn_cli", *map(str, words)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_help_for_a_reader_of_one_line_in_an_old_encoding() -> None:
    with command("train", "--help", PYTHONIOENCODING="ascii", PYTHONUTF8="0") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as asked:
        asked.settimeout(5)
        return asked.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_a_killed_demo_leaves_no_server(tmp_path: Path, port: int) -> None:
    """The server is in the process that is killed: there is no child to be forgotten."""
    pictures = write_folder(tmp_path / "pics", {"ant": 3, "bee": 3})
    backbone = save_backbone(tmp_path / "backbone")
    model = tmp_path / "model"
    done = hf_knn("train", pictures, "--backbone", backbone, "-o", model, "--epochs", 1)
    assert done.exit_code == 0, done.output
    with command("demo", model, "--port", port) as process:
        try:
            deadline = time.monotonic() + 200
            while not answers(port):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.2)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            if children.exists():
                assert children.read_text() == ""
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) != 0
            assert not answers(port)
        finally:
            process.kill()
