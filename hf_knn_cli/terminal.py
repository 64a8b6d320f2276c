"""What a terminal is sent: no control characters of somebody's text, in any encoding."""

import codecs
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, TextIO, cast

_CONTROLS = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
"""Controls but for tab and line feed, turns of direction, other line ends, unpaired surrogates."""

HIDDEN = re.compile(_CONTROLS)
_WRITTEN = re.compile(
    r"(?P<always>\A\r|\r\n)|(?P<bar>\A(?:\x1b\[A)+\Z)|(?P<colour>\x1b\[[0-9;]*m)|" + _CONTROLS
)
"""What libraries write; a progress bar begins with \\r, and moves up by a write of its own."""

_FORCED = ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS")
"""Variables by which typer and rich colour what goes into a pipe."""

_SPELLED = {
    "\u03bb": "lambda", "\u03b1": "alpha", "\u2026": "...", "\u2192": "->", "\u2212": "-",
    "\u2013": "-", "\u00b7": "-", "\u2501": "-", "\u2578": "-", "\u257a": "-", "\u00b1": "+-",
    "\u00d7": "x", "\u2022": "*",
}  # fmt: skip
"""What this project prints itself beyond ASCII, for streams that do not know it."""

_PROGRAM = "hf-knn"
_ERRORS = "hf_knn.spelled"


def clean(text: str) -> str:
    """A text without control characters and turns of direction; lines and tabs stay.

    Args:
        text: any.
    """
    return HIDDEN.sub(_shown, text)


def one_line(text: object) -> str:
    """Likewise in one line: what a name, a path or an error of somebody else is shown as.

    Args:
        text: any; what it says as a string.
    """
    return clean(" ".join(re.split(r"[\r\n\t\v\f]+", str(text))))


def called() -> str:
    """What to type for `hf-knn`: as it was called, where that is no command of the shell."""
    program = Path(sys.argv[0] if sys.argv and sys.argv[0] else _PROGRAM)
    if program.parent.name == "hf_knn_cli" and program.name == "__main__.py":
        return f"{_typed(Path(sys.executable))} -m hf_knn_cli"
    if program.stem != _PROGRAM:
        return _PROGRAM  # from Python: as the manual names it
    found = shutil.which(_PROGRAM)
    if found is not None and os.path.realpath(found) == os.path.realpath(program):
        return _PROGRAM
    return _typed(program)


def command_typed() -> str:
    """The command line of this process, to be typed again; a token is not shown."""
    words = [re.sub(r"^--token=.*", "--token=TOKEN", clean(word)) for word in sys.argv[1:]]
    for place, word in enumerate(words[:-1]):
        if word == "--token":
            words[place + 1] = "TOKEN"
    return f"{called()} {shlex.join(words)}".strip()


def as_called(sentence: str) -> str:
    """A sentence whose `hf-knn …` in backticks is what can be typed here.

    Args:
        sentence: of this project.
    """
    return sentence.replace(f"`{_PROGRAM} ", f"`{called()} ")


def is_utf8(stream: TextIO) -> bool:
    """Whether a stream takes every character.

    Args:
        stream: such as `sys.stdout`.
    """
    name = getattr(stream, "encoding", None) or "utf-8"
    return codecs.lookup(name).name in ("utf-8", "utf-8-sig")


def prepare_streams() -> None:
    """Makes stdout and stderr of this process streams that never end a command.

    What they cannot encode is spelled, and what other libraries write (warnings, bars, tracebacks,
    the errors of typer) holds no control characters but the colours and moves of a terminal.
    """
    codecs.register_error(_ERRORS, _spell)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started the process
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as it runs
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERRORS)
        if not isinstance(stream, Guarded):
            setattr(sys, name, cast(TextIO, Guarded(stream)))


def let_go(stream: TextIO) -> None:
    """Sends what a stream still gets nowhere: its reader is gone, the work is not.

    Args:
        stream: of this process.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def flush_streams() -> None:
    """Writes what is waiting; a reader that has gone is no error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            let_go(stream)


class Guarded:
    """A text stream that lets no control character through.

    Args:
        bare: what is written to; a console that cleans its texts itself may use it.
    """

    def __init__(self, bare: TextIO) -> None:
        self.bare = bare

    def write(self, text: str) -> int:
        """Writes a text; of what controls a terminal, colours and the moves of bars stay."""
        is_terminal = self.bare.isatty()
        sent = {"always": True, "bar": is_terminal}
        sent["colour"] = is_terminal or any(map(os.environ.get, _FORCED))

        def show(found: re.Match[str]) -> str:
            return found[0] if sent.get(found.lastgroup or "") else _shown(found)

        self.bare.write(_WRITTEN.sub(show, text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Writes one after the other."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bare, name)


def _typed(path: Path) -> str:
    """A path as one would type it from the current folder."""
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    inside = absolute.is_relative_to(here)
    return shlex.quote(str(absolute.relative_to(here) if inside else absolute))


def _shown(found: re.Match[str]) -> str:
    """What stands for a control character: nothing, but for bytes of a name that are no text."""
    return _escaped(found[0]) if "\ud800" <= found[0] <= "\udfff" else ""


def _escaped(text: str) -> str:
    return text.encode("unicode_escape").decode("ascii")


def _spell(error: UnicodeError) -> tuple[str, int]:
    """An error handler for codecs."""
    assert isinstance(error, UnicodeEncodeError)
    found = error.object[error.start : error.end]
    return "".join(_SPELLED.get(each) or _escaped(each) for each in found), error.end
