"""Milvus Lite as a server of its own, which tests can kill and start again."""

import socket
import subprocess
import sys
import time
from pathlib import Path


def free_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server in a process of its own, at a port and folder that stay the same."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it, and waits until it listens."""
        command = str(Path(sys.executable).parent / "milvus-lite")
        place = ["--data-dir", str(self.folder), "--port", str(self.port), "--host", "127.0.0.1"]
        self.process = subprocess.Popen(
            [command, "server", *place],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert time.monotonic() < deadline, "the server does not start"
            assert self.process.poll() is None, "the server ended"
            time.sleep(0.05)

    def kill(self) -> None:
        """As a power cut of the process: SIGKILL."""
        self.process.kill()
        self.process.wait()
