"""Runs cells: all ranks compute features together, then share the cells."""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from backbones import find_backbone
from cells import Asked, Cell, describe_arms, is_finished, write_cell, write_failure
from folder import begin, locked
from loading import LoadedTask, load_task
from pool import OpenBackbone, labels_only, pool_features
from protocols import COLLECTIVE, NEED_PICTURES, PROTOCOLS
from results import provenance
from study import Study
from twins import Twins, near_duplicates

EPOCHS = 20


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        limit: pictures per task.
        epochs: of backbones that are trained.
        precision: of features.
        batch_size: pictures per forward pass.
        streaming: see `loading.load_task`.
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
    """

    folder: Path
    options: Options
    watch: Watch = lambda progress, doing: None
    progress: dict[tuple[str, str], Progress] = field(default_factory=dict)
    failures: list[tuple[Cell, BaseException]] = field(default_factory=list)

    def run(self, suite: str, cells: list[Cell]) -> None:
        """Measures what is not finished yet; a cell that fails is noted, the others go on.

        Raises:
            RuntimeError: if another run works in the folder.
            ValueError: if the folder holds other revisions or options.
        """
        state = PartialState()
        if not state.is_main_process:
            state.wait_for_everyone()  # for the main process to have the lock and to have begun
            self._run(cells)
            return
        with locked(self.folder):
            loaded = self._load(cells)
            revisions = {name: task.revision for name, task in loaded.items()}
            begin(self.folder, suite, revisions, self.options.telling())
            state.wait_for_everyone()
            self._run(cells, loaded)

    def _run(self, cells: list[Cell], loaded: dict[str, LoadedTask] | None = None) -> None:
        state = PartialState()
        loaded = self._load(cells) if loaded is None else loaded
        groups: dict[tuple[str, str], list[Cell]] = {}
        for cell in cells:
            groups.setdefault((cell.task, cell.backbone), []).append(cell)
        todo = {}
        for key, group in groups.items():
            todo[key] = [cell for cell in group if not is_finished(self.folder, cell)]
            skipped = len(group) - len(todo[key])
            self.progress[key] = Progress(len(group), skipped, skipped=skipped)
        state.wait_for_everyone()  # nobody writes before all have looked
        for key, left in todo.items():
            if left and key[0] in loaded:
                self._run_group(key, left, loaded[key[0]])
        state.wait_for_everyone()

    def _load(self, cells: list[Cell]) -> dict[str, LoadedTask]:
        found = {}
        for name in dict.fromkeys(cell.task for cell in cells):
            self.watch(self.progress, f"loading {name}")
            try:
                found[name] = load_task(
                    name, cache_dir=self.options.cache_dir, limit=self.options.limit,
                    streaming=self.options.streaming, revision=self.options.revision,
                )  # fmt: skip
            except Exception as error:  # the other tasks go on
                self._fail([cell for cell in cells if cell.task == name], error)
        return found

    def _run_group(self, key: tuple[str, str], cells: list[Cell], loaded: LoadedTask) -> None:
        state, options = PartialState(), self.options
        self.watch(self.progress, f"{key[0]}, {key[1]}: features")
        started = time.perf_counter()
        try:
            backbone = OpenBackbone(
                find_backbone(key[1]), loaded.label_names, options.cache_dir,
                options.batch_size, options.precision,
            )  # fmt: skip
            twins = Twins(loaded, options.cache_dir)
            if backbone.is_scratch:
                pool = labels_only(loaded)
            else:
                pool = pool_features(loaded, backbone, twins.see)
            with state.main_process_first():
                pairs = twins.pairs()
            study = Study(loaded, backbone, pool, options.epochs)
        except Exception as error:  # the other backbones go on
            self._fail(cells, error)
            return
        bench = Bench(study, pairs, self.folder, options)
        self.progress[key].seconds += time.perf_counter() - started
        shots = sorted({cell.shots or 0 for cell in cells})
        for cell in cells:
            together = cell.protocol in COLLECTIVE
            # cells of one split and as many shots share fitted voices
            place = cell.seed + shots.index(cell.shots or 0)
            mine = place % state.num_processes == state.process_index
            if mine or together:
                self._run_cell(bench, cell, write=state.is_main_process if together else True)

    def _run_cell(self, bench: "Bench", cell: Cell, *, write: bool) -> None:
        progress = self.progress[cell.task, cell.backbone]
        self.watch(self.progress, cell.name)
        started = time.perf_counter()
        try:
            bench.measure(cell, write=write)
            progress.done += 1
        except Exception as error:  # the other cells go on
            self._fail([cell], error)
        progress.seconds += time.perf_counter() - started

    def _fail(self, cells: list[Cell], error: BaseException) -> None:
        for cell in cells:
            key = (cell.task, cell.backbone)
            self.progress.setdefault(key, Progress(total=0)).failed += 1
            self.failures.append((cell, error))
            write_failure(self.folder, cell, error)


@dataclass
class Bench:
    """Measures cells of one task with one backbone and writes them.

    Args:
        study: what protocols share.
        pairs: [P, 2] pictures that are (nearly) the same.
        folder: of the results.
        options: how to run.
    """

    study: Study
    pairs: Any
    folder: Path
    options: Options
    told_images: bool = False

    def measure(self, cell: Cell, *, write: bool) -> None:
        """Measures a cell and writes it."""
        study, started = self.study, time.perf_counter()
        if cell.protocol in NEED_PICTURES and study.loaded.is_streamed:
            raise ValueError(
                f"Expected pictures on the disk for {cell.protocol}, but {cell.task} is streamed; "
                "do leave --stream out."
            )
        measured = PROTOCOLS[cell.protocol](study, cell.seed, cell.option)
        seconds = {"measure": time.perf_counter() - started}
        if not write:
            return
        parts = study.pool.parts(cell.seed)
        train = parts.train
        if cell.shots is not None:
            train = np.asarray(study.few(cell.seed, cell.shots)[0])
        groups = study.pool.groups
        asked = Asked(
            parts.test,
            study.labels.numpy()[parts.test].astype(np.int32),
            parts.test if groups is None else groups[parts.test],
            near_duplicates(self.pairs, train, parts.test),
        )
        validation = measured.voices.split.validation.labels
        arms, arrays = describe_arms(measured.arms, validation, asked, study.num_labels)
        images = 0 if self.told_images else study.pool.images
        if images:
            seconds["features"] = study.pool.seconds
        self.told_images = True
        document = {
            "task": self._task(),
            "model": self._model(),
            "provenance": self._provenance(),
            "seconds": seconds,
            "images": images,
            "images_per_second": images / study.pool.seconds if images else None,
            "peak_memory_bytes": peak_memory(),
            "data": {
                "train": len(measured.voices.split.train.labels),
                "validation": len(validation),
                "test": len(parts.test),
                "near_duplicates_in_train": int(asked.near_duplicate.sum()),
            },
            "arms": arms,
            "heat": measured.heat,
            "extra": measured.extra,
        }
        write_cell(self.folder, cell, document, arrays)

    def _task(self) -> dict[str, Any]:
        entry = self.study.loaded.entry
        return {
            "title": entry.title, "classes": self.study.num_labels, "metric": entry.metric,
            "licence": entry.licence, "citation": entry.citation,
            "revision": self.study.loaded.revision, "verified": entry.verified,
            "label_names": self.study.loaded.label_names,
        }  # fmt: skip

    def _model(self) -> dict[str, Any]:
        entry = self.study.backbone.entry
        return {
            "title": entry.title, "kind": entry.kind, "revision": self.study.backbone.revision,
            "licence": entry.licence, "image_size": entry.image_size, "verified": entry.verified,
        }  # fmt: skip

    def _provenance(self) -> dict[str, Any]:
        return provenance() | {
            "precision": self.options.precision,
            "world_size": PartialState().num_processes,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1_024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
