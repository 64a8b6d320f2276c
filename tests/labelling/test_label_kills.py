"""Sessions killed at random moments: what was answered is there, but for what was under way."""

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from support.forks import in_child
from support.labelling import answer_truly, made_pool, open_made

pytestmark = pytest.mark.faults

KILLS = 25


def answering(place: Path, told: Path) -> None:
    """Answers everything, and says how many answers have come back."""
    session = open_made(place, count=24, pool=made_pool(place / "pictures", 24))
    while session.question() is not None:
        answer_truly(session)
        told.write_text(str(len(session._journal.records)))


def test_a_kill_loses_the_answer_under_way_at_most(tmp_path: Path) -> None:
    generator, done = random.Random(0), 0
    for _ in range(KILLS):
        told = tmp_path / "told"
        told.write_text(str(done))
        child = in_child(partial(answering, tmp_path, told))
        time.sleep(generator.uniform(0.0, 2.0))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        text = told.read_text()
        session = open_made(tmp_path, count=24)
        kept = len(session._journal.records)
        session.close()
        assert kept >= (int(text) if text else done)
        assert kept <= (int(text) + 1 if text else 24)
        done = kept
    assert done > 0
