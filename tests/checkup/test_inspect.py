"""`hf-knn inspect` on a saved checkpoint: what was planted among its rows is found."""

import csv
import json
from pathlib import Path

import pytest
import torch
from support.commands import hf_knn, wide_terminal  # noqa: F401
from support.pictures import NAMES, encoded, picture, random_features, small_model

from hf_knn import Datastore

CLASSES, ROWS = 3, 120


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """120 rows: number 5 has another label, 7 the features of 4, 11 is far from all."""
    folder = tmp_path_factory.mktemp("out") / "knn-model"
    rows = random_features([row % CLASSES for row in range(ROWS)], spread=0.6)
    features, labels = rows.features.clone(), rows.labels.clone()
    labels[5] = (labels[5] + 1) % CLASSES
    features[7] = features[4]
    features[11] = 40 * torch.randn(16, generator=torch.Generator().manual_seed(3))
    model = small_model(["ant", "bee", "<b>cat</b>"])
    paths = [f"{NAMES[row % CLASSES]}/{row}.png" for row in range(ROWS)]
    model.datastore = Datastore.from_features(features, labels, paths=paths)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for row in range(ROWS):
        place = folder / NAMES[row % CLASSES] / f"{row}.png"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(encoded(picture(row % CLASSES, row if row != 7 else 4)))
    return folder


def ids_of(folder: Path, kind: str) -> set[int]:
    with (folder / "findings.csv").open(encoding="utf-8", newline="") as file:
        return {int(row["sample_id"]) for row in csv.DictReader(file) if row["kind"] == kind}


def test_what_was_planted_among_the_rows_is_found(checkpoint, tmp_path):
    done = hf_knn("inspect", checkpoint, "-o", tmp_path)
    assert done.exit_code == 0, done.stderr
    assert ids_of(tmp_path, "exact_duplicate") == {7}
    assert ids_of(tmp_path, "label_error") == {5}
    assert ids_of(tmp_path, "outlier") == {11}
    assert ids_of(tmp_path, "near_duplicate") == set()
    assert "byte for byte" in done.stdout
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "data:image/svg+xml;base64," in page
    assert "data:image/jpeg" not in page
    assert "<b>cat</b>" not in page
    assert "&lt;b&gt;cat&lt;/b&gt;" in page


def test_facts_of_the_checkpoint_are_told(checkpoint, tmp_path):
    done = hf_knn("inspect", checkpoint, "-o", tmp_path, "--json")
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    facts = answer["checkpoint"]
    assert (facts["rows"], facts["width"], facts["classes"], facts["k"]) == (120, 16, 3, 20)
    manifest = json.loads((checkpoint / "datastore.json").read_text())
    blob = manifest["blobs"][0]
    assert facts[f"sha256 of {blob['name']}"] == blob["sha256"]
    assert answer["counts"]["label_error"] == 1
    assert not {"broken", "no_label", "cross_split_duplicate"} & set(answer["counts"])


def test_with_pictures_they_are_compared_and_shown(checkpoint, root, tmp_path):
    done = hf_knn("inspect", checkpoint, "-o", tmp_path, "--pictures", root)
    assert done.exit_code == 0, done.stderr
    assert 7 in ids_of(tmp_path, "exact_duplicate") | ids_of(tmp_path, "label_conflict")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") >= 3


def test_a_folder_without_the_pictures_is_refused(checkpoint, tmp_path):
    done = hf_knn("inspect", checkpoint, "-o", tmp_path / "out", "--pictures", tmp_path)
    assert done.exit_code == 1
    assert f"0 of {ROWS} found under {tmp_path}" in " ".join(done.stderr.split())
    assert "ant/0.png" in done.stderr
    assert not (tmp_path / "out").exists()


def test_stored_paths_never_leave_the_folder(tmp_path, root):
    from hf_knn.checkup.examine import open_picture
    from hf_knn.data import StoredPictures

    outside = root.parent / "secret.png"
    outside.write_bytes(encoded(picture(0, 0)))
    stored = StoredPictures(root)
    for path in ("../secret.png", str(outside), "", "ant", "train/../../secret.png", "\0"):
        assert stored.find(path) is None
    assert open_picture(stored, "ant/0.png") is not None


def test_a_damaged_datastore_is_refused(checkpoint, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    (blob,) = copy.glob("datastore-*.safetensors")
    data = bytearray(blob.read_bytes())
    data[-20] ^= 1
    blob.write_bytes(data)
    done = hf_knn("inspect", copy, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert blob.name in done.stderr


def test_a_checkpoint_without_a_datastore_is_refused(tmp_path):
    small_model(["ant", "bee"]).save_pretrained(tmp_path / "bare")
    done = hf_knn("inspect", tmp_path / "bare", "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "datastore with rows" in done.stderr


def test_the_map_keeps_clusters_together():
    from sklearn.neighbors import KNeighborsClassifier

    from hf_knn.checkup.svg import place_features

    rows = random_features([row % CLASSES for row in range(ROWS)], spread=0.4)
    kept, places = place_features(rows.features, 0)
    again = place_features(rows.features, 0)[1]
    assert (places == again).all()
    labels = rows.labels.numpy()[kept]
    assert KNeighborsClassifier(5).fit(places, labels).score(places, labels) > 0.95
    with pytest.raises(ValueError, match="at least 4 rows"):
        place_features(rows.features[:3], 0)
