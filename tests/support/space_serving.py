"""The Space in a process of its own, which can be killed and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TESTS = Path(__file__).parents[1]
_PATIENCE = 180.0


class Server:
    """The Space in a process of its own."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._process: subprocess.Popen[bytes] | None = None
        self._urls: dict[str, str] = {}
        self.log = place / "server.log"

    def start(self) -> None:
        ready = self._place / "ready.json"
        ready.unlink(missing_ok=True)
        paths = [str(_TESTS), str(_TESTS.parent / "space"), str(_TESTS.parent)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        environment |= {"GRADIO_TEMP_DIR": str(self._place / "uploads")}
        arguments = [self._place / "pictures", self._place / "data", ready]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(_TESTS / "support" / "space_server.py"), *map(str, arguments)],
                env=environment, stdout=log, stderr=log,
            )  # fmt: skip
        until = time.monotonic() + _PATIENCE
        while not ready.exists():
            assert self._process.poll() is None, self.log.read_text("utf-8")
            assert time.monotonic() < until
            time.sleep(0.05)
        self._urls = json.loads(ready.read_text("utf-8"))

    def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def megabytes(self) -> int:
        """What it holds in memory."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text("ascii")
        (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) // 1024

    def url(self) -> str:
        return self._urls["space"]

    def empty_url(self) -> str:
        return self._urls["empty"]


@contextmanager
def serving(place: Path) -> Iterator[Server]:
    server = Server(place)
    server.start()
    try:
        yield server
    finally:
        server.kill()
