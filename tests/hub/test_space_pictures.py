"""Small pictures of rows that came from a dataset on the Hub."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.hub_datasets import REPO, picture, publish
from support.hub_server import Hub

from hf_knn import load_splits
from hf_knn_space import hub_pictures
from hf_knn_space.hub_pictures import HubPictures
from hf_knn_space.opening import find_pictures
from hf_knn_space.pictures import NoPictures


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", tmp_path / "modules")


def source_of(revision: str) -> dict[str, str]:
    return {"dataset": REPO, "revision": revision, "split": "test"}


def test_a_row_is_shown_as_it_was_when_it_was_stored(hub: Hub, model: Any) -> None:
    model.datastore.source = source_of(publish(hub))
    publish(hub, train=40)  # the dataset moves on
    found = find_pictures(model, None)
    assert isinstance(found, HubPictures)
    found.opening.join()
    small = found.find(3, "")  # the fourth of the test split
    assert small is not None
    shown = np.asarray(Image.open(io.BytesIO(small)).convert("RGB").resize((24, 24)), np.float64)
    distances = [
        np.abs(shown - np.asarray(Image.open(io.BytesIO(picture(row % 2, 500 + row)["bytes"]))))
        for row in range(16)
    ]
    assert np.argmin([distance.mean() for distance in distances]) == 3
    assert [found.find(row_id, "") for row_id in (16, -1)] == [None, None]
    assert isinstance(find_pictures(model, "none"), NoPictures)


def test_nothing_that_is_not_public_is_shown(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where whoever runs the page may read it: its visitors may not."""
    revision = publish(hub, private=True)
    assert load_splits(REPO, revision=revision)["test"].num_rows == 16
    found = HubPictures(source_of(revision))
    found.opening.join()
    assert found.find(0, "") is None
    (tmp_path / REPO / "test").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)  # now the name is that of a folder
    found = HubPictures(source_of(revision))
    found.opening.join()
    assert "is a place on this machine too" in caplog.messages[-1]


def test_no_file_of_the_machine_is_shown(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = HubPictures(source_of(publish(hub)))
    found.opening.join()
    secret = tmp_path / "secret.png"
    Image.new("RGB", (9, 9)).save(secret)
    found._rows = [{"image": {"bytes": None, "path": str(secret)}}]
    found._places = {0: 0, 1: 0}
    assert found.find(0, "") is None
    monkeypatch.setattr(hub_pictures, "HF_HUB_CACHE", str(tmp_path))
    assert found.find(1, "") is not None


def test_without_a_commit_nothing_is_asked_for(model: Any) -> None:
    model.datastore.source = source_of("main")
    assert isinstance(find_pictures(model, None), NoPictures)


def test_what_cannot_be_had_is_said_and_shown_as_tiles(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    revision = publish(hub)
    for source in (source_of("0" * 40), source_of(revision) | {"split": "other"}):
        found = HubPictures(source)
        found.opening.join()
        assert found.find(0, "") is None
        assert "HF_KNN_PICTURES=none" in caplog.messages[-1]
    monkeypatch.setattr(hub_pictures, "MAX_DATASET_BYTES", 1000)
    found = HubPictures(source_of(revision))
    found.opening.join()
    assert found.find(0, "") is None
    assert "train with --thumbnails" in caplog.messages[-1]
    assert len(caplog.messages) == 3
