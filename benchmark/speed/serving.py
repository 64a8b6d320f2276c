"""What a server gains by answering requests together: `hf-knn serve` beside itself, one by one.

Two servers of the same checkpoint, each a process of its own; one of them takes batches of one
(`--batch-size 1`). The same 64 clients ask them by turns for the same mix: mostly /predict, some
/explain, /teach, /forget and /health. Clients and servers share the cores of this machine.
"""

import http.client
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NamedTuple

sys.path.append(str(Path(__file__).parents[1]))  # benchmark/, where the catalog lies

import numpy as np
import torch
import typer
from harness import report, timings_of
from PIL import Image

from catalog.backbones import build_backbone
from hf_knn import Datastore, KnnForImageClassification

TOGETHER, ALONE = "hf-knn serve", "hf-knn serve --batch-size 1"
TOKEN = "a-token-of-the-benchmark"
_MIX = ("/predict",) * 54 + ("/explain",) * 6 + ("/health",) * 2 + ("/teach", "/forget")
"""Of 64 requests."""


class Answered(NamedTuple):
    """What one client got.

    Attributes:
        kinds: how often each path was answered with which status.
        seconds: that each answer took.
    """

    kinds: Counter[tuple[str, int]]
    seconds: list[float]


def make_checkpoint(folder: Path, rows: int) -> None:
    """EfficientNet-Lite0 with random rows, which cost as much to search as others."""
    labels = [f"class {n}" for n in range(20)]
    model = KnnForImageClassification.from_backbone(build_backbone("efficientnet-lite0"), labels)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, model.config.feature_dim, generator=generator)
    numbers = torch.randint(len(labels), (rows,), generator=generator)
    model.datastore = Datastore.from_features(features, numbers)
    model.save_pretrained(folder)


def photos(count: int) -> list[bytes]:
    """JPEG files of 500 x 375: smooth colours with grain."""
    generator, found = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.int16)
        grain = generator.integers(-12, 13, (375, 500, 1), dtype=np.int16)
        buffer = io.BytesIO()
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG")
        found.append(buffer.getvalue())
    return found


def start(folder: Path, port: int, *options: str) -> "subprocess.Popen[str]":
    """A server that answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_knn_cli", "serve", str(folder), "--port", str(port), *options],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_KNN_TOKEN": TOKEN},
    )  # fmt: skip
    assert process.stdout is not None
    if not any("Ctrl-C ends it." in line for line in process.stdout):
        raise RuntimeError("Expected the server to start, but it ended.")
    return process


def form(picture: bytes, label: str | None) -> tuple[bytes, dict[str, str]]:
    """A body of multipart, and its headers."""
    mark = uuid.uuid4().hex
    head = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
    body = head.encode() + picture + b"\r\n"
    if label is not None:
        body += f'--{mark}\r\nContent-Disposition: form-data; name="label"\r\n\r\n'.encode()
        body += label.encode() + b"\r\n"
    kind = f"multipart/form-data; boundary={mark}"
    return body + f"--{mark}--\r\n".encode(), {"Content-Type": kind}


def ask(port: int, number: int, count: int, pictures: list[bytes], found: Answered) -> None:
    """One client: its requests one after the other, over one connection."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    taught: list[int] = []
    for turn in range(count):
        path = _MIX[(7 * number + turn) % len(_MIX)]
        if path == "/forget" and not taught:
            path = "/predict"
        picture = pictures[(number + turn) % len(pictures)]
        started = time.perf_counter()
        if path == "/health":
            line.request("GET", path)
        elif path == "/forget":
            body = json.dumps({"ids": taught})
            line.request("POST", path, body, bearer | {"Content-Type": "application/json"})
        else:
            sent, headers = form(picture, "new" if path == "/teach" else None)
            line.request("POST", path, sent, headers | bearer)
        answer = line.getresponse()
        text = answer.read()
        found.seconds.append(time.perf_counter() - started)
        found.kinds[path, answer.status] += 1
        if answer.status == 200 and path in ("/teach", "/forget"):
            taught = json.loads(text)["ids"] if path == "/teach" else []
    line.close()


def load(port: int, clients: int, count: int, pictures: list[bytes]) -> tuple[float, Answered]:
    """Seconds until all clients are done, and what they got."""
    found = [Answered(Counter(), []) for _ in range(clients)]
    threads = [
        threading.Thread(target=ask, args=(port, n, count, pictures, found[n]))
        for n in range(clients)
    ]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    kinds: Counter[tuple[str, int]] = Counter()
    for each in found:
        kinds.update(each.kinds)
    return seconds, Answered(kinds, [second for each in found for second in each.seconds])


def main(
    clients: Annotated[int, typer.Option(min=1, help="At a time.")] = 64,
    requests: Annotated[int, typer.Option(min=1, help="Of each client, per round.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="By turns.")] = 3,
    rows: Annotated[int, typer.Option(min=50, help="Of the datastore.")] = 2000,
    port: Annotated[int, typer.Option(help="The first of two.")] = 18_500,
    output: Annotated[Path, typer.Option(help="JSON file.")] = Path("outputs/speed/serving.json"),
) -> None:
    """Ask two servers by turns."""
    options = {TOGETHER: (), ALONE: ("--batch-size", "1")}
    ports = dict(zip(options, (port, port + 1), strict=True))
    pictures = photos(32)
    seconds: dict[str, list[float]] = {name: [] for name in options}
    kinds = {name: Counter[tuple[str, int]]() for name in options}
    waits: dict[str, list[float]] = {name: [] for name in options}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        make_checkpoint(Path(scratch) / "model", rows)
        for name, given in options.items():
            folder = Path(
                shutil.copytree(Path(scratch) / "model", Path(scratch) / str(ports[name]))
            )
            process = start(folder, ports[name], *given)
            stack.callback(process.wait)
            stack.callback(process.send_signal, signal.SIGTERM)
            load(ports[name], 4, 2, pictures)
        for _ in range(rounds):
            for name in options:
                took, answered = load(ports[name], clients, requests, pictures)
                seconds[name].append(took)
                kinds[name] += answered.kinds
                waits[name] += answered.seconds
    errors = {
        name: sum(count for (_, status), count in found.items() if status != 200)
        for name, found in kinds.items()
    }
    facts: dict[str, Any] = {
        "clients": clients, "requests": clients * requests, "rows": rows, "errors": errors,
        "kinds": {n: {f"{p} {s}": c for (p, s), c in k.items()} for n, k in kinds.items()},
        "median_wait": {name: float(np.median(each)) for name, each in waits.items()},
        "per_second": {n: clients * requests / float(np.median(s)) for n, s in seconds.items()},
    }  # fmt: skip
    title = f"{clients} clients, {clients * requests} mixed requests, {rows:,} rows, torch"
    report(title, timings_of(seconds, ALONE), ALONE, output, **facts)
    print(json.dumps({name: facts[name] for name in ("errors", "per_second", "median_wait")}))


if __name__ == "__main__":
    typer.run(main)
