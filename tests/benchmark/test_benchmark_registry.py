"""Registries, suites, splits and estimates: what a run will measure before it measures anything."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas  # type: ignore[import-untyped]
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from catalog.backbones import BACKBONES, find_backbone
from catalog.splits import ANY, TEST, TRAIN, VALIDATION, split_pool
from catalog.tasks import TASKS, Source, find_task
from study import estimates
from study.cells import Cell
from study.estimates import check_disk, estimate
from study.suites import SUITES, make_cells

RESULTS = Path(__file__).parents[2] / "benchmark" / "results" / "results.parquet"

# ---- registries ---------------------------------------------------------------------------------


def test_every_task_says_what_it_must():
    assert [task.name for task in TASKS.values()] == list(TASKS)
    for task in TASKS.values():
        assert task.classes > 1, task.name
        assert task.pictures > 0
        assert task.citation
        assert task.metric in ("top1", "mean_class")
        # nothing here could look at the Hub, so nothing there may say that it was looked at
        assert task.verified == (task.source is Source.OFFLINE)


def test_the_papers_backbones_are_there_or_say_why_not():
    paper = [entry for entry in BACKBONES.values() if entry.in_paper]
    assert len(paper) == 18
    for entry in paper:
        if entry.location is None:
            with pytest.raises(ValueError, match="cannot: no public equivalent"):
                find_backbone(entry.name)


TIMM = {b.name: b for b in BACKBONES.values() if (b.location or "").startswith("timm/")}


@pytest.mark.parametrize("name", TIMM)
def test_what_is_said_of_timm_models_is_what_timm_says(name):
    backbone = TIMM[name]
    known = timm.get_pretrained_cfg((backbone.location or "").removeprefix("timm/"))
    assert known is not None
    assert known.license is not None
    assert known.architecture is not None
    assert known.hf_hub_id == backbone.location
    assert known.input_size == (3, backbone.image_size, backbone.image_size)
    assert backbone.licence.lower() in known.license
    with torch.device("meta"):
        model = timm.create_model(known.architecture, num_classes=0)
        whole = timm.create_model(known.architecture, num_classes=known.num_classes)
    assert model.num_features == backbone.width
    megabytes = sum(tensor.numel() for tensor in whole.state_dict().values()) * 4 / 1e6
    assert backbone.megabytes == pytest.approx(megabytes, rel=0.05)
    assert backbone.verified


def test_pinned_revisions_are_whole_commits():
    """A branch or a short name of a commit can move, or come to mean two."""
    found = [task.revision for task in TASKS.values()]
    found += [backbone.revision for backbone in BACKBONES.values()]
    pinned = [revision for revision in found if revision is not None]
    assert len(pinned) > 15
    for revision in pinned:
        assert re.fullmatch("[0-9a-f]{40}", revision)


@pytest.mark.parametrize(
    ("find", "name", "message"),
    [
        (find_task, "flower-102", "do you mean flowers-102"),
        (find_backbone, "dino-v2-s", "do you mean dinov2-s"),
        (lambda name: make_cells(name), "offlin", "do you mean offline"),
        (lambda name: make_cells("offline", protocols=[name]), "lo-data", "do you mean lowdata"),
        (lambda name: make_cells("offline", tasks=[name]), "digit", "do you mean digits"),
    ],
)
def test_unknown_names_are_answered_with_near_ones(find, name, message):
    with pytest.raises(ValueError, match=message):
        find(name)


def test_hub_ids_folders_and_newt_are_tasks_too():
    entry = find_task("hub:org/birds@abc123:small")
    assert (entry.location, entry.revision, entry.config) == ("org/birds", "abc123", "small")
    assert find_task("imagefolder:/some/where").location == "/some/where"
    assert find_task("newt:ml_age_coopers_hawk").source is Source.NOWHERE


# ---- suites and estimates -----------------------------------------------------------------------


def test_estimates_are_within_a_factor_of_three_of_what_was_measured():
    measured = pandas.read_parquet(RESULTS)
    measured = measured.drop_duplicates(["task", "backbone", "protocol", "seed", "shots"])
    shots = [None if n != n else int(n) for n in measured["shots"]]
    names = zip(measured["task"], measured["backbone"], measured["protocol"], strict=True)
    cells = [
        Cell(*name, int(seed), few)
        for name, seed, few in zip(names, measured["seed"], shots, strict=True)
    ]
    assert len(cells) > 500
    for part in (None, *measured["backbone"].unique()):
        mine = [part in (None, cell.backbone) for cell in cells]
        said = estimate([c for c, own in zip(cells, mine, strict=True) if own], None, None).seconds
        took = measured["seconds"][mine].sum()
        assert took / 3 < said < 3 * took, (part, said, took)


@pytest.mark.parametrize("suite", [name for name in SUITES if name != "newt"])
def test_every_suite_is_made_of_known_names(suite):
    cells = make_cells(suite)
    assert len({cell.name for cell in cells}) == len(cells)
    found = estimate(cells, None, None)
    assert found.seconds > 0
    assert found.megabytes > 0


def test_what_is_given_takes_the_place_of_what_the_suite_says():
    cells = make_cells(
        "offline", tasks=["digits"], backbones=["tiny-vit"], protocols=["lowdata", "knn"],
        shots=[1, 4], seeds=2,
    )  # fmt: skip
    assert [cell.name for cell in cells] == [
        f"digits--tiny-vit--{what}--seed{seed}"
        for seed in (0, 1) for what in ("lowdata--1shot", "lowdata--4shot", "knn")
    ]  # fmt: skip
    with pytest.raises(ValueError, match="do pass --task imagefolder:PATH"):
        make_cells("newt")


def test_a_small_disk_is_told_before_the_start(tmp_path, monkeypatch):
    check_disk(tmp_path / "not" / "there" / "yet", 1)
    usage = type("Usage", (), {"free": 5_000_000})
    monkeypatch.setattr(estimates.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(OSError, match=r"about 200 MB .* has 5 MB; do pass --stream"):
        check_disk(tmp_path, 200)


# ---- splits -------------------------------------------------------------------------------------


@settings(deadline=None)  # a busy machine is no defect
@given(st.integers(0, 5), st.integers(0, 3), st.booleans())
def test_parts_are_disjoint_and_whole(seed, kind, grouped):
    labels = np.repeat(np.arange(4), 24)
    groups = np.tile(np.arange(8), 12) if grouped else None
    roles = np.full(96, ANY, np.int8)
    if kind:
        roles = np.tile(np.array([TRAIN, TRAIN, TEST], np.int8), 32)
    if kind == 2:
        roles[::6] = VALIDATION
    parts = split_pool(labels, groups, roles, seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(96))
    for part in parts[:2]:
        assert set(labels[part]) == {0, 1, 2, 3}
    if kind:
        assert np.array_equal(parts.test, np.flatnonzero(roles == TEST))
    if kind == 2 and seed == 0:
        assert np.array_equal(parts.validation, np.flatnonzero(roles == VALIDATION))
    elif groups is not None:
        owners = [set(groups[part]) for part in parts]
        assert not owners[0] & owners[1]
        assert kind or not (owners[0] | owners[1]) & owners[2]
    again = split_pool(labels, groups, roles, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_a_seed_is_a_split():
    labels = np.repeat(np.arange(4), 24)
    roles = np.tile(np.array([TRAIN, VALIDATION, TEST], np.int8), 32)
    first, second = (split_pool(labels, None, roles, seed) for seed in (1, 2))
    assert not np.array_equal(first.validation, second.validation)
    sizes = Counter(labels[first.validation].tolist())
    assert set(sizes.values()) == {8}  # as many as the official ones
    with pytest.raises(ValueError, match="but validation got none of 2"):
        split_pool(np.array([0, 1]), None, np.array([TRAIN, TEST], np.int8), 0)


def test_registries_are_data():
    json.dumps({name: task.__dict__ for name, task in TASKS.items()})
    json.dumps({name: backbone.__dict__ for name, backbone in BACKBONES.items()})
