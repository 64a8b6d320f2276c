"""The Space under load: 64 visitors at once, also while the server is killed and comes back."""

import copy
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gradio")
from support.space_app import features_of, published, write_picture
from support.space_client import Away, Refused, Visitor
from support.space_serving import Server, serving

from hf_knn import KnnForImageClassification

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CLIENTS, REQUESTS = 64, 20
LABELS = ("ant", "dog", "eel")  # one known class and two new ones
PATIENCE = 180.0


@dataclass
class Story:
    """What one visitor did, and what was acknowledged.

    Attributes:
        steps: `(endpoint, what was sent, what came back)`, in order.
        own: ids of the rows that are there.
        trouble: anything that must not happen.
    """

    steps: list[tuple[str, Any, Any]] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)


class Player:
    """One visitor with a plan of its own."""

    def __init__(self, number: int, visitor: Visitor, pictures: dict[str, list[Path]]) -> None:
        self.visitor, self.story = visitor, Story()
        self._token = f"visitor-of-the-load-test-{number:04d}"
        self._random = np.random.default_rng(number)
        self._pictures = pictures

    def play(self) -> None:
        """All requests, one after the other."""
        for number in range(REQUESTS):
            kind = self._random.choice(["classify", "teach", "forget"], p=[0.55, 0.3, 0.15])
            if kind == "forget" and not self.story.own:
                kind = "classify"
            try:
                getattr(self, f"_{kind}")(number)
            except (Refused, TimeoutError) as error:
                self.story.trouble.append(f"{kind} {number}: {error}")

    def _classify(self, number: int) -> None:
        path = self._pick()
        answer = self._persist(
            "classify", lambda: [self.visitor.upload(path), None, None, None, None, self._token]
        )
        self.story.steps.append(("classify", path, answer))

    def _teach(self, number: int) -> None:
        label = str(self._random.choice(LABELS))
        paths = [self._pick(label) for _ in range(self._random.integers(1, 4))]
        answer = self._persist(
            "teach",
            lambda: [
                [self.visitor.upload(path) for path in paths],
                label,
                self._token,
                f"request {number}",
            ],
        )
        self.story.own += answer["ids"]
        self._check_count(answer, number)
        self.story.steps.append(("teach", (paths, label), answer))

    def _forget(self, number: int) -> None:
        row_id = int(self._random.choice(self.story.own))
        try:
            answer = self._persist("forget", lambda: [[row_id], self._token])
        except Refused as error:
            # the first try was done, but its answer was lost with the server
            if not self._was_away or "that you taught" not in str(error):
                raise
            answer = None
        self.story.own.remove(row_id)
        if answer is not None:
            self._check_count(answer, number)
        self.story.steps.append(("forget", row_id, answer))

    def finish(self) -> None:
        """Forgets all that was taught: refused if a row was lost, and one is left if it doubled."""
        if self.story.own:
            answer = self._persist("forget", lambda: [self.story.own, self._token])
            if answer["examples"] != 0:
                self.story.trouble.append(f"after all were forgotten: {answer}")

    def _check_count(self, answer: dict[str, Any], number: int) -> None:
        if answer["examples"] != len(self.story.own) or len(set(self.story.own)) != len(
            self.story.own
        ):
            self.story.trouble.append(f"{number}: {answer}, but {self.story.own} are there")

    def _persist(self, endpoint: str, values: Callable[[], list[Any]]) -> Any:
        """Asks until there is an answer."""
        until = time.monotonic() + PATIENCE
        self._was_away = False
        while True:
            try:
                return self.visitor.ask(endpoint, values())
            except Away as error:
                self._was_away = True
                if time.monotonic() > until:
                    raise TimeoutError(str(error)) from error
                time.sleep(0.2)

    def _pick(self, label: str | None = None) -> Path:
        name = label or str(self._random.choice(list(self._pictures)))
        return self._pictures[name][self._random.integers(len(self._pictures[name]))]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    place = tmp_path_factory.mktemp("asked")
    return {
        name: [write_picture(place / f"{name}{seed}.png", number, 900 + seed) for seed in range(12)]
        for name, number in (("ant", 0), ("dog", 3), ("eel", 4))
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> KnnForImageClassification:
    """What the server publishes, here."""
    return published(tmp_path_factory.mktemp("published"))


def players_at(server: Server, pictures: dict[str, list[Path]]) -> list[Player]:
    return [Player(number, Visitor(server.url), pictures) for number in range(CLIENTS)]


def play_all(players: list[Player]) -> None:
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(Player.play, players))


def finish_all(players: list[Player]) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(Player.finish, players))


def check_against_library(
    players: list[Player], model: KnnForImageClassification, pictures: dict[str, list[Path]]
) -> int:
    """Every acknowledged step again, offline; returns how many answers were compared."""
    paths = [path for some in pictures.values() for path in some]
    features = dict(zip(paths, features_of(model, paths).split(1), strict=True))
    compared = 0
    for player in players:
        own = copy.deepcopy(model, {id(model.backbone): model.backbone})
        for kind, asked, answer in player.story.steps:
            if kind == "teach":
                chosen, label = asked
                new = [p for place, p in enumerate(chosen) if place not in answer["skipped"]]
                if new:
                    rows = torch.cat([features[path] for path in new])
                    own.teach(features=rows, labels=[label] * len(new), ids=answer["ids"])
                known = [path for path in chosen if path not in new]
                if known:
                    assert own.datastore is not None
                    near = own.datastore.search(torch.cat([features[path] for path in known]), 1)
                    assert near.similarities.min() > 1 - 1e-4, "one that is not known was left out"
            elif kind == "forget":
                own.forget([asked])
            else:
                scores = own(features=features[asked]).logits[0].exp().tolist()
                wanted = dict(zip(own.config.class_names, scores, strict=True))
                assert set(answer["probabilities"]) <= set(wanted), "a class of somebody else"
                # a class that was forgotten is gone after a restart
                found = {name: answer["probabilities"].get(name, 0.0) for name in wanted}
                assert found == pytest.approx(wanted, abs=2e-6)
                compared += 1
    return compared


def percentiles(seconds: list[float]) -> str:
    middle, late = np.percentile(np.array(seconds) * 1000, [50, 99])
    return f"p50 {middle:.0f} ms, p99 {late:.0f} ms"


def test_nobody_sees_an_error_and_every_answer_is_right(tmp_path, model, pictures, capsys):
    with serving(tmp_path) as server:
        players = players_at(server, pictures)
        started = time.perf_counter()
        play_all(players)
        elapsed = time.perf_counter() - started
        finish_all(players)
        empty = [Visitor(server.empty_url) for _ in range(CLIENTS)]

        def ask_nothing(visitor: Visitor) -> None:
            for _ in range(REQUESTS):
                assert visitor.ask("nothing", [{"a": 1}]) == {"a": 1}

        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(ask_nothing, empty))
        log = server.log.read_text("utf-8")
    assert [one.story.trouble for one in players if one.story.trouble] == []
    assert "Traceback" not in log
    compared = check_against_library(players, model, pictures)
    assert compared > CLIENTS * REQUESTS / 3
    full = sum(one.visitor.full for one in players)
    own = percentiles([s for one in players for s in one.visitor.seconds])
    nothing = percentiles([s for one in empty for s in one.seconds])
    with capsys.disabled():
        print(
            f"\n{CLIENTS} clients x {REQUESTS} requests in {elapsed:.0f} s: {own}; an empty "
            f"handler: {nothing}; queue full {full} times; {compared} answers compared"
        )


def test_a_kill_loses_nothing_that_was_acknowledged(tmp_path, model, pictures, capsys):
    with serving(tmp_path) as server:
        players = players_at(server, pictures)
        kills: list[int] = []
        is_over = threading.Event()

        def killer() -> None:
            for part in (0.25, 0.5, 0.75):
                while answered(players) < part * CLIENTS * REQUESTS:
                    if is_over.wait(0.01):
                        return
                kills.append(answered(players))
                server.kill()
                server.start()

        thread = threading.Thread(target=killer, daemon=True)
        thread.start()
        try:
            play_all(players)
        finally:
            is_over.set()
            thread.join()
        server.kill()  # once more, with nobody there
        server.start()
        finish_all(players)
    assert len(kills) == 3
    assert [one.story.trouble for one in players if one.story.trouble] == []
    compared = check_against_library(players, model, pictures)
    assert compared > CLIENTS * REQUESTS / 3
    with capsys.disabled():
        print(f"\nkilled after {kills} answers; {compared} answers compared, none lost or doubled")


def answered(players: list[Player]) -> int:
    return sum(len(one.visitor.seconds) for one in players)
