"""`hf-knn label --terminal` and `hf-knn suggest`, with keys that are piped in."""

import json
import shutil
import sys
from io import StringIO
from pathlib import Path

import pytest
from support.commands import save_backbone, wide_terminal  # noqa: F401, a fixture
from support.labelling import open_made, word_of
from support.pictures import write_folder
from typer.testing import CliRunner, Result

import hf_knn_cli
from hf_knn import KnnForImageClassification
from hf_knn.commands.keyboard import END, ENTER, Keyboard
from hf_knn.commands.label import Asked
from hf_knn.labelling import Group, Picture, Session


def typed(*arguments: object, keys: str = "") -> Result:
    runner = CliRunner(env={"COLUMNS": "200"})
    return runner.invoke(hf_knn_cli.app, [str(each) for each in arguments], input=keys)


def hear(session: Session, keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO(keys))
    Asked(session, Keyboard()).until_the_end()


@pytest.mark.parametrize("keys", ["1u2", "1\nu\n2\n", "1\r\nu\r\n2\r\n"])
def test_keys_may_come_one_after_the_other_or_one_a_line(
    keys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO(keys))
    board = Keyboard()
    assert [board.key() for _ in range(4)] == ["1", "u", "2", END]


@pytest.mark.parametrize("keys", ["nred fox\n\n1", "n\nred fox\n\n1", "n red fox\n\n1\n"])
def test_a_name_goes_up_to_the_end_of_its_line(keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO(keys))
    board = Keyboard()
    assert (board.key(), board.line("Name: ")) == ("n", "red fox")
    assert [board.key() for _ in range(3)] == [ENTER, "1", END]
    assert board.line("Name: ") is None


def test_a_dialogue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = open_made(tmp_path, count=18, groups=1)
    first = session.question()
    assert isinstance(first, Group)
    hear(session, "-1\nn owl\n", monkeypatch)
    assert session.progress().by_label == {"owl": len(first.pictures) - 1}
    second = session.question()
    assert isinstance(second, Picture)
    hear(session, "n elk\n", monkeypatch)
    guess = session.question()
    assert isinstance(guess, Picture)
    capsys.readouterr()
    hear(session, "\n", monkeypatch)  # Enter takes the guess
    said = capsys.readouterr().out
    best = guess.guesses[0]
    assert f"Guess: {best.label} {best.probability:.1%}" in said
    assert f"{word_of(guess.picture)}/{guess.picture.name}" in said
    assert "1 owl · 2 elk · n name a class · s skip · u undo · f finish" in said
    by_label = session.progress().by_label
    assert sum(by_label.values()) == len(first.pictures) + 1
    hear(session, "1s" + "u" * 9, monkeypatch)  # and everything back
    assert session.progress().labelled == session.progress().skipped == 0
    hear(session, "zx\n-0\nn\n.hidden\nf1", monkeypatch)  # nothing of this is an answer
    assert session.progress().labelled == 0


def test_copies_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("ant/000.png", "ant/003.png"), ("bee/001.png", "bee/004.png")]
    session = open_made(tmp_path, count=18, groups=0, copies=pairs)
    hear(session, "32a", monkeypatch)  # there is no third one
    assert session._state.dropped == {"ant/000.png"}
    assert isinstance(session.question(), Picture)


def test_the_command_from_pictures_to_a_csv_and_on(tmp_path: Path) -> None:
    pictures = write_folder(tmp_path / "in", {"ant": 4, "dog": 4})
    backbone, out = save_backbone(tmp_path / "backbone"), tmp_path / "out"
    options = ("--backbone", backbone, "-o", out, "--terminal", "--groups", 0, "--no-checkpoint")
    done = typed("label", pictures, *options, "--folders", "copy", keys="n ant\nn dog\n\nf")
    assert done.exit_code == 0, done.output
    assert "3 pictures have their labels in" in done.output
    assert len((out / "labels.csv").read_text().splitlines()) == 4
    assert len([*(out / "pictures").rglob("*.png")]) == 3
    again = typed("label", pictures, *options, keys="u")
    assert "Going on: 3 labelled, 5 left." in again.output
    assert "Taken back:" in again.output
    assert len((out / "labels.csv").read_text().splitlines()) == 3
    found = typed("suggest", pictures, "--backbone", backbone, "-n", 3)
    paths = found.stdout.splitlines()
    assert len(paths) == 3
    assert all(Path(path).is_file() for path in paths)


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "a.png").touch()
    for arguments, said in [
        (("label", tmp_path / "a.png", "--terminal"), "a folder of pictures"),
        (("label", tmp_path / "in", "--terminal", "--groups", -1), "--groups"),
        (("suggest", tmp_path / "nowhere"), "there is nothing there"),
        (("suggest", tmp_path / "in", "-o", tmp_path / "x.txt"), "a file for answers"),
    ]:
        done = typed(*arguments)
        assert done.exit_code in (1, 2)
        assert said in done.output


@pytest.mark.slow
def test_a_checkpoint_at_the_end_and_labels_on_top_of_it(tmp_path: Path) -> None:
    pictures = write_folder(tmp_path / "in", {"ant": 9, "dog": 9})
    shutil.copy(pictures / "ant" / "0.png", pictures / "ant" / "copy.png")
    backbone, out = save_backbone(tmp_path / "backbone"), tmp_path / "first"
    done = typed(
        "label", pictures, "--backbone", backbone, "-o", out, "--terminal", "--groups", 0,
        keys="1n ant\nn dog\n" + "\n" * 10,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "Keep one" in done.output
    model = KnnForImageClassification.from_pretrained(out / "model")
    assert sorted(model.config.class_names) == ["ant", "dog"]
    assert model.datastore is not None
    assert len(model.datastore) == 12
    asked = typed("suggest", pictures, "--model", out / "model", "-n", 50, "--json")
    documents = json.loads(asked.stdout)
    assert len(documents) in (6, 7)  # the copy is the same picture, labelled or not
    assert all(one["guess"] in ("ant", "dog") for one in documents)
    (pictures / "ant" / "copy.png").unlink()
    more = typed(
        "label", pictures, "--model", out / "model", "-o", tmp_path / "second.csv", "--terminal",
        "--groups", 0, keys="n eel\nf",
    )  # fmt: skip
    assert more.exit_code == 0, more.output
    assert "are in the checkpoint already" in more.output
    taught = KnnForImageClassification.from_pretrained(tmp_path / "second" / "model")
    assert sorted(taught.config.class_names) == ["ant", "dog", "eel"]
    assert len(taught.datastore or ()) == 13
    assert "eel" in (tmp_path / "second.csv").read_text()
    kept = KnnForImageClassification.from_pretrained(out / "model")  # it stays as it was
    assert len(kept.datastore or ()) == 12


@pytest.mark.slow
def test_the_order_is_that_in_which_a_session_asks(tmp_path: Path) -> None:
    pictures = write_folder(tmp_path / "in", {"ant": 6, "dog": 6, "eel": 6})
    backbone = save_backbone(tmp_path / "backbone")
    paths = typed("suggest", pictures, "--backbone", backbone, "-n", 50).stdout.splitlines()
    with Session.open(pictures, tmp_path / "out", backbone=str(backbone), groups=0) as session:
        wanted = [str(pictures / name) for name in session.suggestions(50)]
        question = session.question()
        assert isinstance(question, Picture)
        assert wanted[0] == str(question.picture)
    assert paths == wanted
    assert len(paths) == 18
