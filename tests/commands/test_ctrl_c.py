"""Ctrl-C in processes of their own, at several moments of each long command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import hf_knn, save_backbone

from hf_knn import KnnForImageClassification

ROOT = Path(__file__).parents[2]
LONGEST = 240.0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two classes, a backbone that takes its time, and a checkpoint."""
    folder = tmp_path_factory.mktemp("ctrl-c")
    generator = np.random.default_rng(0)
    for number in range(400):
        pixels = generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        path = folder / "pics" / ("ant", "bee")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    save_backbone(folder / "backbone", patch_size=2, layers=6)
    done = hf_knn("train", folder / "pics", "--backbone", folder / "backbone", "-o",
                  folder / "model", "--head", "ridge")  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder


COMMANDS = {
    "train": ("train pics --backbone backbone -o new", "new was not made yet."),
    "fine-tune": ("train pics --backbone backbone -o tuned --fine-tune --epochs 50", "--resume"),
    "predict": ("predict model pics -o answers.csv", "To go on, or to begin again: "),
    "evaluate": ("evaluate model pics --report report", "To go on, or to begin again: "),
    "doctor": ("doctor pics --backbone backbone", "To go on, or to begin again: "),
    "teach": ("teach model pics --again", "model "),
}


def stopped(words: str, place: Path, cache: Path, moment: str, seconds: float) -> tuple[int, str]:
    """The exit code and what was said of a command that is stopped some time after a moment."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_KNN_CACHE": str(cache)}
    output = cache / "stdout.txt"
    with output.open("w") as out, subprocess.Popen(
        [sys.executable, "-u", "-m", "hf_knn_cli", *words.split()], cwd=place, env=environment,
        stdout=out, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        maps, deadline = Path(f"/proc/{process.pid}/maps"), time.monotonic() + LONGEST

        def has_come() -> bool:
            if moment == "import":
                return maps.exists() and "libtorch_cpu" in maps.read_text()
            return bool(output.read_text().strip())

        while process.poll() is None and not has_come() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=LONGEST)
    return process.returncode, said


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_ends_with_a_sentence_and_nothing_half_done(
    name: str, place: Path, tmp_path: Path
) -> None:
    words, kept = COMMANDS[name]
    said = ""
    for number, (moment, seconds) in enumerate(
        [("import", 0.0), ("import", 0.5), ("output", 0.0), ("output", 0.7), ("output", 2.0)]
    ):
        cache = tmp_path / str(number)
        cache.mkdir()
        code, said = stopped(words, place, cache, moment, seconds)
        assert "Traceback" not in said, said
        if code == 0:  # it was done by then
            break
        assert code == 130, said
        assert "Stopped" in said
        assert words in said.replace("\n", " ")
        if moment == "output" and name not in ("fine-tune",):
            assert kept in said
    model = KnnForImageClassification.from_pretrained(place / "model")
    assert (len(model.datastore) - 320) % 400 == 0  # a teach is whole or not at all
    assert not list(place.glob(".*model*"))
