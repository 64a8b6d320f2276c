"""Checkpoints that version 0.1.0 saved open for ever, with the package and without it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.golden import (
    GOLDEN,
    KINDS,
    LEGACY_CODE,
    assert_as_expected,
    expected,
    lay_out,
)
from support.stranger import make_site, run
from torch import Tensor

from hf_knn import KnnForImageClassification

ANSWER = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

torch.set_num_threads(1)
golden, folder = Path(sys.argv[1]), Path(sys.argv[2])
report = {}
for kind in sys.argv[3:]:
    images = load_file(golden / "checkpoints-v1" / kind / "expected.safetensors")["pixel_values"]
    model = AutoModel.from_pretrained(folder / kind, trust_remote_code=True)
    with torch.no_grad():
        out = model(pixel_values=images, return_neighbors=True)
    found = {"pixel_values": images, "logits": out.logits, "head_logits": out.head_logits}
    if out.neighbors is not None:
        found |= out.neighbors._asdict()
    save_file({name: value.contiguous() for name, value in found.items()}, folder / f"{kind}.st")
    report[kind] = type(model).__module__
print(json.dumps(report))
"""


def answer(model: KnnForImageClassification, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        out = model(pixel_values=images, return_neighbors=True)
    found = {"pixel_values": images, "logits": out.logits, "head_logits": out.head_logits}
    return found | ({} if out.neighbors is None else out.neighbors._asdict())


def opened_here(folder: Path, kind: str) -> dict[str, Tensor]:
    model = KnnForImageClassification.from_pretrained(folder)
    return answer(model, expected(kind)["pixel_values"])


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a stranger's process answered, with the 51 files that came along."""
    root = tmp_path_factory.mktemp("stranger")
    folder, home = root / "checkpoints", root / "home"
    home.mkdir()
    for kind in KINDS:
        lay_out(kind, folder / kind)
    modules = run(ANSWER, GOLDEN, folder, *KINDS, site=make_site(root / "site"), home=home)
    return {kind: (modules[kind], load_file(folder / f"{kind}.st")) for kind in KINDS}


def test_five_kinds_are_kept() -> None:
    assert KINDS == ["l2_ivf", "ridge_taught", "trainer_checkpoint", "two_poolings", "vit_cosine"]
    assert len(LEGACY_CODE) == 51


@pytest.mark.parametrize("with_code", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_package_opens_them(kind: str, with_code: bool, tmp_path: Path) -> None:
    folder = lay_out(kind, tmp_path / kind, with_code=with_code)
    assert_as_expected(kind, opened_here(folder, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stranger_opens_them_with_their_own_code(kind: str, opened: dict[str, Any]) -> None:
    module, found = opened[kind]
    assert module.startswith("transformers_modules.")
    assert_as_expected(kind, found)


@pytest.mark.parametrize("kind", KINDS)
def test_both_give_the_same_bits(kind: str, opened: dict[str, Any], tmp_path: Path) -> None:
    found = opened_here(lay_out(kind, tmp_path / kind), kind)
    theirs = opened[kind][1]
    different = [name for name, value in found.items() if not torch.equal(value, theirs[name])]
    assert different == []


def test_what_was_taught_is_still_known(tmp_path: Path) -> None:
    model = KnnForImageClassification.from_pretrained(lay_out("ridge_taught", tmp_path / "model"))
    assert [receipt.action for receipt in model.changes] == ["teach", "forget"]
    assert model.thumbnails is not None
    kept = [row for row in range(40) if model.thumbnails.get(row) is not None]
    assert kept == [0, 1, 3, 4, 5, 36, 37, 38, 39]
    assert model.fingerprint_rows() == model.changes[-1].hash_after
    model.relabel([36], ["cat"])
    model.undo()
    images = expected("ridge_taught")["pixel_values"]
    assert_as_expected("ridge_taught", answer(model, images))


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_files_are_those_of_the_list(kind: str) -> None:
    """A save removes what version 0.1.0 wrote, and only that."""
    config = json.loads((GOLDEN / "checkpoints-v1" / kind / "config.json").read_text())
    modules = {target.partition(".")[0] for target in config["auto_map"].values()}
    assert {f"{module}.py" for module in modules} <= set(LEGACY_CODE)
