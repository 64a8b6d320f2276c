"""A server as a process: kills, the end by Ctrl-C, load, and requests that nobody would write."""

import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from support.pictures import encoded, picture
from support.server_process import BEARER, running
from support.tiny import tiny_model

from hf_knn import KnnForImageClassification

EXAMPLES = 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("vit", k=5).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def file_of(number: int) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", (f"{number}.png", encoded(picture(number % 5, number))))]


def teach(client: httpx.Client, number: int) -> httpx.Response:
    return client.post("/teach", files=file_of(number), data={"label": "elk"}, headers=BEARER)


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(6))
def test_what_was_acknowledged_survives_a_kill(folder: Path, seed: int) -> None:
    chance = random.Random(seed)
    known: list[int] = []
    with running(folder) as server:
        stop = threading.Event()

        def go_on(client_number: int) -> None:
            with httpx.Client(base_url=server.address, timeout=60) as client:
                number = 1000 * client_number
                while not stop.is_set():
                    try:
                        answer = teach(client, number)
                    except httpx.HTTPError:  # it was killed
                        return
                    assert answer.status_code == 200, answer.text
                    known.extend(answer.json()["ids"])
                    number += 1

        threads = [threading.Thread(target=go_on, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        while len(known) < 3:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.5))
        server.process.kill()
        for thread in threads:
            thread.join()
        stop.set()
    store = KnnForImageClassification.from_pretrained(folder).datastore
    assert store is not None
    assert set(known) <= set(store.ids.tolist())
    assert len(store) <= 40 + len(known) + 4  # and what was being answered
    with running(folder) as server, httpx.Client(base_url=server.address, timeout=60) as client:
        assert teach(client, 9999).json()["rows_before"] == len(store)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_ends_when_what_was_asked_is_answered_and_says_what_was_kept(folder: Path) -> None:
    with running(folder) as server, ThreadPoolExecutor(8) as pool:  # noqa: SIM117
        with httpx.Client(base_url=server.address, timeout=60) as client:
            assert teach(client, 1).status_code == 200
            answers = [pool.submit(teach, client, number) for number in range(2, 10)]
            for answer in answers[:2]:
                answer.result()
            said = server.end(signal.SIGINT)
            found = []
            for answer in answers:
                try:
                    found.append(answer.result().status_code)
                except httpx.HTTPError:  # it came after the end
                    found.append(0)
    assert set(found) <= {200, 0}
    store = KnnForImageClassification.from_pretrained(folder).datastore
    assert store is not None
    assert len(store) == 41 + found.count(200)
    assert f"{1 + found.count(200)} x teach" in said
    assert server.process.returncode == 0
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_clients_and_another_command_at_once(folder: Path, tmp_path: Path) -> None:
    seen: Counter[tuple[str, int]] = Counter()
    lock = threading.Lock()
    picture_file = tmp_path / "other.png"
    picture_file.write_bytes(encoded(picture(3, 777)))

    def one(number: int) -> None:
        with httpx.Client(base_url=server.address, timeout=120) as client:
            for turn in range(4):
                kind = (number + turn) % 8
                path = "/explain" if kind == 1 else "/teach" if kind == 0 else "/predict"
                if kind == 0:
                    answer = teach(client, 100 + 10 * number + turn)
                else:
                    answer = client.post(path, files=file_of(number))
                with lock:
                    seen[path, answer.status_code] += 1

    with running(folder) as server:
        threads = [threading.Thread(target=one, args=(n,)) for n in range(64)]
        for thread in threads:
            thread.start()
        command = [sys.executable, "-m", "hf_knn_cli", "teach", str(folder), str(picture_file)]
        done = subprocess.run(
            [*command, "--label", "owl"], capture_output=True, text=True, check=False
        )
        for thread in threads:
            thread.join()
        assert done.returncode == 0, done.stderr
        health = httpx.get(f"{server.address}/health").json()
    assert {status for _, status in seen} == {200}, seen
    assert seen["/teach", 200] == 32
    store = KnnForImageClassification.from_pretrained(folder).datastore
    assert store is not None
    assert len(store) == health["rows"] == 40 + 32 + 1  # nobody's were overwritten


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_request_that_its_own_description_allows_is_an_error_of_the_server(
    folder: Path,
) -> None:
    import schemathesis

    seen: Counter[tuple[str, int]] = Counter()
    with running(folder) as server:
        schema = schemathesis.openapi.from_url(f"{server.address}/openapi.json")

        def check(operation: Any) -> None:
            @settings(
                max_examples=EXAMPLES, deadline=None, database=None,
                suppress_health_check=[*HealthCheck],
            )  # fmt: skip
            @given(case=operation.as_strategy())
            def asked(case: Any) -> None:
                answer = case.call(headers=BEARER)
                seen[operation.path, answer.status_code] += 1
                assert answer.status_code < 500, answer.text
                if answer.status_code >= 400:
                    assert list(answer.json()) == ["error"]

            asked()

        operations: list[Any] = [*schema.get_all_operations()]
        for found in operations:
            check(found.ok())
    assert {path for path, _ in seen} >= {"/predict", "/explain", "/teach", "/forget"}
