"""Two gloo ranks give what one gives: order and number of rows, neighbours, tuning, metrics."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_knn import KnnForImageClassification

SCRIPT = Path(__file__).parents[1] / "support" / "two_ranks.py"
BIN = Path(sys.executable).parent
LAUNCHERS: dict[str, list[str]] = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": [
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0",
    ],
}  # fmt: skip


def run(launcher: list[str], *folders: Path) -> None:
    for folder in folders:
        folder.mkdir()
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
        "HF_KNN_CACHE": str(folders[-1] / "cache"), "PYTHONPATH": str(SCRIPT.parents[1]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *map(str, folders)],
        env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def reports_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("report-*.json"))]


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What one rank gave alone, and two together."""
    place = tmp_path_factory.mktemp("forked")
    run([], place / "one", place / "two")
    return place / "one", place / "two"


@pytest.mark.parametrize(
    "launcher",
    [
        "forks",
        pytest.param("torchrun", marks=pytest.mark.slow),
        pytest.param("accelerate", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_give_what_one_gives(
    launcher: str, forked: tuple[Path, Path], tmp_path: Path
) -> None:
    single_folder, folder = forked
    if launcher in LAUNCHERS:
        folder = tmp_path / "ranks"
        run(LAUNCHERS[launcher], folder)
    (single,), reports = reports_in(single_folder), reports_in(folder)
    assert single["world"] == 1
    assert [report["world"] for report in reports] == [2, 2]
    wanted = load_file(single_folder / "tensors-0.safetensors")
    for rank, report in enumerate(reports):
        same = ("ids", "labels", "contents", "neighbor_ids", "tuned", "store_ids", "refreshes")
        for name in (*same, "backend"):
            assert report[name] == single[name], name
        assert report["metrics"] == pytest.approx(single["metrics"], abs=1e-4)
        found = load_file(folder / f"tensors-{rank}.safetensors")
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
        assert report["checkpoints"] == [["checkpoint-3", None], ["checkpoint-6", None]]
        assert report["random_states"] == ["rng_state_0.pth", "rng_state_1.pth"]
        assert report["same_after_resume"]
    assert reports[0]["weight"] == reports[1]["weight"]
    assert single["same_after_resume"]
    model = KnnForImageClassification.from_pretrained(folder / "checkpoint")
    assert model.datastore is not None
    assert model.datastore.ids.tolist() == list(range(43))
