"""Test sets whose pictures for training are another task's: their labels are that task's."""

from importlib.resources import files

import pytest
from datasets import ClassLabel
from support.pictures import dataset_of

from catalog import loading
from catalog.label_maps import LabelMap, imagenet_wnids, positions_of
from catalog.loaded_task import LoadedTask
from catalog.splits import TEST, TRAIN
from catalog.tasks import Source, Task, find_task

CLASSES = [f"class {number}" for number in range(1000)]


def test_imagenet_r_is_the_subset_that_timm_evaluates():
    """timm keeps the ids and, written by hand, the indices of the 200 classes."""
    listed = files("timm") / "data" / "_info"
    wnids = (listed / "imagenet_r_synsets.txt").read_text().split()
    indices = [int(line) for line in (listed / "imagenet_r_indices.txt").read_text().split()]
    assert positions_of(wnids, CLASSES, LabelMap.WNIDS) == indices
    assert len(set(indices)) == find_task("imagenet-r").classes == 200


def test_wnids_by_eye():
    wnids = imagenet_wnids()
    assert (len(wnids), wnids == sorted(wnids)) == (1000, True)
    assert positions_of(["n15075141", "n01440764"], CLASSES, LabelMap.WNIDS) == [999, 0]


def test_numbers_are_numbers_and_not_in_the_order_of_words():
    labels = ["0", "1", "10", "2", "999"]
    assert positions_of(labels, CLASSES, LabelMap.NUMBERS) == [0, 1, 10, 2, 999]
    assert positions_of(["class 7"], CLASSES, LabelMap.NAMES) == [7]


@pytest.mark.parametrize(
    ("labels", "classes", "how", "message"),
    [
        (["1000"], CLASSES, LabelMap.NUMBERS, r"numbers of 1,000 classes, but \['1000'\] are not"),
        (["n0"], CLASSES, LabelMap.WNIDS, r"\['n0'\] are not; do correct label_map"),
        (["n01440764"], CLASSES[:10], LabelMap.WNIDS, "1,000 classes of ImageNet-1k .* got 10"),
    ],
)
def test_labels_that_name_nothing_are_refused(labels, classes, how, message):
    with pytest.raises(ValueError, match=message):
        positions_of(labels, classes, how)


def test_the_entries_say_how_their_labels_read():
    assert find_task("imagenet-v2").label_map is LabelMap.NUMBERS
    assert find_task("imagenet-r").label_map is LabelMap.WNIDS
    for name in ("imagenet-v2", "imagenet-r"):
        assert find_task(name).train_from == "imagenet-1k"
        assert not find_task(name).verified  # nobody has seen them on the Hub


def test_test_pictures_get_the_numbers_of_the_training_task(monkeypatch):
    trained = LoadedTask(
        Task("big", "big", Source.HUB, "org/big"), "r1", ["ant", "bee", "cat"],
        {TRAIN: dataset_of([0, 1, 2], names=["ant", "bee", "cat"])},
    )  # fmt: skip
    monkeypatch.setattr(loading, "load_task", lambda *_, **__: trained)
    entry = Task("few", "few", Source.HUB, "org/few", label_map=LabelMap.NUMBERS)
    few = LoadedTask(entry, "r2", ["2", "0"], {TEST: dataset_of([0, 0, 1], names=["2", "0"])})
    found = loading._with_training(few, "big", None)
    assert found.sources[TEST]["label"][:] == [2, 2, 0]
    assert found.sources[TEST].features["label"] == ClassLabel(names=["ant", "bee", "cat"])
    assert (found.label_names, found.revision) == (["ant", "bee", "cat"], "r2, big r1")
