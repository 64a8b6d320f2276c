"""Downloads that go wrong, and repositories that mean harm."""

import copy
import json
import os
import pickle
import random
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from support.hub_checks import REPO, assert_answers_alike
from support.hub_server import LFS_BYTES, Fault, Hub
from support.tiny import pixels
from transformers import AutoModel

from hf_knn import KnnForImageClassification
from hf_knn.core.manifest import _checksum
from hf_knn.model.code import CODE_NAMES

KINDS = ("cut", "shorter", "longer", "garbage", "stall", "status")
CLEAR = (ValueError, RuntimeError, StrictDataclassError, SafetensorError)
"""What a user can be shown; anything else is a defect."""

STATUSES = (404, 412, 429, 500, 503)


def whole_answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(pixel_values=pixels(3, seed=4)).logits
    return logits


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client tries again as often as ever, but does not wait for seconds before it does."""
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        clock = types.SimpleNamespace(**vars(time))
        clock.sleep = lambda seconds: time.sleep(min(seconds, 0.02))
        monkeypatch.setattr(f"{module}.time", clock)


def files_asked_for(hub: Hub, cache: Path) -> list[str]:
    """Names of the files whose bytes an opener of the repository really fetches."""
    hub.requests.clear()
    KnnForImageClassification.from_pretrained(REPO, cache_dir=cache / "clean")
    asked = {request.rpartition("/")[2] for request in hub.requests if request.startswith("GET ")}
    return sorted(asked & set(hub.files(REPO)))


def try_faults(hub: Hub, model: Any, cache: Path, count: int, seed: int) -> tuple[int, int]:
    """Opens the repository under planted faults; each time an error, or the whole model.

    Each fault is planted where it is met: in a file that is fetched, and in an answer with a body
    where it changes the body.
    """
    generator = random.Random(seed)
    model.push_to_hub(REPO)
    wanted = whole_answer(model)
    errors = successes = 0
    names = files_asked_for(hub, cache)
    assert {"config.json", "model.safetensors", "datastore.json"} < set(names)
    for number in range(count):
        name = generator.choice(names)
        kind = generator.choice(KINDS)
        method = "(GET|HEAD)" if kind in ("stall", "status") else "GET"
        fault = Fault(
            kind, f"{method} .*/resolve/.*/{name}$", times=generator.choice((1, 2, -1)),
            status=generator.choice(STATUSES), seconds=2.5,
        )  # fmt: skip
        hub.faults[:] = [fault]
        place = cache / str(number)
        try:
            found = KnnForImageClassification.from_pretrained(REPO, cache_dir=place)
        except (OSError, *CLEAR):
            errors += 1
        else:
            # a fault may hit an optional file, or have been retried: then all of it is right
            assert torch.equal(whole_answer(found), wanted), (name, kind)
            assert found.datastore is not None
            assert len(found.datastore) == len(model.datastore)
            successes += 1
        assert fault.seen, f"nobody met {kind} in {name}"
        hub.faults.clear()
        found = KnnForImageClassification.from_pretrained(REPO, cache_dir=place)
        assert_answers_alike(found, model)
    return errors, successes


@pytest.mark.usefixtures("patient")
def test_a_faulty_download_is_an_error_or_a_whole_model(hub: Hub, model: Any, cache: Path) -> None:
    errors, successes = try_faults(hub, model, cache, 6, seed=1)
    assert errors + successes == 6


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("patient")
def test_60_faulty_downloads(hub: Hub, model: Any, cache: Path) -> None:
    errors, successes = try_faults(hub, model, cache, 60, seed=2)
    print(f"60 faulty downloads: {errors} errors, {successes} whole models")
    assert errors > 10
    assert successes > 10


# hostile repositories


class Marker:
    """A pickle that writes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (exec, (f"open({str(self.path)!r}, 'w').write('opened')",))


RUNNING = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class")
WATCH: dict[str, Any] = {"on": False, "allowed": (), "seen": []}


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not WATCH["on"]:
        return
    if event == "open" and isinstance(arguments[0], str) and "w" in str(arguments[1] or ""):
        if not arguments[0].startswith(WATCH["allowed"]):
            WATCH["seen"].append((event, arguments[0]))
    elif event in RUNNING:
        WATCH["seen"].append((event, str(arguments)))
    elif event == "socket.connect" and arguments[1][0] not in ("127.0.0.1",):
        WATCH["seen"].append((event, str(arguments[1])))


sys.addaudithook(_watch)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[list[Any]]:
    """What was written outside, run or connected to while a test ran."""
    WATCH["seen"].clear()
    WATCH["allowed"] = (str(tmp_path), "/dev/", os.environ["HF_HOME"])
    WATCH["on"] = True
    yield WATCH["seen"]
    WATCH["on"] = False


VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**63, 1e308, "", "../../evil", "/etc/passwd", "org/other", "a" * 5000,
    [], {}, [[]], {"a": {"b": 1}}, "<script>", "\x00", "nan", ["cls"], "https://example.com/x",
]  # fmt: skip


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON document."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from paths_in(value[key], (*path, key))
    elif isinstance(value, list):
        for place in range(len(value)):
            yield from paths_in(value[place], (*path, place))


def mutated(document: Any, generator: random.Random) -> Any:
    """A document with one to three values replaced, dropped or doubled in other types."""
    changed = json.loads(json.dumps(document))
    for _ in range(generator.randint(1, 3)):
        *parents, last = generator.choice(list(paths_in(changed)))
        inside = changed
        for step in parents:
            inside = inside[step]
        if generator.random() < 0.2:
            del inside[last]
        else:
            inside[last] = copy.deepcopy(generator.choice(VALUES))
        if not list(paths_in(changed)):
            break
    return changed


HARM = ("config", "manifest", "resealed", "index", "pickle", "code", "huge", "deep", "bytes")
INDEXES = ("OPQ16_64,IVF100,PQ16", "NSG64", "RQ8x16", "IMI2x14,Flat", "LSQ8x8", "IDMap," * 2000)


def hostile(files: dict[str, bytes], generator: random.Random, marker: Path) -> dict[str, bytes]:
    """A repository with one thing that is not as it should be."""
    changed = dict(files)
    kind = generator.choice(HARM)
    if kind == "config":
        config = mutated(json.loads(files["config.json"]), generator)
        changed["config.json"] = json.dumps(config).encode()
    elif kind in ("manifest", "resealed"):
        manifest = mutated(json.loads(files["datastore.json"]), generator)
        if kind == "resealed" and isinstance(manifest, dict):
            reseal(manifest)
        changed["datastore.json"] = json.dumps(manifest).encode()
    elif kind == "index":
        manifest = json.loads(files["datastore.json"])
        manifest["index"]["spec"] = manifest["index"]["requested"] = generator.choice(INDEXES)
        reseal(manifest)
        changed["datastore.json"] = json.dumps(manifest).encode()
    elif kind == "deep":
        name = generator.choice(sorted(name for name in changed if name.endswith(".json")))
        depth = generator.choice((500, 5000, 200_000))
        changed[name] = b'{"a":' * depth + b"0" + b"}" * depth
    elif kind == "pickle":
        payload = pickle.dumps(Marker(marker))
        name = generator.choice(("pytorch_model.bin", "model.safetensors", "training_args.bin"))
        if name == "pytorch_model.bin":
            changed.pop("model.safetensors")
        changed[name] = payload
    elif kind == "code":
        code = f"open({str(marker)!r}, 'w').write('run')\n".encode()
        for name in CODE_NAMES:
            changed[name] = code + changed[name]
        if generator.random() < 0.5:  # another file, and a configuration that names it
            changed["evil.py"] = code
            config = json.loads(files["config.json"])
            config["auto_map"] = dict.fromkeys(config["auto_map"], "evil.X")
            changed["config.json"] = json.dumps(config).encode()
    elif kind == "huge":
        name = generator.choice([n for n in changed if n.endswith(".safetensors")])
        content = bytearray(changed[name])
        content[:8] = (2 ** generator.choice((20, 40, 62))).to_bytes(8, "little")
        changed[name] = bytes(content)
    else:
        name = generator.choice(sorted(changed))
        content = bytearray(changed[name] or b"x")
        for _ in range(3):
            content[generator.randrange(len(content))] = generator.randrange(256)
        changed[name] = bytes(content)
    return changed


def reseal(manifest: dict[str, Any]) -> None:
    """The attacker knows how manifests are summed, too."""
    body = {name: value for name, value in manifest.items() if name != "checksum"}
    manifest["checksum"] = _checksum(body)


def try_hostile(
    hub: Hub, model: Any, folder: Path, watched: list[Any], count: int, seed: int
) -> tuple[int, int]:
    """Opens and asks hostile repositories; each time a typed error, or an answer; never code."""
    generator = random.Random(seed)
    model.push_to_hub(REPO)
    files = hub.files(REPO)
    marker = folder / "marker"
    refused = opened = 0
    for number in range(count):
        place = folder / f"repo-{number}"
        place.mkdir()
        for name, content in hostile(files, generator, marker).items():
            (place / name).write_bytes(content)
        watched.clear()
        for opener in (KnnForImageClassification, AutoModel):
            try:
                found = opener.from_pretrained(place)
                if opener is KnnForImageClassification:  # another class has no neighbours
                    probs = found(pixel_values=pixels(2, seed=9)).logits.exp()
                    assert probs.sum(dim=1).tolist() == pytest.approx([1, 1], abs=1e-4)
                opened += 1
            except RecursionError:
                if opener is not AutoModel:  # which reads config.json before any of ours is asked
                    raise
                refused += 1
            except (OSError, *CLEAR, TypeError, AttributeError, LookupError):
                refused += 1
        assert not marker.exists()
        assert watched == [], watched[:3]
        for path in sorted(place.iterdir(), reverse=True):
            path.unlink()
        place.rmdir()
    return refused, opened


def test_hostile_repositories_run_nothing(
    hub: Hub, model: Any, tmp_path: Path, watched: list[Any]
) -> None:
    refused, opened = try_hostile(hub, model, tmp_path, watched, 60, seed=3)
    assert refused > 20
    assert refused + opened == 120


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_2000_hostile_repositories(
    hub: Hub, model: Any, tmp_path: Path, watched: list[Any]
) -> None:
    refused, opened = try_hostile(hub, model, tmp_path, watched, 2000, seed=4)
    print(f"2,000 hostile repositories, opened twice: {refused} refused, {opened} opened")
    assert refused > 800
    assert opened > 800
    assert refused + opened == 4000


def test_the_watch_sees_what_it_should(tmp_path: Path, watched: list[Any]) -> None:
    outside = Path(tempfile.gettempdir()) / "hf-knn-outside"
    outside.write_text("x")
    outside.unlink()
    pickle.loads(pickle.dumps(Marker(tmp_path / "mark")))
    assert {event for event, _ in watched} >= {"open", "pickle.find_class"}
    assert (tmp_path / "mark").exists()


def test_files_of_the_server_are_large_enough_for_both_ways(hub: Hub, model: Any) -> None:
    model.push_to_hub(REPO)
    sizes = [len(content) for content in hub.files(REPO).values()]
    assert min(sizes) < LFS_BYTES < max(sizes)
