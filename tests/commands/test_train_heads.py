"""Which head `hf-knn train` trains, what it shows of the choice, and that Python chooses alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.commands import hf_knn, save_backbone, wide_terminal  # noqa: F401
from support.pictures import write_folder

from hf_knn import KnnForImageClassification, KnnTrainer, KnnTrainingArguments, load_splits
from hf_knn.commands.train import _arguments
from hf_knn.fit import choice as choice_module
from hf_knn.training import asking
from hf_knn_cli.train_options import TrainOptions


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    torch.manual_seed(0)
    save_backbone(folder / "backbone")
    write_folder(folder / "many" / "train", {"ant": 30, "bee": 30, "cat": 30})
    write_folder(folder / "many" / "test", {"ant": 8, "bee": 8, "cat": 8}, seed=500)
    write_folder(folder / "few" / "train", {"ant": 2, "bee": 2, "cat": 2})
    write_folder(folder / "few" / "test", {"ant": 8, "bee": 8, "cat": 8}, seed=500)
    return folder


@pytest.fixture
def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thousands of features take seconds."""
    compare = choice_module.compare_heads

    def fast(*args: Any, **options: Any) -> Any:
        return compare(*args, **{"heads": ("linear", "ridge", "lda")} | options)

    monkeypatch.setattr(asking, "compare_heads", fast)


def train(place: Path, output: Path, *options: object, pictures: str = "many") -> Any:
    return hf_knn(
        "train", place / pictures, "--backbone", place / "backbone", "-o", output, *options
    )


def by_python(place: Path, folder: Path, pictures: str) -> KnnTrainer:
    splits = load_splits(str(place / pictures))
    names = splits["train"].features["label"].names
    model = KnnForImageClassification.from_backbone(place / "backbone", names)
    args = KnnTrainingArguments(
        str(folder), freeze_backbone=True, report_to="none", disable_tqdm=True
    )
    trainer = KnnTrainer(model, args, train_dataset=splits["train"])
    trainer.train()
    trainer.tune()
    model.save_pretrained(folder / "model")
    return trainer


@pytest.mark.parametrize("pictures", ["many", "few"])
def test_command_and_python_choose_alike(
    pictures: str, place: Path, without_kernel: None, tmp_path: Path
) -> None:
    done = train(place, tmp_path / "command", pictures=pictures)
    assert done.exit_code == 0, done.stderr
    trainer = by_python(place, tmp_path, pictures)
    choice = trainer.head_choice
    assert choice is not None
    configs = [
        json.loads((folder / "config.json").read_text())
        for folder in (tmp_path / "command", tmp_path / "model")
    ]
    same = ("head", "k", "knn_temperature", "knn_weight", "head_regularizer", "head_temperature")
    for name in (*same, "answer_thresholds"):
        assert configs[0][name] == configs[1][name], name
    assert configs[0]["head"] == choice.head
    weights = [
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "command", tmp_path / "model")
    ]
    for name, value in weights[0].items():
        if name.startswith("head."):
            assert torch.equal(value, weights[1][name]), name
    report = json.loads((tmp_path / "command" / "train-report.json").read_text())
    assert report["head"] == json.loads(json.dumps(choice.as_json()))
    assert len(report["head"]["table"]) == (3 if pictures == "many" else 0)


def test_the_table_that_it_chose_by_is_printed(
    place: Path, without_kernel: None, tmp_path: Path
) -> None:
    done = train(place, tmp_path / "model")
    report = json.loads((tmp_path / "model" / "train-report.json").read_text())
    lines = done.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if "How often each head is right" in line)
    for column in ("head", "alone", "with neighbours", "which count", "log-likelihood"):
        assert any(column in line for line in lines[start : start + 4]), column
    for score in report["head"]["table"]:
        line = next(line for line in lines[start:] if score["head"] in line)
        assert f"{score['alone']['accuracy']:.1%}" in line
        assert f"{score['with_neighbors']['accuracy']:.1%}" in line
        assert f"{score['with_neighbors']['log_likelihood']:.3f}" in line
        assert ("chosen" in line) == (score["head"] == report["head"]["chosen"])
    assert "Best of 3 heads on 45 rows held out" in done.stdout


def test_too_few_labels_to_compare_are_said(place: Path, tmp_path: Path) -> None:
    done = train(place, tmp_path / "model", pictures="few")
    assert done.exit_code == 0, done.stderr
    assert "Too few labels to compare heads by" in done.stdout
    assert "How often each head is right" not in done.stdout
    assert json.loads((tmp_path / "model" / "config.json").read_text())["head"] == "ridge"


ASKING: list[tuple[tuple[object, ...], str, str]] = [
    (("--epochs", 2), "linear", "--epochs"),
    (("--learning-rate", 0.01), "linear", "--learning-rate"),
    (("--learning-rate", 1e-3, "--epochs", 60), "linear", "--epochs, --learning-rate"),
    (("--sweep", "small"), "linear", "--sweep"),
    (("--alpha", 0.1), "linear", "--alpha"),
    (("--label-smoothing", 0.1), "linear", "--label-smoothing"),
    (("--fine-tune", "--epochs", 1), "linear", "--fine-tune, --epochs"),
    (("--hidden", 8), "mlp", "--hidden"),
    (("--hidden", 8, "--epochs", 2), "mlp", "--hidden"),
]


@pytest.mark.parametrize(
    ("options", "head", "named"),
    [
        pytest.param(*asking, marks=() if "--epochs" in asking[0] else pytest.mark.slow)
        for asking in ASKING
    ],
)
def test_an_option_that_one_head_uses_chooses_it(
    options: tuple[object, ...], head: str, named: str, place: Path, tmp_path: Path
) -> None:
    done = train(place, tmp_path / "model", *options, pictures="few")
    assert done.exit_code == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert f"The head is {head}, which {named} asks for." in first
    assert json.loads((tmp_path / "model" / "config.json").read_text())["head"] == head
    report = json.loads((tmp_path / "model" / "train-report.json").read_text())
    assert report["head"] is None
    assert report["options"]["head"] == head


@pytest.mark.parametrize(("options", "head", "named"), ASKING)
@pytest.mark.parametrize("other", ["ridge", "kernel", "lda", "linear"])
def test_and_is_refused_beside_another(
    other: str, options: tuple[object, ...], head: str, named: str, place: Path, tmp_path: Path
) -> None:
    if other == head:
        return
    done = train(place, tmp_path / "model", *options, "--head", other)
    assert done.exit_code == 1
    assert f"with {named}" in done.stderr
    assert f"--head {other}" in done.stderr
    assert not (tmp_path / "model").exists()


def test_a_head_that_is_named_is_trained(place: Path, tmp_path: Path) -> None:
    done = train(place, tmp_path / "model", "--head", "lda")
    assert done.exit_code == 0, done.stderr
    assert "How often each head is right" not in done.stdout
    assert "Lda head: smoothing (regulariser)" in done.stdout
    assert json.loads((tmp_path / "model" / "config.json").read_text())["head"] == "lda"


def test_defaults_of_command_and_arguments_ask_for_the_same_head(tmp_path: Path) -> None:
    command = _arguments(TrainOptions("pictures"), tmp_path)
    python = KnnTrainingArguments(str(tmp_path), freeze_backbone=True)
    assert (command.head, command.of_descent) == (python.head, python.of_descent) == ("auto", [])
