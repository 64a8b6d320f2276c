"""What reaches a terminal, whatever names and texts hold and whatever it can show."""

import io
import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from rich.table import Table

from hf_knn.commands.console import Terminal, escape, json_text, run, say_error
from hf_knn_cli import terminal
from hf_knn_cli.terminal import Guarded, as_called, called, clean, one_line, prepare_streams

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x1b[31m\x9b1mcat\u202e\u2066\u061c\u2028\r\x7f"
SHOWN = "]0;owned[2J[31m1mcat"


class Screen(io.StringIO):
    """A stream that is, or is not, a terminal."""

    def __init__(self, is_terminal: bool = False) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.fixture(autouse=True)
def plain_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)


def is_clean(text: str) -> bool:
    marks = {"\u202e", "\u2066", "\u061c", "\u2028"}
    return not [c for c in text if c != "\n" and (unicodedata.category(c) == "Cc" or c in marks)]


def test_names_lose_what_controls_a_terminal_and_nothing_else() -> None:
    assert clean(HOSTILE) == SHOWN
    assert one_line("a\nb\r\nc\td") == "a b c d"
    family = "Füchse 🦊👨‍👩‍👧 日本"
    assert one_line(family) == family
    assert clean("two\nlines\tand a tab") == "two\nlines\tand a tab"
    assert clean("a\udcff.jpg") == "a\\udcff.jpg"  # a byte of a name that is no text


def test_a_console_cleans_texts_tables_and_titles_and_keeps_its_own_style() -> None:
    screen = Screen()
    console = Terminal()
    console.file = screen
    table = Table("class", title=HOSTILE)
    table.add_row(HOSTILE)
    console.print(table)
    console.print(f"[bold]{HOSTILE}[/]")
    console.rule(HOSTILE)
    said = screen.getvalue()
    assert is_clean(said)
    assert said.count(SHOWN) == 4


def test_a_name_is_one_line_and_no_markup() -> None:
    screen = Screen()
    console = Terminal()
    console.file = screen
    console.print(escape("a\nError: [red]pay[/]"), soft_wrap=True)
    assert screen.getvalue() == "a Error: [red]pay[/]\n"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_what_libraries_write_is_guarded(is_terminal: bool) -> None:
    screen = Screen(is_terminal)
    stream = Guarded(screen)
    assert stream.write(HOSTILE) == len(HOSTILE)
    stream.writelines(["\rbar 10%", "\x1b[A\x1b[A", "\n"])
    rest = screen.getvalue()
    assert "\x1b[2J" not in rest
    assert "\x1b]0" not in rest
    assert "\u202e" not in rest
    assert "\rbar 10%" in rest
    assert ("\x1b[31m" in rest) == is_terminal  # a colour does no harm
    assert ("\x1b[A" in rest) == is_terminal
    assert stream.isatty() == is_terminal


def test_a_line_cannot_be_overwritten_from_inside() -> None:
    screen = Screen(is_terminal=True)
    Guarded(screen).write("harmless\rpay\x1b[A")
    assert screen.getvalue() == "harmlesspay[A"


def test_colours_that_were_asked_for_go_through_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    screen = Screen()
    Guarded(screen).write("\x1b[1mbold\x1b[0m\x1b[2J")
    assert screen.getvalue() == "\x1b[1mbold\x1b[0m[2J"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_no_encoding_ends_a_command(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding))
    prepare_streams()
    console = Terminal()
    table = Table("λ", title="狐 é")
    table.add_row("k → 1")
    console.print(table)
    sys.stdout.flush()
    said = raw.getvalue().decode(encoding)
    if encoding == "utf-8":
        assert "狐 é" in said
        assert "λ" in said
    else:
        assert "\\u72d0" in said
        assert "lambda" in said
        assert "k -> 1" in said
    stream = sys.stdout
    prepare_streams()
    assert sys.stdout is stream  # twice does no harm


def test_closed_streams_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    prepare_streams()
    print("nobody reads this")


def test_json_is_what_every_parser_takes_and_no_terminal_obeys() -> None:
    value = {
        "name": HOSTILE + "狐", "nan": float("nan"), "more": [float("inf"), (1, 2.5)], "λ": None,
        "surrogate": "\udcff",
    }  # fmt: skip
    for ascii_only in (False, True):
        text = json_text(value, ascii_only=ascii_only)
        assert is_clean(text)
        found = json.loads(text)
        assert found["name"] == HOSTILE + "狐"
        assert found["nan"] is None
        assert found["more"] == [None, [1, 2.5]]
        assert found["surrogate"] == "\udcff"
        assert text.isascii() == ascii_only
        text.encode("utf-8")


def test_an_error_is_one_clean_line(capsys: pytest.CaptureFixture[str]) -> None:
    say_error(f"{HOSTILE}\nsecond [line]")
    said = capsys.readouterr().err
    assert said == f"Error: {SHOWN}  second [line]\n"


def test_under_json_stdout_holds_the_document_alone(capsys: pytest.CaptureFixture[str]) -> None:
    from hf_knn.commands.console import console, print_json

    def command() -> None:
        console.print("Skipped one.")
        print("a library says something")
        print_json({"answer": 1})
        console.print("Written: page.html")

    run(command, json_output=True)
    out, err = capsys.readouterr()
    assert json.loads(out) == {"answer": 1}
    assert err.splitlines() == ["Skipped one.", "a library says something", "Written: page.html"]


def test_an_error_under_json_leaves_stdout_empty(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    from hf_knn.commands.console import print_json

    def command() -> None:
        print_json({"answer": 1})
        raise OSError("the page cannot be written")

    with pytest.raises(typer.Exit) as left:
        run(command, json_output=True)
    assert left.value.exit_code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "Error: the page cannot be written.\n"


@pytest.mark.parametrize(
    ("program", "wanted"),
    [
        ("{bin}/hf-knn", "hf-knn"),
        ("{other}/hf-knn", "elsewhere/hf-knn"),
        ("{other}/hf_knn_cli/__main__.py", "{python} -m hf_knn_cli"),
        ("-c", "hf-knn"),
        ("", "hf-knn"),
    ],
)
def test_hints_name_what_was_called(
    program: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"bin": tmp_path / "bin", "other": tmp_path / "elsewhere"}
    for folder in places.values():
        folder.mkdir()
        (folder / "hf-knn").write_text("#!/bin/sh\n")
        (folder / "hf-knn").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(places["bin"]))
    monkeypatch.setattr(sys, "argv", [program.format(**places)])
    wanted = wanted.format(python=terminal._typed(Path(sys.executable)))
    assert called() == wanted
    assert as_called("run `hf-knn undo x`; hf-knn is a name") == (
        f"run `{wanted} undo x`; hf-knn is a name"
    )


def test_what_typer_says_of_a_command_line_is_clean(tmp_path: Path) -> None:
    """In a process of its own: the streams are guarded when the program begins."""
    done = subprocess.run(
        [sys.executable, "-m", "hf_knn_cli", "cache", HOSTILE, "--no-such"], capture_output=True,
        check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 2
    assert is_clean((done.stdout + done.stderr).decode("utf-8"))
