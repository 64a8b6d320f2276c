"""Long runs that go on: what passed at this state of the code is not run again.

`pytest --record FOLDER` writes the outcome of each test into FOLDER, one file for each state of the
checkout, as soon as it is known. At the end it says how many of all the chosen tests have passed at
this state, in how many minutes.
"""

import hashlib
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any, TypedDict

import pytest

ROOT = Path(__file__).parents[2]


class Outcome(TypedDict):
    """What became of one test."""

    outcome: str
    seconds: float
    at: str


Outcomes = dict[str, Outcome]


def state_of(checkout: Path) -> str:
    """Names the code as it lies there: the commit, and a hash of what differs from it.

    Args:
        checkout: of git.

    Raises:
        pytest.UsageError: if it is none.
    """

    def git(*words: str) -> bytes:
        done = subprocess.run(["git", *words], cwd=checkout, capture_output=True)
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip()
            raise pytest.UsageError(f"Expected {checkout} to be a checkout of git, but: {reason}")
        return done.stdout

    commit = git("rev-parse", "HEAD").decode().strip()
    changed = git("diff", "HEAD", "--binary")
    for name in git("ls-files", "-z", "--others", "--exclude-standard").split(b"\0"):
        path = checkout / os.fsdecode(name)
        if name and path.is_file():
            changed += name + path.read_bytes()
    return commit + (f"-{hashlib.sha256(changed).hexdigest()[:12]}" if changed else "")


class LongRun:
    """Leaves out what passed already, and notes what passes now.

    Args:
        path: the file of outcomes.
        known: what it said when this run began.
    """

    def __init__(self, path: Path, known: Outcomes) -> None:
        self.path, self.known = path, known
        self.found: Outcomes = dict(known)

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Deselects what passed."""
        done = [item for item in items if is_done(self.known.get(item.nodeid))]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if item not in done]

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Workers of pytest-xdist must leave out the same tests, whenever they start."""
        node.workerinput["long_run"] = self.known

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes a test when it is over: the worst of set-up, call and tear-down."""
        before = self.found.get(report.nodeid) if report.when != "setup" else None
        seconds = report.duration + (before["seconds"] if before else 0.0)
        outcome: str = report.outcome
        if before and before["outcome"] != "passed":
            outcome = before["outcome"]
        at = time.strftime("%Y-%m-%d %H:%M:%S")
        self.found[report.nodeid] = {"outcome": outcome, "seconds": round(seconds, 1), "at": at}
        if report.when == "teardown":
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.found, indent=1, sort_keys=True) + "\n")
            temporary.replace(self.path)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Nothing left to run is a success, if something passed before."""
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.known:
            session.exitstatus = pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Says what is known of this state of the code, earlier runs included."""
        outcomes = [one["outcome"] for one in self.found.values()]
        counts = ", ".join(f"{outcomes.count(o)} {o}" for o in ("passed", "failed", "skipped"))
        minutes = sum(one["seconds"] for one in self.found.values()) / 60
        terminalreporter.write_line(
            f"{self.path.stem}: {counts} ({len(self.known)} of them known before), "
            f"{minutes:.1f} minutes of tests; all in {self.path}"
        )


def is_done(known: Outcome | None) -> bool:
    """Whether a test need not run again; one that failed or was skipped must."""
    return known is not None and known["outcome"] == "passed"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--record`."""
    parser.addoption(
        "--record", metavar="FOLDER", help="note outcomes there; leave out what passed before"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Starts the recorder; in a worker of pytest-xdist only what leaves tests out."""
    folder = config.getoption("--record")
    if not folder:
        return
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        run = LongRun(Path(folder), worker["long_run"])
        config.pluginmanager.register(_OnlyDeselects(run), "long-run")
        return
    path = Path(folder) / f"{state_of(ROOT)}.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    config.pluginmanager.register(LongRun(path, known), "long-run")


class _OnlyDeselects:
    """The part of a run that workers do."""

    def __init__(self, run: LongRun) -> None:
        self.pytest_collection_modifyitems = run.pytest_collection_modifyitems
