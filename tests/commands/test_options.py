"""What `--help` offers is what the package takes: importing the package for it takes too long."""

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from inspect import Parameter, signature, unwrap
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import torch
import typer
from support.commands import as_checkpoint
from typer.testing import CliRunner

import hf_knn_cli
from hf_knn import KnnConfig, KnnTrainingArguments
from hf_knn.checkup.findings import OF_ONE_PICTURE
from hf_knn.data.decode import MAX_BYTES, Limits, limits_of_process
from hf_knn.data.places import reading_of
from hf_knn.features.backends import check_backend
from hf_knn.labelling.outcome import Place, write_outcome
from hf_knn.labelling.pool import Pool
from hf_knn.milvus.kinds import MilvusIndex
from hf_knn.training.arguments import FINE_TUNING, HEAD
from hf_knn_cli.choices import FINDING_KINDS
from hf_knn_cli.forwarding import Command, fields_as_options, hand_over
from hf_knn_cli.train_options import TrainOptions

NOT_OFFERED = "nonsense"
LIMITS = ("max_pixels", "max_bytes")

Parameters = dict[tuple[str, str], Parameter]
"""By command and name."""


def training(name: str) -> Callable[[Path], object]:
    given: dict[str, Any] = {"report_to": "none", "freeze_backbone": True, name: NOT_OFFERED}
    return lambda folder: KnnTrainingArguments(str(folder), **given)


REFUSED: dict[str, Callable[[Path], object]] = {
    "augmentation": training("augmentation"),
    "backend": lambda _: check_backend(NOT_OFFERED),
    "class_weights": training("class_weights"),
    "criterion": training("tune_criterion"),
    "folders": lambda place: write_outcome(
        Place.of(place), Pool(place, [], torch.empty(0), torch.empty(0), [], [], []),
        {}, {}, None, None, NOT_OFFERED, False,
    ),
    "head": training("head"),
    "on_bad_image": training("on_bad_image"),
    "precision": training("feature_precision"),
    "queries": training("knn_queries"),
    "splits": lambda _: reading_of(NOT_OFFERED),
    "sweep": training("probe_grid"),
}  # fmt: skip
"""How the package says what it takes instead, for each option that is a choice."""


def commands() -> dict[str, Any]:
    app: Any = hf_knn_cli.app
    return {
        command.callback.__name__: command.callback
        for group in app.registered_groups
        for command in group.typer_instance.registered_commands
    }


def parameters() -> Parameters:
    return {
        (name, parameter.name): parameter
        for name, command in commands().items()
        for parameter in signature(command).parameters.values()
        if get_args(parameter.annotation)  # all but the context
    }


def choices_of(parameter: Parameter) -> set[str]:
    """What a parameter may be besides None, if that is a choice; else nothing."""
    kind, _ = get_args(parameter.annotation)
    for part in (kind, *get_args(kind)):
        if get_origin(part) is Literal:
            return set(get_args(part))
    return set()


def taken_by_the_package(option: str, folder: Path) -> set[str]:
    with pytest.raises(ValueError, match="one of ") as refusal:
        REFUSED[option](folder)
    found = re.search(r"one of (\[.*?\])", str(refusal.value))
    assert found is not None
    return set(ast.literal_eval(found.group(1)))


def test_every_choice_is_one_of_the_package_and_none_is_missing(tmp_path: Path) -> None:
    every = {place: choices_of(parameter) for place, parameter in parameters().items()}
    offered = {place: choices for place, choices in every.items() if choices}
    assert {name for _, name in offered} == set(REFUSED)
    for (_, name), choices in offered.items():
        assert choices == taken_by_the_package(name, tmp_path), name


def test_choices_in_the_text_of_a_help_are_those_of_the_package() -> None:
    helps = {
        place: re.split(r"\W+", get_args(parameter.annotation)[1].help)
        for place, parameter in parameters().items()
    }
    assert {str(index).lower() for index in MilvusIndex} <= set(helps["milvus", "index"])
    with pytest.raises(ValueError, match="one of ") as refusal:
        KnnConfig(pooling=NOT_OFFERED)
    assert FINDING_KINDS == OF_ONE_PICTURE
    poolings = set(re.findall(r"'(\w+)'", str(refusal.value))) - {NOT_OFFERED}
    assert poolings <= set(helps["train", "pooling"])


def test_defaults_in_the_text_of_a_help_are_those_of_the_package() -> None:
    own = {option.name: option.default for option in fields(TrainOptions)}
    assert (own["epochs"], own["learning_rate"]) == (None, None)
    assert own["batch_size"] == FINE_TUNING.per_device_train_batch_size
    for name, values in (
        ("epochs", (HEAD.num_train_epochs, FINE_TUNING.num_train_epochs)),
        ("learning_rate", (HEAD.learning_rate, FINE_TUNING.learning_rate)),
    ):
        text = get_args(parameters()["train", name].annotation)[1].help
        assert re.findall(r"[\d.]+(?:e-\d+)?(?=,? )", text) == [f"{value:g}" for value in values]


def test_train_offers_its_options_and_what_no_command_takes() -> None:
    names = {name for command, name in parameters() if command == "train"}
    assert names == {option.name for option in fields(TrainOptions)} | {
        "config",
        "backend",
        *LIMITS,
    }


READERS = {"train", "evaluate", "tune", "predict", "sort", "teach", "doctor", "inspect", "demo",
           "forget", "serve", "label", "suggest"}  # fmt: skip


def test_every_command_that_reads_pictures_takes_their_limits() -> None:
    assert {command for command, name in parameters() if name in LIMITS} == READERS


@pytest.mark.parametrize("before", [None, "77"])
@pytest.mark.parametrize("command", sorted(READERS))
def test_limits_are_heard_of_during_one_command(
    command: str, before: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []

    def run(*_: Any, **__: Any) -> None:
        seen.append(limits_of_process())

    monkeypatch.setattr("hf_knn.commands.console.run", run)
    monkeypatch.delenv("HF_KNN_MAX_BYTES", raising=False)
    monkeypatch.delenv("HF_KNN_MAX_PIXELS", raising=False)
    if before:
        monkeypatch.setenv("HF_KNN_MAX_PIXELS", before)
    model, picture = str(as_checkpoint(tmp_path / "model")), tmp_path / "all" / "a.png"
    picture.parent.mkdir()
    picture.write_bytes(b"is not looked at")
    pictures = str(picture if command == "predict" else picture.parent)
    places = {
        "train": [pictures],
        "doctor": [pictures],
        "inspect": [model],
        "demo": [],
        "forget": [model],
        "serve": [model],
        "sort": [pictures, "--model", model, "--into", pictures + "-sorted"],
        "label": [pictures, "--model", model, "-o", pictures + "-labels"],
        "suggest": [pictures, "--model", model],
    }
    call = [command, *places.get(command, [model, pictures])]
    if command in ("train", "doctor"):
        call += ["--backbone", model]
    for options in (["--max-pixels", "500", "--max-bytes", "900"], []):
        done = CliRunner().invoke(hf_knn_cli.app, [*call, *options])
        assert done.exit_code == 0, done.output
    usual = None if before is None else int(before)
    assert seen == [Limits(900, 500), Limits(MAX_BYTES, usual)]
    done = CliRunner().invoke(hf_knn_cli.app, [*call, "--max-pixels", "0"])
    assert done.exit_code == 2


def test_the_functions_of_the_package_take_what_is_handed_to_them() -> None:
    handed = [c for c in commands().values() if signature(c).return_annotation == Command]
    assert len(handed) == 14
    for command in handed:
        values = dict.fromkeys(name for name in signature(command).parameters if name not in LIMITS)
        function = unwrap(command)(**values)
        values.pop("backend", None)
        signature(function).bind(**values)


# ---- how values reach a function ----------------------------------------------------------------


@dataclass(frozen=True)
class Wishes:
    place: Annotated[Path, typer.Argument()]
    count: Annotated[int, typer.Option("--number", min=1)] = 3
    names: Annotated[list[str], typer.Option("--name")] = field(default_factory=list)


def call(command: Callable[..., None], *arguments: str) -> int:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, arguments).exit_code


def test_each_field_is_an_option_with_its_type_default_and_check() -> None:
    seen: list[Any] = []

    @fields_as_options
    def wish(wishes: Wishes, loud: bool = False) -> None:
        seen.append((wishes, loud))

    assert call(wish, "here") == 0
    assert call(wish, "here", "--number", "5", "--name", "a", "--name", "b", "--loud") == 0
    assert seen == [
        (Wishes(Path("here")), False),
        (Wishes(Path("here"), 5, ["a", "b"]), True),
    ]
    assert call(wish, "here", "--number", "0") == 2
    assert call(wish) == 2
    assert len(seen) == 2


def test_what_is_declared_is_handed_over_by_name() -> None:
    seen: list[Any] = []

    @hand_over
    def declared(
        place: Path, count: Annotated[int, typer.Option("--number")] = 3, backend: str = ""
    ) -> Any:
        return lambda **values: seen.append(values)

    assert call(declared, "here", "--number", "5", "--backend", "torch") == 0
    assert seen == [{"place": Path("here"), "count": 5}]


def test_a_name_that_the_function_does_not_know_is_an_error() -> None:
    @hand_over
    def declared(place: Path) -> Any:
        return partial(int, base=10)

    assert call(declared, "here") == 1
