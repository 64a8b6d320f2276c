"""`hf-knn train --learn-metric`: what it says, and what the other commands say of it afterwards."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import hf_knn, save_backbone, wide_terminal  # noqa: F401
from support.pictures import encoded, picture, write_folder
from typer.testing import Result

from hf_knn import KnnForImageClassification
from hf_knn.fit import metric


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pictures") / "pets", {"ant": 12, "bee": 12})


def train(pictures: Path, output: Path, *options: object) -> Result:
    return hf_knn("train", pictures, "-o", output, "--learn-metric", *options)


def test_it_is_said_whether_it_was_kept(pictures: Path, backbone: Path, tmp_path: Path) -> None:
    done = train(pictures, tmp_path / "model", "--backbone", backbone, "--head", "ridge")
    assert done.exit_code == 0, done.output
    assert "Learned metric: not kept; neighbours find" in done.output  # colours are easy
    model = KnnForImageClassification.from_pretrained(tmp_path / "model")
    assert not model.config.learned_metric


def test_kept_it_is_stored_and_named(
    pictures: Path, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metric, "LEAST_GAIN", -1.0)
    monkeypatch.setattr(metric, "_error", lambda gains: -1.0)
    output = tmp_path / "model"
    done = train(pictures, output, "--backbone", backbone, "--head", "ridge")
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "Learned metric: kept; neighbours find" in said
    assert "learned_map=" in said
    assert json.loads((output / "datastore.json").read_text())["format_version"] == 2
    model: Any = KnnForImageClassification.from_pretrained(output)
    assert str(model.datastore.learned_map) in (output / "README.md").read_text()
    monkeypatch.chdir(tmp_path)  # where the page goes
    found = hf_knn("inspect", output)
    assert found.exit_code in (0, 1), found.output
    assert str(model.datastore.learned_map) in found.output
    asked = tmp_path / "one.png"
    asked.write_bytes(encoded(picture(0, 99)))
    answer = hf_knn("predict", output, asked)
    assert answer.exit_code == 0, answer.output
    taught = hf_knn("forget", output, "--ids", int(model.datastore.ids[0]))
    assert taught.exit_code == 0, taught.output
    assert "what was learned about likeness (--learn-metric) stays as it was" in " ".join(
        taught.output.split()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--fine-tune"], "--learn-metric with --fine-tune"), (["--alpha", "1"], "`learn_metric`")],
)
def test_it_is_refused_where_folds_cannot_tell(
    options: list[str], message: str, pictures: Path, tmp_path: Path
) -> None:
    done = train(pictures, tmp_path / "model", "--backbone", "efficientnet-lite0", *options)
    assert done.exit_code != 0
    assert message in " ".join(done.output.split())
    assert not (tmp_path / "model").exists()
