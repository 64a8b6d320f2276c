"""A kill in the middle of an extraction, and ten thousand malformed pictures."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import PIL
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageColumn
from PIL import Image
from support.pictures import WRITTEN_FORMATS, dataset_of, small_model

from hf_knn import extract_features
from hf_knn.data.decode import BadImageError, decode_image

pytestmark = pytest.mark.faults
ROWS, SHARD = 4000, 256
MALFORMED = 10_000
CHILD = f"""
import time, torch
from support.pictures import dataset_of, small_model
from hf_knn import extract_features
model = small_model()
model.backbone.register_forward_pre_hook(lambda *_: time.sleep(0.02))
extract_features(model, dataset_of([row % 3 for row in range({ROWS})]), progress=False)
"""


def test_a_kill_costs_one_shard_at_most(knn_cache: Path) -> None:
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    rows = dataset_of([row % 3 for row in range(ROWS)])
    truth = extract_features(small_model(), rows, use_cache=False, progress=False).features
    kept = 0
    for wanted in (2, 6, 11):
        child = subprocess.Popen([sys.executable, "-c", CHILD], env=environment)
        deadline = time.monotonic() + 120
        while len(list(knn_cache.rglob("shard-*.safetensors"))) < wanted:
            assert child.poll() is None, "it ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.wait()
        shards = len(list(knn_cache.rglob("shard-*.safetensors")))
        assert kept < shards < ROWS // SHARD
        kept = shards
    found = extract_features(small_model(), rows, progress=False)
    assert found.computed == ROWS - kept * SHARD  # what was in a file is not encoded again
    torch.testing.assert_close(found.features, truth, rtol=1e-5, atol=1e-5)
    assert extract_features(small_model(), rows, progress=False).computed == 0


def originals() -> dict[str, bytes]:
    """One small picture in every allowed format, and some variants of each."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((62, 48), Image.Resampling.BICUBIC)
    variants: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        kind: (image, kind, {}) for kind in WRITTEN_FORMATS
    }
    variants |= {
        "progressive": (image, "JPEG", {"progressive": True}),
        "grey": (image.convert("L"), "PNG", {}),
        "alpha": (image.convert("RGBA"), "PNG", {}),
        "palette": (image.convert("P"), "PNG", {}),
        "moving": (image.convert("P"), "GIF", {"save_all": True, "append_images": [image]}),
        "lossless": (image, "WEBP", {"lossless": True}),
        "cmyk": (image.convert("CMYK"), "JPEG", {}),
    }
    found = {}
    for name, (picture, kind, options) in variants.items():
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        found[name] = buffer.getvalue()
    return found


def mutated(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Damage of one kind: flips, cuts, runs, swaps, a wrong head, two files in one, a bomb."""
    place = chance.randrange(len(data))
    end = min(len(data), place + chance.randrange(1, 64))
    match chance.randrange(9):
        case 0:
            return data[:place]
        case 1:
            return (
                data[:place] + bytes(chance.randrange(256) for _ in range(end - place)) + data[end:]
            )
        case 2:
            return data[:place] + data[end:]
        case 3:
            return data[:place] + bytes(end - place) + data[end:]
        case 4:
            return data[:place] + b"\xff" * (end - place) + data[end:]
        case 5:
            return other[: chance.randrange(4, 40)] + data[chance.randrange(4, 40) :]
        case 6:
            return data[:place] + other
        case 7:
            return data[:place] + data[place:end] * 3 + data[end:]
        case _:
            head = bytearray(data)
            for spot in range(chance.randrange(4, 26), 30):  # where sizes are said
                head[spot % len(head)] = chance.choice((0, 0x7F, 0xFF))
            return bytes(head)


def assert_each_row_is_told(files: list[bytes], backend: str) -> int:
    """Features if and only if the decoder takes a row, else its reason; how many were bad."""
    reasons: dict[int, str] = {}
    for row, data in enumerate(files):
        try:
            image = decode_image(data)
        except BadImageError as error:
            reasons[row] = str(error)
        else:
            assert image.mode == "RGB"
            assert image.width * image.height <= 64e6
    kinds = Features({"image": ImageColumn(), "label": ClassLabel(names=["a", "b", "c"])})
    cells = [{"bytes": data, "path": f"{row}.jpg"} for row, data in enumerate(files)]
    rows = Dataset.from_dict({"image": cells, "label": [0] * len(cells)}, features=kinds)
    for _ in range(2):  # also from the cache
        found = extract_features(
            small_model(), rows, backend=backend, on_bad_image="skip", progress=False
        )
        assert {bad.row: bad.reason for bad in found.skipped} == reasons
        assert [bad.path for bad in found.skipped] == [f"{row}.jpg" for row in sorted(reasons)]
        assert sorted(found.ids.tolist() + list(reasons)) == list(range(len(files)))
        assert found.features.isfinite().all()
    return len(reasons)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_ten_thousand_malformed_pictures(backend: str) -> None:
    chance, known = random.Random(0), list(originals().values())
    files = [mutated(chance.choice(known), chance.choice(known), chance) for _ in range(MALFORMED)]
    assert MALFORMED / 4 < assert_each_row_is_told(files, backend) < MALFORMED


@pytest.fixture(scope="module")
def pictures_of_pillow(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Pillow's own test pictures, from its source distribution: odd, broken and hostile ones."""
    name = f"pillow-{PIL.__version__}.tar.gz"
    place = tmp_path_factory.mktemp("pillow") / name
    accept = {"Accept": "application/vnd.pypi.simple.v1+json"}
    try:
        with urlopen(
            Request("https://pypi.org/simple/pillow/", headers=accept), timeout=60
        ) as page:
            (url,) = (f["url"] for f in json.load(page)["files"] if f["filename"] == name)
        with urlopen(url, timeout=300) as answer, place.open("wb") as file:
            shutil.copyfileobj(answer, file)
    except OSError as error:
        pytest.skip(f"Pillow's source distribution could not be downloaded: {error}")
    found = []
    with tarfile.open(place) as archive:
        for member in archive:
            if member.isfile() and "/Tests/images/" in member.name:
                content = archive.extractfile(member)
                assert content is not None
                found.append(content.read())
    return found


def test_the_pictures_that_pillow_is_tested_with(pictures_of_pillow: list[bytes]) -> None:
    assert len(pictures_of_pillow) > 900
    bad = assert_each_row_is_told(pictures_of_pillow, "torch")
    assert 100 < bad < len(pictures_of_pillow) - 100
