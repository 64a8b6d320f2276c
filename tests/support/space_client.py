"""A visitor of the Space who speaks plain HTTP, and goes on asking while the server is away."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx


class Refused(Exception):
    """The server answered with a message."""


class Away(Exception):
    """The server did not answer, or went away before it did."""


class Visitor:
    """One client.

    Args:
        where: gives the address of the server, which may come back elsewhere.

    Attributes:
        seconds: of every answered request, with the waiting.
        full: how often the queue was full.
    """

    def __init__(self, where: Callable[[], str]) -> None:
        self.seconds: list[float] = []
        self.full = 0
        self._where = where
        self._http = httpx.Client(timeout=60)

    def upload(self, path: Path) -> dict[str, Any]:
        """Sends a file; what comes back names it in requests.

        Raises:
            Away: if there was no answer.
        """
        files = {"files": (path.name, path.read_bytes())}
        try:
            reply = self._http.post(f"{self._where()}gradio_api/upload", files=files)
            reply.raise_for_status()
        except httpx.HTTPError as error:
            raise Away(repr(error)) from error
        return {"path": reply.json()[0], "meta": {"_type": "gradio.FileData"}}

    def ask(self, endpoint: str, values: list[Any]) -> Any:
        """Asks once.

        Raises:
            Refused: with the server's message.
            Away: if there was no answer.
        """
        started = time.perf_counter()
        try:
            event = self._join(endpoint, values)
            answer = self._wait(endpoint, event)
        except httpx.HTTPError as error:
            raise Away(repr(error)) from error
        self.seconds.append(time.perf_counter() - started)
        return answer

    def _join(self, endpoint: str, values: list[Any]) -> str:
        while True:
            place = f"{self._where()}gradio_api/call/{endpoint}"
            reply = self._http.post(place, json={"data": values})
            if reply.status_code != 503:
                reply.raise_for_status()
                return str(reply.json()["event_id"])
            self.full += 1
            time.sleep(0.05)

    def _wait(self, endpoint: str, event: str) -> Any:
        kind = ""
        place = f"{self._where()}gradio_api/call/{endpoint}/{event}"
        with self._http.stream("GET", place) as stream:
            for line in stream.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    kind = value
                elif name == "data" and kind == "complete":
                    return json.loads(value)[0]
                elif name == "data" and kind == "error":
                    raise Refused(value)
        raise Away("the stream ended without an answer")
