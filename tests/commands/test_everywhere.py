"""What every command takes, before its name or behind it; completion, exit codes and Ctrl-C."""

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from support.commands import as_checkpoint, hf_knn, save_backbone
from support.pictures import write_folder
from typer.main import get_command
from typer.testing import CliRunner

import hf_knn as package
import hf_knn_cli
from hf_knn.checkup.findings import Kind
from hf_knn.commands import stopping
from hf_knn.commands.console import console
from hf_knn.commands.devices import check_device
from hf_knn_cli.choices import ALL_KINDS
from hf_knn_cli.terminal import command_typed

GROUP: Any = get_command(hf_knn_cli.app)
COMMANDS = sorted(GROUP.commands)
SEEN = ("HF_KNN_DEBUG", "HF_KNN_VERBOSITY", "HF_KNN_DEVICE", "CUDA_VISIBLE_DEVICES")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What each command that is run would hear of its options."""
    found: list[dict[str, str]] = []

    def run(*_: Any, **__: Any) -> None:
        found.append({name: os.environ[name] for name in SEEN if name in os.environ})

    monkeypatch.setattr("hf_knn.commands.console.run", run)
    for name in SEEN:
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_them(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = GROUP.commands[name]
    taken = {option for each in command.params for option in each.opts}
    assert {"--version", "--quiet", "-q", "--verbose", "-v", "--debug"} <= taken
    assert len([each for each in command.params if "--version" in each.opts]) == 1
    computes = "backend" in {each.name for each in command.params}
    assert ("--device" in taken) == computes
    for words in ([name, "--version"], ["--version", name]):
        assert GROUP.main(words, standalone_mode=False) == 0
        assert capsys.readouterr().out == f"hf-knn {package.__version__}\n"


def test_the_version_is_that_of_the_package() -> None:
    assert version("hf-knn") == package.__version__


@pytest.mark.parametrize(
    ("option", "heard"),
    [
        ("--debug", {"HF_KNN_DEBUG": "1"}),
        ("-q", {"HF_KNN_VERBOSITY": "quiet"}),
        ("--quiet", {"HF_KNN_VERBOSITY": "quiet"}),
        ("-v", {"HF_KNN_VERBOSITY": "verbose"}),
        ("--verbose", {"HF_KNN_VERBOSITY": "verbose"}),
    ],
)
def test_before_the_command_or_behind_it(
    option: str, heard: dict[str, str], seen: list[dict[str, str]]
) -> None:
    for words in ([option, "cache"], ["cache", option], ["cache"]):
        assert hf_knn(*words).exit_code == 0
    assert seen == [heard, heard, {}]


@pytest.mark.parametrize("words", [["-q", "-v", "cache"], ["-q", "cache", "-v"], ["cache", "-qv"]])
def test_more_and_less_at_once_is_refused(words: list[str], seen: list[dict[str, str]]) -> None:
    done = hf_knn(*words)
    assert done.exit_code == 2
    assert "Expected one of --quiet and --verbose" in done.stderr
    assert not seen


def test_a_device_is_heard_of_by_the_commands_that_compute(
    seen: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_knn.commands.devices.check_device", lambda name: None)
    model, picture = as_checkpoint(tmp_path / "model"), tmp_path / "a.png"
    picture.touch()
    predict = ["predict", model, picture]
    for words in ([*predict, "--device", "cpu"], ["--device", "cpu", *predict], predict):
        assert hf_knn(*words).exit_code == 0
    assert hf_knn(*predict, "--device", "cuda:1").exit_code == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert hf_knn(*predict, "--device", "cuda:1").exit_code == 0
    assert hf_knn(*predict, "--device", "cuda:2").exit_code == 1
    assert [each["HF_KNN_DEVICE"] for each in seen] == ["cpu", "cpu", "auto", "cuda", "cuda"]
    assert [each.get("CUDA_VISIBLE_DEVICES") for each in seen[3:]] == ["1", "7"]
    monkeypatch.setenv("HF_KNN_DEVICE", "mps")
    assert hf_knn(*predict).exit_code == 0
    assert seen[-1]["HF_KNN_DEVICE"] == "mps"
    assert hf_knn(*predict, "--device", "gpu").exit_code == 2
    assert "log computes no features" in hf_knn("--device", "cpu", "log", model).stderr
    assert hf_knn("log", model, "--device", "cpu").exit_code == 2
    assert hf_knn("demo", model, "--push", "a/b", "--device", "cpu").exit_code == 2


def test_a_device_that_is_not_there_is_said() -> None:
    assert str(check_device("cpu")) == "cpu"
    with pytest.raises(ValueError, match="the device cuda:99 to be there, but: "):
        check_device("cuda:99")


def test_quiet_leaves_advice_and_bars_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for verbosity, said in ("", "result\nNext: more\n"), ("quiet", "result\n"):
        monkeypatch.setenv("HF_KNN_VERBOSITY", verbosity)
        console.print("result")
        console.print("Next: [bold]more[/]")
        with console.status("Working …"):
            assert capsys.readouterr().out == said


def test_verbose_says_versions_device_and_time() -> None:
    done = hf_knn("cache", "-v")
    assert done.exit_code == 0
    assert f"hf-knn {package.__version__}, Python " in done.stderr
    assert "device cpu" in done.stderr
    assert "s of processor time" in done.stderr
    assert hf_knn("cache").stderr == ""


# ---- completion ---------------------------------------------------------------------------------


def completed(line: str) -> list[str]:
    words = line.split(" ")
    environment = {
        "_HF_KNN_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1),
    }  # fmt: skip
    done = CliRunner(env=environment).invoke(hf_knn_cli.app, [], prog_name="hf-knn")
    assert done.exit_code == 0
    assert done.stderr == ""  # nothing is complained of while one types
    return done.stdout.split()


def test_a_shell_completes_folders_labels_backbones_and_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"model_type": "hf_knn", "id2label": {"0": "cat", "1": "cow", "2": "dog"}}
    (as_checkpoint(tmp_path / "mine") / "config.json").write_text(json.dumps(settings))
    (tmp_path / "more").mkdir()
    as_checkpoint(tmp_path / "more" / "other")
    (tmp_path / "more" / ".hidden").mkdir()
    assert completed("hf-knn predict m") == ["mine", "more/"]
    assert completed("hf-knn undo more/") == ["more/other"]
    assert completed("hf-knn forget mine --label c") == ["cat", "cow"]
    assert completed("hf-knn teach mine pictures --label d") == ["dog"]
    assert completed("hf-knn teach nowhere pictures --label d") == []
    assert completed("hf-knn train pictures --backbone siglip2-") == ["siglip2-b", "siglip2-l"]
    assert completed("hf-knn doctor pictures --backbone mi") == ["mine"]
    assert completed("hf-knn predict mine x --device cu") == ["cuda", "cuda:1"]
    assert "predict" in completed("hf-knn pre")
    assert "--debug" in completed("hf-knn undo mine --de")


def test_completion_can_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--install-completion" in hf_knn("--help").stdout
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # then it is named
    done = CliRunner().invoke(hf_knn_cli.app, ["--show-completion", "bash"], prog_name="hf-knn")
    assert done.exit_code == 0
    assert "_HF_KNN_COMPLETE=complete_bash" in done.stdout


# ---- exit codes and Ctrl-C ----------------------------------------------------------------------


def test_exit_codes_are_said_and_so(tmp_path: Path) -> None:
    said = " ".join(hf_knn("--help").stdout.split())
    for words in ("0 done", "1 an error", "2 a command", "3 doctor found", "130 stopped"):
        assert words in said
    assert hf_knn("log", tmp_path).exit_code == 1
    assert hf_knn("log").exit_code == 2
    assert hf_knn("lgo").exit_code == 2
    assert hf_knn("log", "--nonsense").exit_code == 2


def test_doctor_fails_on_what_it_is_told(tmp_path: Path) -> None:
    assert tuple(map(str, sorted(Kind, key=ALL_KINDS.index))) == ALL_KINDS
    pictures = write_folder(tmp_path / "pictures", {"elk": 3, "fox": 3})
    (pictures / "elk" / "bad.png").write_bytes(b"no picture")
    options = ["--backbone", save_backbone(tmp_path / "backbone"), "-o", tmp_path / "report"]
    for kinds, code in (None, 0), ("near_duplicate,broken", 3), ("not_read", 0), ("any", 3):
        failing = [] if kinds is None else ["--fail-on", kinds]
        done = hf_knn("doctor", pictures, *options, *failing, "--json")
        assert done.exit_code == code, done.output
        assert json.loads(done.stdout)["counts"]["broken"] == 1
    assert hf_knn("doctor", pictures, *options, "--fail-on", "brokne").exit_code == 2
    assert hf_knn("doctor", "--undo", tmp_path, "--fail-on", "any").exit_code == 2


def test_ctrl_c_before_the_work_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_knn.commands.console.run", interrupt)
    done = hf_knn("cache")
    assert done.exit_code == 130
    assert "Stopped before anything was done." in done.stderr


def test_a_folder_that_was_exchanged_is_told_from_one_that_was_not(tmp_path: Path) -> None:
    model = tmp_path / "model"
    stopping.begin()
    stopping.stands_or_falls(model)
    stopping.goes_on_with(lambda: ["--resume"])
    assert stopping.sentence("hf-knn train x") == (
        f"Stopped. {model} was not made yet.\nTo go on, or to begin again: hf-knn train x --resume"
    )
    assert stopping.sentence("hf-knn train x --resume").endswith("train x --resume")
    model.mkdir()
    assert f"{model} holds the new version, whole" in stopping.sentence("hf-knn")
    stopping.begin()
    stopping.stands_or_falls(model)
    assert f"{model} is as it was." in stopping.sentence("hf-knn")
    model.rename(tmp_path / "old")
    model.mkdir()
    assert f"`hf-knn undo {model}` takes it back" in stopping.sentence("hf-knn")


def test_a_token_is_not_shown_again(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["hf-knn", "push", "m", "a/b", "--token", "hf_secret", "--token=hf_other"]
    monkeypatch.setattr("sys.argv", words)
    assert "hf_" not in command_typed()
    assert command_typed().endswith("push m a/b --token TOKEN --token=TOKEN")


def test_a_new_command_gets_them_too() -> None:
    from hf_knn_cli.everywhere import Commands, options_everywhere

    app, heard = typer.Typer(cls=Commands), []

    @app.command()
    def sort(model: str, backend: str = "auto") -> None:
        heard.append((model, backend, os.environ["HF_KNN_DEVICE"], os.environ["HF_KNN_DEBUG"]))

    app.callback()(options_everywhere)
    done = CliRunner().invoke(app, ["sort", "m", "--device", "cpu", "--debug"])
    assert done.exit_code == 0, done.output
    assert heard == [("m", "auto", "cpu", "1")]
