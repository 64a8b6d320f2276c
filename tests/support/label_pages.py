"""The page of `hf-knn label`, served on this machine by a thread."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from hf_knn.labelling.page import LabelPage
from hf_knn.serving.guard import Access
from support.pictures import encoded, picture


def written(folder: Path, names: list[str]) -> list[Path]:
    """Small pictures of those names, no two the same."""
    for row, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(picture(row % 5, row, (160, 120))))
    return [folder / name for name in names]


class Served:
    """A page that can be stopped, and started anew at the same address."""

    def __init__(self, page: LabelPage, port: int = 0) -> None:
        self._socket = socket.create_server(("127.0.0.1", port))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        app = page.app(Access.choose())
        options = uvicorn.Config(app, log_level="error", lifespan="off", ws="none")
        self.server = uvicorn.Server(options)
        self._thread = threading.Thread(target=self.server.run, args=([self._socket],))
        self._thread.start()

    def stop(self) -> None:
        """Waits until it is gone."""
        while not self.server.started:
            time.sleep(0.01)
        self.server.should_exit = self.server.force_exit = True
        self._thread.join()
        self._socket.close()


@contextmanager
def served(page: LabelPage) -> Iterator[Served]:
    """A page that answers meanwhile."""
    server = Served(page)
    try:
        yield server
    finally:
        server.stop()
