"""Commands killed at random moments while they change rows in Milvus: the old state, or the new."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.forks import in_child, outcome
from support.milvus_servers import Server
from support.pictures import write_folder
from support.tiny import tiny_model

from hf_knn import Datastore, KnnForImageClassification, MilvusDatastore
from hf_knn.commands.memory import teach_pictures
from hf_knn.commands.rows import Wanted, forget_rows
from hf_knn.model.receipts import CHANGES_NAME, Change, Receipt, read_changes
from hf_knn.store.remote import is_pending

pytest.importorskip("pymilvus")  # here, so that children have it; nothing connects in this process
pytest.importorskip("milvus_lite")
pytestmark = pytest.mark.faults

KILLS = 20


@pytest.fixture(params=["server", "file"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A server that lives on, or a file that is served by the process that is killed."""
    if request.param == "file":
        yield str(tmp_path / "rows.db")
        return
    running = Server(tmp_path / "milvus")
    yield running.uri
    running.kill()


class Campaign:
    """A checkpoint that is taught a picture and forgets one in turn.

    Args:
        place: a folder of its own.
        uri: where the rows are.
    """

    def __init__(self, place: Path, uri: str) -> None:
        self.folder, self.uri = place / "checkpoint", uri
        self.picture = write_folder(place / "new", {"elk": 1}) / "elk" / "0.png"
        self.model = tiny_model("vit", k=5, head="ridge", head_regularizer=1.0)
        self.seconds = 0.0

    def load(self) -> None:
        """The first state, made in a child."""
        store = self.model.datastore
        assert isinstance(store, Datastore)
        self.model.datastore = MilvusDatastore.from_datastore(
            store, self.uri, "rows", progress=False
        )
        self.model.save_pretrained(self.folder)

    @property
    def receipts(self) -> list[Receipt]:
        path = self.folder / CHANGES_NAME
        return read_changes(path if path.exists() else None)

    def taught(self) -> list[int]:
        """Rows that were taught and not forgotten since, as the receipts say."""
        found: list[int] = []
        for receipt in self.receipts:
            if receipt.action == Change.TEACH:
                found += receipt.ids
            else:
                found = [row_id for row_id in found if row_id not in receipt.ids]
        return found

    def change(self) -> None:
        """What a user types next."""
        taught = self.taught()
        if len(self.receipts) % 3 == 2:
            forget_rows(self.folder, Wanted([(taught[0], taught[0])]), False, None, True)
        else:
            # the same picture each time, which would be left out
            teach_pictures(self.folder, self.picture, "elk", "fail", True, again=True)

    def check(self) -> None:
        """Every row is there once, and each is what the receipts say."""
        model, receipts = KnnForImageClassification.from_pretrained(self.folder), self.receipts
        store = model.datastore
        assert isinstance(store, MilvusDatastore)
        store.verify()
        assert self.model.datastore is not None
        wanted = sorted([*self.model.datastore.ids.tolist(), *self.taught()])
        assert store.ids.tolist() == wanted
        assert model.fingerprint_rows() == receipts[-1].hash_after
        for before, after in pairwise(receipts):
            assert before.hash_after == after.hash_before
        assert [entry for entry in self.folder.iterdir() if "pending-change" in entry.name] == []

    def kill_one(self, generator: random.Random, sees_file: bool) -> bool:
        """Kills a change, at any moment or once it has begun; whether that left the file."""
        child = in_child(self.change)
        if sees_file:
            while not is_pending(self.folder) and os.waitpid(child, os.WNOHANG) == (0, 0):
                time.sleep(0.001)
            time.sleep(generator.uniform(0, 0.2 * self.seconds))
        else:
            time.sleep(generator.uniform(0, self.seconds))
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):  # it came to its end
            return False
        return is_pending(self.folder)

    def replay(self) -> KnnForImageClassification:
        """The oracle: the receipts' changes, made to rows that lie beside the model."""
        model = self.model
        for receipt in self.receipts:
            if receipt.action == Change.TEACH:
                paths = [self.picture.name]
                model.teach(
                    [self.picture], receipt.labels, ids=receipt.ids, paths=paths, again=True
                )
            else:
                model.forget(receipt.ids)
            assert model.changes[-1].hash_after == receipt.hash_after
        return model


def test_a_killed_change_is_taken_back_or_done(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_KNN_MILVUS_URI", uri)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    torch.set_num_threads(1)
    campaign, generator, found = Campaign(tmp_path, uri), random.Random(0), Counter[str]()
    assert outcome(campaign.load) == ""
    for _ in range(2):
        started = time.monotonic()
        assert outcome(campaign.change) == ""
        campaign.seconds = time.monotonic() - started
    for number in range(KILLS):
        left = campaign.kill_one(generator, number % 2 == 0)
        found["taken back" if left else "as before or done"] += 1
        assert outcome(campaign.change) == "", number
        assert outcome(campaign.check) == "", number
    assert min(found["taken back"], found["as before or done"]) > 2, found
    plain = KnnForImageClassification.from_pretrained(campaign.folder, load_datastore=False)
    for mine, theirs in zip(
        plain.head.parameters(), campaign.replay().head.parameters(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
