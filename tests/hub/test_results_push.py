"""Results of a benchmark as a dataset of the Hub."""

from pathlib import Path

import pytest
from datasets import load_dataset
from support.benchmark_cells import Plan, write_run
from support.hub_server import Hub
from typer.testing import CliRunner

from report import app
from reporting.push import push_results

REPO = "org/results"
PLAN = Plan(tasks=("digits",), backbones=("lite0",), protocols=("linear",), seeds=(0, 1), near=0)


def test_results_are_pushed_in_one_commit_and_open_as_a_dataset(hub: Hub, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", PLAN)
    (folder / "notes.txt").write_text("mine")
    found = CliRunner().invoke(app, [str(folder), "--no-pictures", "--push", REPO])
    assert found.exit_code == 0, found.output
    repo = hub.repo(REPO, "dataset")
    assert len(repo.history()) == 1
    files = hub.files(REPO, "main", "dataset")
    assert {"run.json", "report.html", "results.parquet", "README.md"} <= files.keys()
    assert len([name for name in files if name.startswith("cells/")]) == 4
    assert "notes.txt" not in files
    table = load_dataset(REPO, cache_dir=str(tmp_path / "cache"))["train"]
    assert len(table) == 14
    assert set(table["protocol"]) == {"linear"}


def test_a_folder_without_a_report_is_not_pushed(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"report\.md"):
        push_results(write_run(tmp_path / "run", PLAN), REPO)
