"""Keys of somebody at a terminal, or of whatever is piped in: one at a time, without Enter.

From a pipe, a line break behind a key is no key of its own, so that `1`, `12u` and one key a line
all mean what they say; an empty line is Enter.
"""

import sys

import click

ENTER, END = "\n", ""


class Keyboard:
    """Reads keys and names from the standard input."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdin is not None and sys.stdin.isatty()
        self._is_behind_key = False

    def key(self) -> str:
        """The next key: a letter as a small one, `ENTER`, or `END` where nothing comes any more.

        Raises:
            KeyboardInterrupt: for Ctrl-C.
        """
        if self._is_terminal:
            try:
                pressed = click.getchar()
            except EOFError:
                return END
            return ENTER if pressed in ("\r", "\n") else pressed.lower()
        pressed = self._read()
        if pressed == "\n" and self._is_behind_key:
            pressed = self._read()
        self._is_behind_key = pressed not in (ENTER, END)
        return pressed.lower()

    def line(self, asked: str) -> str | None:
        """What somebody types up to Enter, without space around it.

        Args:
            asked: what is wanted, for a terminal.

        Returns:
            The text, perhaps empty; None where nothing comes any more.

        Raises:
            KeyboardInterrupt: for Ctrl-C.
        """
        if self._is_terminal:
            try:
                return input(asked).strip()
            except EOFError:
                return None
        text = sys.stdin.readline()
        if text == "\n" and self._is_behind_key:
            text = sys.stdin.readline()
        self._is_behind_key = False
        return text.strip() if text else None

    def _read(self) -> str:
        if sys.stdin is None:
            return END
        pressed = sys.stdin.read(1)
        return self._read() if pressed == "\r" else pressed
