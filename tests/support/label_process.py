"""`hf-knn label` with its page, in a process of its own."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx


class LabelProcess:
    """A page that answers, and somebody who labels without a browser."""

    def __init__(self, process: "subprocess.Popen[str]", address: str) -> None:
        self.process, self.address = process, address
        self.http = httpx.Client(base_url=address, timeout=60)

    def question(self) -> dict[str, Any]:
        """What is asked now."""
        asked: dict[str, Any] = self.http.get("/api/question").json()
        return asked

    def send(self, path: str, question: dict[str, Any], **body: Any) -> dict[str, Any]:
        """Sends something about a question that must be taken."""
        about = {"run": question["run"], "number": question["number"]}
        reply = self.http.post(f"/api/{path}", json=about | body)
        assert reply.status_code == 200, reply.text
        said: dict[str, Any] = reply.json()
        return said

    def name_truly(self, question: dict[str, Any]) -> dict[str, Any]:
        """Answers by the start of the file's name; of a group those that are like the first."""
        if question["kind"] == "copies":
            first, *others = (each["number"] for each in question["pictures"])
            return self.send("answer", question, kind="kept", picture=first, dropped=others)
        word = question["pictures"][0]["name"].split("-")[0]
        own = [p["number"] for p in question["pictures"] if p["name"].startswith(word)]
        return self.send("answer", question, kind="named", label=word, pictures=own)

    def end(self, how: signal.Signals = signal.SIGINT) -> tuple[int, str]:
        """Ends it; its status, and what it said since it began to answer."""
        self.process.send_signal(how)
        said = "".join(self.process.communicate(timeout=120))
        return self.process.returncode, said


@contextmanager
def labelling(folder: Path, output: Path, *options: object) -> Iterator[LabelProcess]:
    """Starts `hf-knn label`, and makes sure that it is gone afterwards.

    Args:
        folder: of pictures.
        output: where answers are kept.
        options: of the command.
    """
    command = [sys.executable, "-m", "hf_knn_cli", "label", str(folder), "-o", str(output)]
    process = subprocess.Popen(
        [*command, "--no-browser", *map(str, options)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            found = re.search(r"http://\S+/", line)
            if found:
                yield LabelProcess(process, found[0])
                return
        raise AssertionError(process.communicate()[1])
    finally:
        process.kill()
        process.communicate()
