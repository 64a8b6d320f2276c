"""Runs cells: all ranks compute features together, then share the cells."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from catalog.backbones import find_backbone
from catalog.loaded_task import LoadedTask
from catalog.loading import load_task
from study.bench import Bench
from study.cells import Cell, is_finished, write_failure
from study.folder import begin, locked, note_model
from study.phases import LOAD, Phases
from study.pool import OpenBackbone, labels_only, pool_features
from study.protocols import COLLECTIVE
from study.ranks import Ranks, RunEndedError
from study.study import Study
from study.twins import Twins

EPOCHS = 20


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        limit: pictures per task.
        epochs: of backbones that are trained.
        precision: of features.
        batch_size: pictures per forward pass.
        streaming: see `catalog.loading.load_task`.
        revision: of a Hub task.
        cache_dir: where everything that can be computed again is kept.
    """

    limit: int | None = None
    epochs: int = EPOCHS
    precision: str = "fp32"
    batch_size: int = 32
    streaming: bool | None = None
    revision: str | None = None
    cache_dir: Path | None = None

    def telling(self) -> dict[str, Any]:
        """Those that numbers depend on."""
        return {"limit": self.limit, "epochs": self.epochs, "precision": self.precision}


@dataclass
class Progress:
    """What has been done of one task with one backbone."""

    total: int = 0
    done: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0


Watch = Callable[[dict[tuple[str, str], Progress], str], None]


@dataclass
class Run:
    """A run in one folder.

    Args:
        folder: of the results.
        options: how to run.
        watch: told of progress and of what is being done.

    Attributes:
        failures: of this rank.
        told: of all ranks, at the end: cells and their errors in words.
    """

    folder: Path
    options: Options
    watch: Watch = lambda progress, doing: None
    progress: dict[tuple[str, str], Progress] = field(default_factory=dict)
    failures: list[tuple[Cell, BaseException]] = field(default_factory=list)
    load_seconds: dict[str, float] = field(default_factory=dict)
    told: list[tuple[str, str]] = field(default_factory=list)
    ranks: Ranks = field(default_factory=Ranks)

    def run(self, suite: str, cells: list[Cell]) -> None:
        """Measures what is not finished yet; a cell that fails is noted, the others go on.

        Raises:
            RuntimeError: if another run works in the folder, or a rank is gone.
            ValueError: if the folder holds other revisions or options.
        """
        self.ranks = Ranks.join()
        with ExitStack() as held:
            loaded: dict[str, LoadedTask] = {}

            def prepare() -> dict[str, str]:
                held.enter_context(locked(self.folder))
                loaded.update(self._load(cells))
                revisions = {name: task.revision for name, task in loaded.items()}
                begin(self.folder, suite, revisions, self.options.telling())
                return revisions

            revisions = self.ranks.first(prepare)
            if not self.ranks.is_first:
                loaded.update(self._load(cells))
            self._check_alike(revisions, loaded)
            self._run(cells, loaded)
            said = self.ranks.gather([_told(*pair) for pair in self.failures])
            self.told = [failure for rank in said for failure in rank]

    def _check_alike(self, revisions: dict[str, str], loaded: dict[str, LoadedTask]) -> None:
        """Each rank must see the same pictures, or they would wait for each other's features."""
        mine = {name: task.revision for name, task in loaded.items()}
        for rank, found in enumerate(self.ranks.gather(mine)):
            if found != revisions:
                raise RunEndedError(
                    f"Expected all ranks to load {revisions}, but rank {rank} has {found}; do "
                    "give them the same HF_HOME, cache and network, and run again."
                )

    def _run(self, cells: list[Cell], loaded: dict[str, LoadedTask]) -> None:
        # the first rank alone looks: others may have begun to write when a slow one gets to it
        finished = self.ranks.first(
            lambda: {cell.name for cell in cells if is_finished(self.folder, cell)}
        )
        groups: dict[tuple[str, str], list[Cell]] = {}
        for cell in cells:
            groups.setdefault((cell.task, cell.backbone), []).append(cell)
        todo = {}
        for key, group in groups.items():
            todo[key] = [cell for cell in group if cell.name not in finished]
            skipped = len(group) - len(todo[key])
            self.progress[key] = Progress(len(group), skipped, skipped=skipped)
        for key, left in todo.items():
            if left and key[0] in loaded:
                self._run_group(key, left, loaded[key[0]])

    def _load(self, cells: list[Cell]) -> dict[str, LoadedTask]:
        found = {}
        for name in dict.fromkeys(cell.task for cell in cells):
            self.watch(self.progress, f"loading {name}")
            started = time.perf_counter()
            try:
                found[name] = load_task(
                    name, cache_dir=self.options.cache_dir, limit=self.options.limit,
                    streaming=self.options.streaming, revision=self.options.revision,
                )  # fmt: skip
            except Exception as error:  # the other tasks go on
                self._fail([cell for cell in cells if cell.task == name], error)
            self.load_seconds[name] = time.perf_counter() - started
        return found

    def _run_group(self, key: tuple[str, str], cells: list[Cell], loaded: LoadedTask) -> None:
        self.watch(self.progress, f"{key[0]}, {key[1]}: features")
        started = time.perf_counter()
        try:
            bench = self.ranks.together(lambda: self._open(key, loaded))
            bench.study.phases.add(LOAD, self.load_seconds.pop(key[0], 0.0))
        except RunEndedError:
            raise
        except Exception as error:  # the other backbones go on
            self._fail(cells, error)
            return
        self.progress[key].seconds += time.perf_counter() - started
        shots = sorted({cell.shots or 0 for cell in cells})
        for cell in cells:
            together = cell.protocol in COLLECTIVE
            # cells of one split and as many shots share fitted voices
            place = cell.seed + shots.index(cell.shots or 0)
            if together or place % self.ranks.count == self.ranks.index:
                self._run_cell(bench, cell, together=together)

    def _open(self, key: tuple[str, str], loaded: LoadedTask) -> Bench:
        """Features of all pictures of a task by a backbone, which all ranks compute together."""
        options = self.options
        backbone = OpenBackbone(
            find_backbone(key[1]), loaded.label_names, options.cache_dir,
            options.batch_size, options.precision, Phases(),
        )  # fmt: skip
        note_model(self.folder, key[1], backbone.revision, write=self.ranks.is_first)
        twins = Twins(loaded, options.cache_dir)
        if backbone.is_scratch:
            pool = labels_only(loaded)
        else:
            pool = pool_features(loaded, backbone, twins.see)
        with PartialState().main_process_first(), backbone.phases.phase(LOAD):
            pairs = twins.pairs()
        study = Study(loaded, backbone, pool, options.epochs)
        return Bench(study, pairs, self.folder, options.precision)

    def _run_cell(self, bench: Bench, cell: Cell, *, together: bool) -> None:
        progress = self.progress[cell.task, cell.backbone]
        self.watch(self.progress, cell.name)
        started = time.perf_counter()
        try:
            if together:
                first = self.ranks.is_first
                self.ranks.together(lambda: bench.measure(cell, write=first))
            else:
                bench.measure(cell, write=True)
            progress.done += 1
        except RunEndedError:
            raise
        except Exception as error:  # the other cells go on
            self._fail([cell], error)
        progress.seconds += time.perf_counter() - started

    def _fail(self, cells: list[Cell], error: BaseException) -> None:
        for cell in cells:
            key = (cell.task, cell.backbone)
            self.progress.setdefault(key, Progress(total=0)).failed += 1
            self.failures.append((cell, error))
            write_failure(self.folder, cell, error)


def _told(cell: Cell, error: BaseException) -> tuple[str, str]:
    return cell.name, f"{type(error).__name__}: {error}"
