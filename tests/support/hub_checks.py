"""What the tests of the Hub look for in a repository."""

import json
from typing import Any

import torch

from hf_knn.model.code import CODE_NAMES
from support.hub_server import Hub
from support.tiny import pixels

REPO = "org/knn-vit"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def assert_whole(hub: Hub, repo: str = REPO, revision: str = "main") -> dict[str, bytes]:
    """All parts are there, nothing of another version, no pickle."""
    files = hub.files(repo, revision)
    manifest = json.loads(files["datastore.json"])
    blobs = {name for name in files if name.startswith("datastore-")}
    assert blobs == {blob["name"] for blob in manifest["blobs"]}
    wanted = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    assert wanted | set(CODE_NAMES) <= files.keys()
    assert {name for name in files if name.endswith(".py")} == set(CODE_NAMES)
    assert [name for name in files if name.endswith(PICKLES)] == []
    assert [name for name in files if name.startswith((".", "_"))] == [".gitattributes"]
    return files


def assert_answers_alike(found: Any, wanted: Any) -> None:
    with torch.no_grad():
        pair = [m.eval()(pixel_values=pixels(3, seed=4)).logits for m in (found, wanted)]
    assert torch.equal(*pair)
