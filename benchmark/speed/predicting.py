"""From picture files to a table of answers: `hf-knn predict` against features alone.

One file in fifty is broken. Both run as a program of their own, alternately, with the same backend.
The command is also stopped in the middle and goes on, and some pictures are answered one by one.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from harness import report, timings_of
from jpegs import jpeg_folder
from rich.progress import track

sys.path.append(str(Path(__file__).parents[1]))  # benchmark/, where the catalog lies

from catalog.backbones import build_backbone
from hf_knn import KnnForImageClassification, extract_features
from hf_knn.data import load_splits

PEER, OURS = "extract_features", "hf-knn predict"
_BROKEN_EVERY, _KEPT_BYTES = 50, 200

_MODEL_OF = "import sys; sys.path[:0] = sys.argv[1:2]; import predicting; predicting.encode()"
"""The peer: this file in a process of its own."""


def encode() -> None:
    """Opens the checkpoint and encodes a folder, as the arguments say."""
    checkpoint, folder, backend = sys.argv[2:]
    model = KnnForImageClassification.from_pretrained(checkpoint)
    pictures = load_splits(folder)["train"]
    features = extract_features(
        model, pictures, backend=backend, on_bad_image="skip", use_cache=False, progress=False
    )
    print(len(features.features))


def main(
    pictures: Annotated[int, typer.Option(help="JPEG files.")] = 5000,
    stored: Annotated[int, typer.Option(help="Pictures that the checkpoint remembers.")] = 500,
    backend: Annotated[str, typer.Option(help="torch, onnx or openvino.")] = "onnx",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 3,
    output: Annotated[Path, typer.Option(help="JSON file.")] = Path("outputs/speed/predict.json"),
) -> None:
    """Time both alternately, stop the command once, and compare answers."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        inbox, checkpoint = folder / "inbox", folder / "model"
        files = _inbox(inbox, pictures)
        _train(checkpoint, stored)

        def predict(place: Path, *sources: Path) -> float:
            return _seconds(_command(checkpoint, backend, place, sources))

        here = str(Path(__file__).parent)
        peer = [sys.executable, "-c", _MODEL_OF, here, str(checkpoint), str(inbox), backend]
        start = predict(folder / "one.csv", files[1])  # also exports the graph
        start = min(start, predict(folder / "two.csv", files[1]))
        seconds: dict[str, list[float]] = {PEER: [], OURS: []}
        for number in range(rounds):
            seconds[PEER].append(_seconds(peer))
            seconds[OURS].append(predict(folder / f"all-{number}.csv", inbox))
        wanted = _read(folder / "all-0.csv")
        place = folder / "stopped.csv"
        kept = _stopped(_command(checkpoint, backend, place, [inbox]), place, len(files) // 3)
        predict(place, inbox)
        some = [path for number, path in enumerate(files) if number % _BROKEN_EVERY][
            :: pictures // 20
        ]
        alone = []
        for number, path in enumerate(track(some, "One by one")):
            predict(folder / f"alone-{number}.csv", path)
            alone += _read(folder / f"alone-{number}.csv")
        facts: dict[str, Any] = {
            "backend": backend,
            "files": len(files),
            "rows": len(wanted),
            "rows with an error": sum(bool(row["error"]) for row in wanted),
            "pictures per second": {
                name: len(files) / median(each) for name, each in seconds.items()
            },
            "seconds of one picture, with the start": start,
            "answers kept when it was killed": kept,
            "equal after going on": _read(place) == wanted,
            "equal one by one": _equal(alone, wanted),
            "one by one": len(alone),
        }
        print(json.dumps(facts, indent=2))
        title = f"{len(files)} JPEG files of 500 x 375, one in {_BROKEN_EVERY} broken"
        report(title, timings_of(seconds, PEER), PEER, output, **facts)


def _inbox(folder: Path, pictures: int) -> list[Path]:
    """JPEG files, some of which end after a few bytes."""
    shutil.copytree(jpeg_folder(pictures, seed=1), folder)
    files = sorted(folder.rglob("*.jpg"))
    for path in files[::_BROKEN_EVERY]:
        path.write_bytes(path.read_bytes()[:_KEPT_BYTES])
    return files


def _train(checkpoint: Path, stored: int) -> None:
    arguments = ["train", str(jpeg_folder(stored)), "--backbone"]
    arguments += [str(build_backbone("efficientnet-lite0")), "-o", str(checkpoint)]
    _seconds([sys.executable, "-m", "hf_knn_cli", *arguments])


def _command(checkpoint: Path, backend: str, place: Path, sources: Sequence[Path]) -> list[str]:
    arguments = ["predict", str(checkpoint), *map(str, sources), "-o", str(place)]
    return [sys.executable, "-m", "hf_knn_cli", *arguments, "--backend", backend]


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return time.perf_counter() - started


def _stopped(command: list[str], place: Path, wanted: int) -> int:
    """Kills the command once so many answers are kept; how many there are then."""
    journal = place.with_name(place.name + ".unfinished")
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while child.poll() is None and _lines(journal) <= wanted:
            time.sleep(0.1)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    if place.exists():
        raise RuntimeError("Expected the command to be killed before its end, but it was done.")
    return _lines(journal) - 1  # the first line says what the run is


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file)]


def _equal(alone: list[dict[str, str]], wanted: list[dict[str, str]]) -> int:
    """How many answers name the same class and the same neighbours."""
    by_path = {row["path"]: row for row in wanted}
    names = ("answer", "nearest_ids")
    return sum(all(row[name] == by_path[row["path"]][name] for name in names) for row in alone)


if __name__ == "__main__":
    typer.run(main)
