"""Runs of the benchmark on a few dozen pictures: what a folder of results holds, and its faults."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from support.pictures import picture, small_backbone, small_processor, write_folder
from typer.testing import CliRunner

from catalog.backbones import find_backbone
from catalog.loading import load_task
from hf_knn import Neighbors, knn_log_probs, tune
from hf_knn.fit import default_grid
from reporting.cells import load_results
from reporting.parquet import as_dataset
from run import SaidOnce, app
from study import bench, estimates, phases
from study import scratch as scratch_module
from study.arms import choose_weight
from study.arms_of import PLAIN
from study.cells import Cell, is_finished
from study.folder import locked
from study.heads import HEADS as COMPARED
from study.losses import linear_arms
from study.peers import PEERS
from study.phases import EXTRACT, HEADS, LOAD, MEASURE, PHASES, STORE, TUNE, Phases
from study.phases import PEERS as PEERS_PHASE
from study.pool import OpenBackbone
from study.protocols import PROTOCOLS
from study.runner import Options, Run
from study.suites import SUITES, make_cells
from study.twins import Twins, near_duplicates

ROOT = Path(__file__).parents[2]
FROZEN = [
    "knn", "linear", "complementarity", "peers", "heads", "lowdata", "lowdata_heads",
    "lowdata_losses", "robustness",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Pictures, a backbone and a cache."""
    root = tmp_path_factory.mktemp("benchmark")
    write_folder(root / "pictures", {"a": 12, "b": 12, "c": 12})
    small_backbone().save_pretrained(root / "backbone")
    small_processor().save_pretrained(root / "backbone")
    return root


def cells_of(place: Path, protocols: list[str], seeds: int = 1) -> list[Cell]:
    return make_cells(
        "offline", tasks=[f"imagefolder:{place / 'pictures'}"],
        backbones=[str(place / "backbone")], protocols=protocols, shots=[1, 2], seeds=seeds,
    )  # fmt: skip


def run(place: Path, output: Path, cells: list[Cell], **options) -> Run:
    found = Run(output, Options(cache_dir=place / "cache", **options))
    found.run("test", cells)
    return found


@pytest.fixture(scope="module")
def finished(place) -> tuple[Path, list[Cell]]:
    cells = cells_of(place, FROZEN)
    done = run(place, place / "finished", cells)
    assert done.failures == []
    return done.folder, cells


def read(folder: Path, cell: Cell):
    document = json.loads((folder / "cells" / f"{cell.name}.json").read_text())
    return document, np.load(folder / "cells" / f"{cell.name}.npz")


# ---- what is written ----------------------------------------------------------------------------


def test_every_cell_holds_what_the_report_reads(finished):
    folder, cells = finished
    facts = json.loads((folder / "run.json").read_text())
    assert (facts["format"], facts["suite"]) == (1, "test")
    assert list(facts["revisions"]) == [cells[0].task]
    for cell in cells:
        document, arrays = read(folder, cell)
        assert document["cell"] == cell._asdict()
        assert document["task"]["label_names"] == ["a", "b", "c"]
        assert document["provenance"]["world_size"] == 1
        assert document["peak_memory_bytes"] > 1e6
        assert set(document["seconds"]) <= set(PHASES)
        assert document["seconds"][MEASURE] > 0
        assert document["rates"].keys() <= document["seconds"].keys()
        count = document["data"]["test"]
        assert len(arrays["ids"]) == len(arrays["groups"]) == len(arrays["near_duplicate"]) == count
        for name in document["arms"]:
            for kind in ("predicted", "confidence", "true"):
                assert len(arrays[f"{kind}/{name}"]) == count


def test_numbers_are_those_of_scikit_learn_on_the_stored_answers(finished):
    folder, cells = finished
    for cell in cells:
        document, arrays = read(folder, cell)
        labels = arrays["labels"]
        for name, arm in document["arms"].items():
            predicted = arrays[f"predicted/{name}"]
            assert arm["test"]["top1"] == pytest.approx((predicted == labels).mean())
            assert arm["test"]["mean_class"] == pytest.approx(
                balanced_accuracy_score(labels, predicted)
            )
            nll = -np.log(np.maximum(arrays[f"true/{name}"].astype(float), 1e-12)).mean()
            assert arm["test"]["nll"] == pytest.approx(nll, rel=1e-4)


def test_the_arms_are_those_of_the_contract(finished):
    folder, cells = finished
    voiced = (*COMPARED, "trials")
    compared = {*voiced, "knn", "auto", *(f"blend:{head}+knn" for head in voiced)}
    wanted = {
        "knn": {"head", "knn", "blend", "fixed", "dino"},
        "linear": {"plain", "reweighted", "focal", "shuffled", "constant", "blend", "knn"},
        "complementarity": {"head", "knn", "blend"},
        "lowdata": {"head", "ridge", "knn", "blend", "fixed"},
        "heads": compared,
        "lowdata_heads": compared,
        "lowdata_losses": {"plain", "reweighted", "focal", "shuffled", "constant"},
        "robustness": {"head", "knn", "blend", "fixed", "dino"},
    }
    alone = {*PEERS, "dino", "knn"}
    wanted["peers"] = alone | {"head"} | {f"blend:head+{name}" for name in alone}
    wanted["peers"] |= {f"blend:{name}+knn" for name in PEERS} | {"knn_grid", "blend"}
    for cell in cells:
        document, _ = read(folder, cell)
        assert set(document["arms"]) == wanted[cell.protocol], cell.protocol
        for name, arm in document["arms"].items():
            is_blend = name in ("blend", "fixed") or name.startswith("blend:")
            assert (arm["terms"] is not None) == is_blend, name
        if cell.protocol == "complementarity":
            extra = document["extra"]
            parts = ("both_right", "only_head", "only_knn", "neither")
            assert sum(extra[name] for name in parts) == pytest.approx(1)
            assert extra["oracle"] == pytest.approx(1 - extra["neither"])
        if cell.shots is not None:
            assert document["data"]["train"] == 3 * cell.shots  # none for validation beside them
            assert document["data"]["validation"] == 0


def test_the_vote_of_dino_is_that_of_brute_force(finished, place):
    folder, cells = finished
    cell = next(cell for cell in cells if cell.protocol == "knn")
    _, arrays = read(folder, cell)
    loaded = load_task(cell.task)
    backbone = OpenBackbone(find_backbone(cell.backbone), loaded.label_names, place / "cache")
    found = backbone.features(loaded.rows)
    unit = found.features.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    train, _, test = loaded.parts(0)
    cosines = unit[test] @ unit[train].T
    near = np.argsort(-cosines, axis=1)[:, :20]
    weights = np.exp(np.take_along_axis(cosines, near, 1) / 0.07)
    votes = np.stack(
        [(weights * (found.labels.numpy()[train][near] == c)).sum(1) for c in range(3)], 1
    )
    own = np.take_along_axis(votes, arrays["labels"][:, None].astype(int), 1)[:, 0] / votes.sum(1)
    np.testing.assert_allclose(arrays["true/dino"], own, atol=2e-3)


def test_arms_have_equal_trials():
    assert {len(configs) for configs in linear_arms().values()} == {len(PLAIN)} == {6}


def test_the_weight_of_a_second_voice_is_that_of_tune():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (200,), generator=generator)
    head = (torch.randn(200, 3, generator=generator) + torch.eye(3)[labels]).log_softmax(1)
    near = Neighbors(
        torch.rand(200, 5, generator=generator), torch.randint(0, 3, (200, 5), generator=generator),
        torch.arange(1000).reshape(200, 5),
    )  # fmt: skip
    one = default_grid(5, 3)._replace(k=(5,), temperatures=(0.5,))
    wanted = tune(near, head, labels, 3, "one_standard_error", grid=one)
    votes = knn_log_probs(near.similarities, near.labels, 3, 0.5)
    assert choose_weight(head, votes, labels) == pytest.approx(wanted.knn_weight)


def test_backbones_that_are_trained(place, tmp_path, monkeypatch):
    monkeypatch.setattr(scratch_module, "LEAST_STEPS", 4)
    trained = cells_of(place, ["finetune"])
    scratch = [cell._replace(backbone="tiny-vit") for cell in cells_of(place, ["knn", "lowdata"])]
    scratch += [scratch[-1]._replace(shots=4)]
    scratch += [scratch[0]._replace(protocol="robustness", shift="brightness")]
    done = run(place, tmp_path / "one", [*trained, *scratch], epochs=1)
    assert done.failures == []
    again = run(place, tmp_path / "two", scratch, epochs=1)
    for cell in scratch:  # the same training gives the same numbers
        assert read(done.folder, cell)[0]["arms"] == read(again.folder, cell)[0]["arms"]
    sizes = read(done.folder, scratch[-2])[0]["data"]
    assert (sizes["train"], sizes["validation"]) == (9, 3)  # one of four to choose on
    assert set(read(done.folder, trained[0])[0]["arms"]) == {"head", "knn", "blend", "fixed"}


def test_the_table_has_a_row_per_cell_and_arm(finished):
    folder, cells = finished
    table = as_dataset(load_results(folder))
    assert len(table) == sum(len(read(folder, cell)[0]["arms"]) for cell in cells)
    knn = table.filter(lambda row: row["protocol"] == "knn" and row["arm"] == "blend")[0]
    document, _ = read(folder, next(cell for cell in cells if cell.protocol == "knn"))
    assert knn["test_top1"] == document["arms"]["blend"]["test"]["top1"]


def test_time_is_charged_to_what_took_it(finished):
    folder, cells = finished
    first, *rest = (read(folder, cell)[0] for cell in cells if cell.protocol != "robustness")
    assert {LOAD, EXTRACT, HEADS, STORE, TUNE, MEASURE} <= first["seconds"].keys()
    assert (first["images"], first["rates"][EXTRACT]) == (36, 36 / first["seconds"][EXTRACT])
    assert first["images_per_second"] >= first["rates"][EXTRACT]
    for document in rest:  # loaded, extracted and stored once for all protocols of a split
        assert not {LOAD, EXTRACT} & document["seconds"].keys()
        assert (document["images"], document["images_per_second"]) == (0, None)
    for cell in cells:
        document, _ = read(folder, cell)
        assert (PEERS_PHASE in document["seconds"]) == (cell.protocol == "peers")
        if cell.protocol == "robustness":
            assert 0 < document["images"] <= document["data"]["test"]  # some come out equal


def test_a_phase_inside_another_is_taken_out_of_it(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 10.0, 10.5])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(times))
    found = Phases()
    with found.phase(MEASURE), found.phase(HEADS):  # 0 to 10, of which 1 to 3 are a head's
        pass
    assert found.take()[0] == {MEASURE: 8.0, HEADS: 2.0}
    assert found.take() == ({}, 0, 0.0)


# ---- going on -----------------------------------------------------------------------------------


def test_a_second_run_repeats_nothing_and_repairs_what_is_damaged(finished, place):
    folder, cells = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    numbers = read(folder, cells[0])[0]["arms"]
    damaged = folder / "cells" / f"{cells[0].name}.npz"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    assert not is_finished(folder, cells[0])
    again = run(place, folder, cells)
    (progress,) = again.progress.values()
    assert (progress.total, progress.skipped) == (len(cells), len(cells) - 1)
    assert read(folder, cells[0])[0]["arms"] == numbers
    for path, time in before.items():
        assert (path.stat().st_mtime_ns == time) == (path.stem != cells[0].name)


def test_one_failing_cell_is_reported_and_the_others_go_on(place, tmp_path, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("planted")

    monkeypatch.setitem(PROTOCOLS, "linear", broken)
    cells = cells_of(place, ["linear", "complementarity"])
    cells += [cells[0]._replace(task="imagefolder:/nowhere", protocol="knn")]
    done = run(place, tmp_path, cells)
    assert [type(error) for _, error in done.failures] == [FileNotFoundError, ZeroDivisionError]
    facts = json.loads((tmp_path / "failures" / f"{cells[0].name}.json").read_text())
    assert (facts["error"], facts["message"]) == ("ZeroDivisionError", "planted")
    assert is_finished(tmp_path, cells[1])
    monkeypatch.undo()
    assert run(place, tmp_path, cells[:2]).failures == []
    assert not (tmp_path / "failures").exists()


def test_a_damaged_shard_of_features_is_found_and_computed_again(place, tmp_path):
    cells = cells_of(place, ["knn"])
    first = run(place, tmp_path / "one", cells)
    for shard in (place / "cache" / "features").rglob("shard-*.safetensors"):
        content = bytearray(shard.read_bytes())
        content[-5] ^= 1
        shard.write_bytes(content)
    second = run(place, tmp_path / "two", cells)
    documents = [read(done.folder, cells[0])[0] for done in (first, second)]
    assert documents[0]["arms"] == documents[1]["arms"]
    assert documents[1]["images"] == 36


def test_two_runs_in_one_folder_are_refused(place, tmp_path):
    with locked(tmp_path), pytest.raises(RuntimeError, match="another run works in it"):
        run(place, tmp_path, cells_of(place, ["complementarity"]))


def test_other_options_and_pictures_do_not_mix(place, tmp_path):
    write_folder(tmp_path / "pictures", {"a": 9, "b": 9})
    cells = [
        cell._replace(task=f"imagefolder:{tmp_path / 'pictures'}")
        for cell in cells_of(place, ["complementarity"])
    ]
    run(place, tmp_path / "out", cells)
    with pytest.raises(ValueError, match="Expected precision to be fp32 as in"):
        run(place, tmp_path / "out", cells, precision="bf16")
    picture(0, 99).save(tmp_path / "pictures" / "a" / "new.png")
    with pytest.raises(ValueError, match=r"at the revision files-.* choose another --output"):
        run(place, tmp_path / "out", cells)


def test_a_folder_of_weights_that_changed_does_not_mix(place, tmp_path):
    shutil.copytree(place / "backbone", tmp_path / "backbone")
    cells = [
        cell._replace(backbone=str(tmp_path / "backbone"))
        for cell in cells_of(place, ["complementarity"], seeds=2)
    ]
    assert run(place, tmp_path / "out", cells[:1]).failures == []
    with (tmp_path / "backbone" / "config.json").open("a") as stream:
        stream.write(" ")
    (failure,) = run(place, tmp_path / "out", cells[1:]).failures
    assert "of two revisions are not mixed" in str(failure[1])


def test_copies_in_train_are_known(tmp_path):
    write_folder(tmp_path / "pictures", {"a": 10, "b": 10})
    twin = tmp_path / "pictures" / "b" / "twin.png"
    twin.write_bytes(next((tmp_path / "pictures" / "a").iterdir()).read_bytes())
    twins = Twins(load_task(f"imagefolder:{tmp_path / 'pictures'}"), tmp_path)
    pairs = twins.pairs()
    assert len(pairs) >= 1
    assert np.array_equal(twins.pairs(), pairs)  # now from the cache
    first, second = pairs[0]
    assert near_duplicates(pairs, np.array([first]), np.array([second]))[0]
    assert not near_duplicates(pairs[:0], np.array([first]), np.array([second]))[0]


# ---- the command --------------------------------------------------------------------------------


def test_a_dry_run_lists_and_runs_nothing(tmp_path):
    said = CliRunner().invoke(
        app, ["--suite", "offline", "--task", "digits", "--dry-run", "-o", str(tmp_path / "out")]
    )
    assert said.exit_code == 0, said.output
    assert "375 cells" in said.output
    assert re.search(
        r"About \d+ minutes by one rank, .* MB of disk\. Nothing was run\.", said.output
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "offline", "--scratch-seeds", "2"], "is not an option of the suite"),
        (["--protocol", "knn"], "is not an option of the suite 'quick'"),
        (["--suite", "offline", "--task", "digit"], "do you mean digits"),
        (["--task", "openmojis"], "do you mean openmoji"),
        (["--suite", "fgvc", "--revision", "a" * 40], "one task of the Hub with --revision, but"),
        (["--suite", "offline", "--revision", "a" * 40], "but got none; do choose one with --task"),
    ],
)
def test_bad_options_are_one_clear_line(arguments, message):
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code != 0
    assert message in " ".join((said.output + str(said.exception)).replace("│", " ").split())


def test_what_fails_alike_is_said_once(tmp_path):
    arguments = ["--suite", "offline", "--task", f"imagefolder:{tmp_path / 'none'}"]
    arguments += ["--backbone", "tiny-vit", "-o", str(tmp_path / "out")]
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 1
    output = " ".join(said.output.split())
    assert "and 74 more: FileNotFoundError: Expected a folder with a sub-folder" in output
    assert output.count("Failed") == 1
    assert "Next:" not in output


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 2_000_000})
    monkeypatch.setattr(estimates.shutil, "disk_usage", lambda place: usage)
    arguments = ["--suite", "offline", "--task", "openmoji", "-o", str(tmp_path / "out")]
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 1
    assert "MB of free disk for this run, but" in said.output + str(said.exception)
    assert not (tmp_path / "out").exists()


# ---- ranks and kills ----------------------------------------------------------------------------


def arms_of(folder: Path) -> dict:
    paths = sorted((folder / "cells").glob("*.json"))
    return {path.name: json.loads(path.read_text())["arms"] for path in paths}


def command(place: Path, output: Path, launcher: list[str]) -> list[str]:
    arguments = ["--suite", "offline", "--task", f"imagefolder:{place / 'pictures'}"]
    arguments += ["--backbone", str(place / "backbone"), "--seeds", "3", "--shots", "2"]
    arguments += ["--cache-dir", str(place / "command-cache"), "-o", str(output)]
    return [sys.executable, *launcher, str(ROOT / "benchmark" / "run.py"), *arguments]


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    # as benchmark/README.md says it; with --cpu accelerate starts one process without saying so
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
}

ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_ranks_give_the_numbers_of_one(launcher, place, tmp_path):
    for name, start in {"one": [], "two": LAUNCHERS[launcher]}.items():
        done = subprocess.run(
            command(place, tmp_path / name, start), env=os.environ | ENVIRONMENT,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    assert len(arms_of(tmp_path / "one")) == 3 * len(SUITES["offline"]["protocols"])
    assert arms_of(tmp_path / "one") == arms_of(tmp_path / "two")
    finished = [json.loads(p.read_text()) for p in (tmp_path / "two" / "cells").glob("*.json")]
    assert {document["provenance"]["world_size"] for document in finished} == {2}


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("after", [1, 4, 9])
def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(after, place, tmp_path):
    whole = command(place, tmp_path / "whole", [])
    subprocess.run(whole, env=os.environ | ENVIRONMENT, check=True, capture_output=True)
    broken = command(place, tmp_path / "broken", [])
    with subprocess.Popen(broken, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL) as going:
        while len(list((tmp_path / "broken" / "cells").glob("*.json"))) < after:
            assert going.poll() is None
        going.kill()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "broken" / "cells").glob("*.json")}
    assert len(kept) < 15
    subprocess.run(broken, env=os.environ | ENVIRONMENT, check=True, capture_output=True)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert arms_of(tmp_path / "broken") == arms_of(tmp_path / "whole")


def test_peak_memory_is_in_bytes():
    assert 5e7 < bench.peak_memory() < 1e12


def test_what_every_cell_says_of_its_rows_is_said_once(caplog):
    logger, once = logging.getLogger("hf_knn.core.rows"), SaidOnce()
    logger.addFilter(once)
    try:
        for _ in range(3):
            logger.warning("the datastore stores %s", "float32")
        logger.warning("the datastore stores %s", "float16")
    finally:
        logger.removeFilter(once)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["the datastore stores float32", "the datastore stores float16"]
