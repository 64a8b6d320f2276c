"""`training_args.json` is pushed with a model: how it was trained, not where or by whom."""

import json
from pathlib import Path

import pytest

from hf_knn import KnnTrainingArguments
from hf_knn.training.arguments import ARGUMENTS_NAME


def written(folder: Path, **options: object) -> str:
    arguments = KnnTrainingArguments(report_to=[], **options)  # type: ignore[arg-type]
    arguments.write_json(folder)
    return (folder / ARGUMENTS_NAME).read_text()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output_dir", "/home/anna.secret/run"), ("output_dir", "runs/anna.secret"),
        ("output_dir", "~/anna.secret"), ("output_dir", "anna.secret"),
        ("run_name", "anna.secret"), ("resume_from_checkpoint", "anna.secret/checkpoint-3"),
        ("hub_token", "hf_anna.secret"), ("group_by", "/home/anna.secret/groups"),
        ("optim_args", "cache=/home/anna.secret"), ("optim_args", "a=1,cache=~/anna.secret"),
        ("lr_scheduler_kwargs", {"file": "C:\\anna.secret"}), ("optim_args", "D:/anna.secret"),
        ("optim_args", "cache=../anna.secret"), ("optim_args", "cache=./anna.secret"),
    ],
)  # fmt: skip
def test_no_place_and_no_token_is_written(tmp_path: Path, name: str, value: object) -> None:
    options = {"output_dir": str(tmp_path / "out")} | {name: value}
    text = written(tmp_path, **options)
    assert "anna.secret" not in text
    assert str(tmp_path) not in text
    assert json.loads(text)["knn_index"] == "auto"


def test_the_recipe_is_written(tmp_path: Path) -> None:
    recipe = {
        "learning_rate": 1e-3, "knn_loss_alpha": 0.5, "knn_index": "PCA8,IVF32,Flat",
        "optim_args": "beta=0.9", "hub_model_id": "org/name", "seed": 7,
        "group_by": "patient/visit",
    }  # fmt: skip
    found = json.loads(written(tmp_path, output_dir="out", **recipe))
    assert {name: found[name] for name in recipe} == recipe
