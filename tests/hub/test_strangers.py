"""Somebody without the package, and the Hub: how many requests a load takes, and a push back."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import hf_knn
from support.golden import lay_out
from support.hub_checks import REPO
from support.hub_server import TOKEN, Hub
from support.stranger import make_site, run
from support.tiny import pixels

from hf_knn import KnnForImageClassification

MOST_REQUESTS = 20
LOAD = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

torch.set_num_threads(1)
repo, folder = sys.argv[1], Path(sys.argv[2])
model = AutoModelForImageClassification.from_pretrained(repo, trust_remote_code=True)
with torch.no_grad():
    logits = model(pixel_values=load_file(folder / "pixels.safetensors")["pixels"]).logits
save_file({"logits": logits}, folder / "logits.safetensors")
"""
PUSH = """
model.push_to_hub("org/given-back")
model.save_pretrained(
    folder / "saved", push_to_hub=True, repo_id="org/quiet", private=True, commit_message="hello",
)
"""
END = "print(json.dumps(type(model).__module__))"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_site(tmp_path_factory.mktemp("stranger") / "site")


def online() -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_ENDPOINT": os.environ["HF_ENDPOINT"]}


@pytest.mark.slow
def test_a_cold_load_takes_few_requests_and_a_stranger_pushes_back(
    hub: Hub, model: Any, site: Path, tmp_path: Path
) -> None:
    model.push_to_hub(REPO)
    images, home = pixels(3, seed=4), tmp_path / "home"
    save_file({"pixels": images}, tmp_path / "pixels.safetensors")
    home.mkdir()
    hub.requests.clear()
    module = run(LOAD + END, REPO, tmp_path, site=site, home=home, **online())
    assert module.startswith("transformers_modules.")
    assert 4 < len(hub.requests) <= MOST_REQUESTS, "\n".join(hub.requests)
    with torch.no_grad():
        wanted = model(pixel_values=images).logits
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], wanted)
    hub.requests.clear()
    run(LOAD + PUSH + END, REPO, tmp_path, site=site, home=home, **online())
    for name in ("org/given-back", "org/quiet"):
        back = KnnForImageClassification.from_pretrained(name)
        with torch.no_grad():
            assert torch.equal(back(pixel_values=images).logits, wanted)
    assert not hub.repo("org/given-back").private
    assert hub.repo("org/quiet").private
    assert [commit.message for commit in hub.repo("org/quiet").history()] == ["hello"]


def test_a_push_over_a_repository_of_version_one_leaves_two_files(
    hub: Hub, model: Any, tmp_path: Path
) -> None:
    old = lay_out("vit_cosine", tmp_path / "old")
    files = {path.name: path.read_bytes() for path in old.iterdir()}
    files |= {"mine.py": b"# of the user\n", "train.py": b"from .search import Searcher\n"}
    repo = hub.create(REPO)
    repo.commit("main", files, "by version 0.1")
    model.push_to_hub(REPO)
    kept = {name for name in hub.files(REPO) if name.endswith(".py")}
    ours = {"configuration_hf_knn.py", "modeling_hf_knn.py"}
    assert kept == ours | {"mine.py", "train.py"}
    repo.commit("main", hub.files(REPO) | {"search.py": b"# of the user\n"}, "more")
    model.origin = None
    model.push_to_hub(REPO)
    assert "search.py" in hub.files(REPO)


def test_the_code_of_a_repository_is_compared_before_anybody_runs_it(hub: Hub, model: Any) -> None:
    model.push_to_hub(REPO)
    assert hf_knn("code", REPO).exit_code == 0
    files = hub.files(REPO)
    changed = {"modeling_hf_knn.py": files["modeling_hf_knn.py"] + b"import os\n"}
    hub.repo(REPO).commit("main", files | changed, "more")
    hub.repo(REPO).commit("safe", files, "as it was")
    done = hf_knn("code", REPO)
    assert done.exit_code == 1
    assert "modeling_hf_knn.py is not that of the installed package" in done.stdout
    done = hf_knn("code", REPO, "--revision", "safe")
    assert done.exit_code == 0, done.output
    assert f"{REPO} at safe" in done.stdout
    done = hf_knn("code", "org/nothing")
    assert done.exit_code == 1
    assert "org/nothing" in done.stderr
