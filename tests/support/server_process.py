"""`hf-knn serve` in a process of its own, as a user starts it."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

TOKEN = "a-token-that-nobody-guesses"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


class Running(NamedTuple):
    """A server that answers.

    Attributes:
        process: of it.
        address: such as http://127.0.0.1:8000.
    """

    process: "subprocess.Popen[str]"
    address: str

    def end(self, how: signal.Signals = signal.SIGINT) -> str:
        """Ends it, and returns what it said then."""
        self.process.send_signal(how)
        _, said = self.process.communicate(timeout=600)
        return said


@contextmanager
def running(folder: Path, *options: str, **variables: str) -> Iterator[Running]:
    """Starts a server, and makes sure that it is gone afterwards.

    Args:
        folder: of the checkpoint.
        options: of the command.
        variables: of the environment.
    """
    with socket.socket() as probe:  # several tests at once get ports of their own
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "hf_knn_cli", "serve", str(folder), "--port", str(port)]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"HF_KNN_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"} | variables,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "Ctrl-C ends it." in line:
                break
        else:
            raise AssertionError(process.communicate()[1])
        yield Running(process, f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.communicate()
