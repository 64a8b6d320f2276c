"""Reads the folder of a run and refuses what doesn't belong together."""

import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
_ARRAYS = ("ids", "labels", "groups", "near_duplicate")
_PER_ARM = ("predicted", "confidence", "true")
_PARTS = ("cell", "task", "model", "provenance", "seconds", "data", "arms")
_NAMED = frozenset({"task", "backbone", "protocol", "seed"})
_TOLERANCE = 1e-4


class Setting(NamedTuple):
    """Cells that differ in their seed only.

    Attributes:
        task: id.
        backbone: id.
        protocol: id.
        shots: pictures per class; None is all.
        shift: what else sets the cell apart, such as a corruption; mostly empty.
    """

    task: str
    backbone: str
    protocol: str
    shots: int | None = None
    shift: str = ""

    @property
    def pair(self) -> tuple[str, str]:
        """Task and backbone."""
        return self.task, self.backbone

    @property
    def detail(self) -> str:
        """Shots and shift in words; empty if there are none."""
        shots = "" if self.shots is None else f"{self.shots}-shot"
        return ", ".join(part for part in (shots, self.shift) if part)


@dataclass(frozen=True)
class Cell:
    """One finished cell: what its JSON says, and its answers on each test item.

    Attributes:
        name: of its files.
        setting: everything but the seed.
        seed: of the split.
        document: the JSON as it is.
        arrays: `ids`, `labels`, `groups`, `near_duplicate` [n], and per arm `predicted/ARM`,
            `confidence/ARM`, `true/ARM` [n].
    """

    name: str
    setting: Setting
    seed: int
    document: dict[str, Any] = field(repr=False)
    arrays: dict[str, NDArray[Any]] = field(repr=False)

    @property
    def arms(self) -> dict[str, dict[str, Any]]:
        """What was chosen and measured, by arm."""
        arms: dict[str, dict[str, Any]] = self.document["arms"]
        return arms

    def correct(self, arm: str) -> NDArray[np.bool_]:
        """[n] whether an arm is right."""
        found: NDArray[np.bool_] = self.arrays[f"predicted/{arm}"] == self.arrays["labels"]
        return found

    def clusters(self) -> NDArray[np.int64]:
        """[n] what is drawn together: groups where they repeat, else items."""
        groups = self.arrays["groups"]
        repeat = len(np.unique(groups)) < len(groups)
        return (groups if repeat else self.arrays["ids"]).astype(np.int64)


@dataclass(frozen=True)
class Results:
    """The folder of a run.

    Attributes:
        folder: it.
        run: what `run.json` says.
        cells: finished ones, by name.
        failures: what failed in the last run.
        warnings: what a reader should know of, one line each.
    """

    folder: Path
    run: dict[str, Any]
    cells: list[Cell]
    failures: list[dict[str, Any]]
    warnings: list[str]

    def settings(self, protocol: str | None = None) -> dict[Setting, list[Cell]]:
        """Cells by setting, in order of seeds; of one protocol if asked."""
        found: dict[Setting, list[Cell]] = defaultdict(list)
        for cell in self.cells:
            if protocol in (None, cell.setting.protocol):
                found[cell.setting].append(cell)
        ordered = sorted(found, key=lambda s: (s.protocol, *s.pair, s.shots or 0, s.shift))
        return {key: sorted(found[key], key=lambda cell: cell.seed) for key in ordered}


def load_results(folder: Path) -> Results:
    """Reads a folder that `benchmark/run.py` wrote.

    Args:
        folder: with `run.json`, `cells/` and perhaps `failures/`.

    Raises:
        FileNotFoundError: without `run.json`, without cells, or for a cell without its arrays.
        ValueError: for files of another format, damaged cells, or mixed revisions.
    """
    path = folder / "run.json"
    if not path.exists():
        raise FileNotFoundError(
            f"Expected `{folder}` to hold a run.json, but it has none; "
            "do run `python benchmark/run.py --output` with that folder first."
        )
    run = _read(path)
    cells = [_load_cell(path) for path in sorted((folder / "cells").glob("*.json"))]
    if not cells:
        raise FileNotFoundError(
            f"Expected finished cells in `{folder / 'cells'}`, but there are none; do let "
            "`python benchmark/run.py` finish one first, or look into the folder `failures`."
        )
    refuse_mixed(run.get("revisions", {}), cells)
    failures = [_read(path) for path in sorted((folder / "failures").glob("*.json"))]
    return Results(folder, run, cells, failures, list(_warnings(cells)))


def refuse_mixed(revisions: Mapping[str, Any], cells: Iterable[Cell]) -> None:
    """Refuses cells of one task or backbone that were made from different revisions.

    Args:
        revisions: of the tasks, as the run wrote them down at its start.
        cells: of one or more folders.

    Raises:
        ValueError: naming the task or backbone, both revisions and a cell.
    """
    first: dict[tuple[str, str], tuple[str, str]] = {
        ("task", task): (str(revision), "run.json") for task, revision in revisions.items()
    }
    for cell in cells:
        for kind, part in (("task", "task"), ("backbone", "model")):
            key = kind, getattr(cell.setting, kind)
            revision = str(cell.document[part].get("revision"))
            known, where = first.setdefault(key, (revision, cell.name))
            if revision != known:
                raise ValueError(
                    f"Expected one revision of {kind} {key[1]}, but got {known!r} in {where} and "
                    f"{revision!r} in {cell.name}; do not mix them: run the cells anew in a folder "
                    "of its own."
                )


def _warnings(cells: list[Cell]) -> Iterable[str]:
    for name, what in (("commit", "commits of the code"), ("device", "devices")):
        found = {str(cell.document["provenance"].get(name)) for cell in cells}
        values = sorted(value[:10] if name == "commit" else value for value in found)
        if len(values) > 1:
            yield f"The cells come from different {what}: {', '.join(values)}."
    versions: dict[str, set[str]] = defaultdict(set)
    for cell in cells:
        for package, version in cell.document["provenance"].get("versions", {}).items():
            versions[package].add(str(version))
    for package, found in versions.items():
        if len(found) > 1:
            shown = ", ".join(sorted(found))
            yield f"The cells come from different versions of {package}: {shown}."


def _load_cell(path: Path) -> Cell:
    document = _read(path)
    missing = [part for part in _PARTS if part not in document]
    if missing:
        raise ValueError(
            f"Expected {path} to hold {', '.join(missing)}, but it doesn't; do delete the cell and "
            "run it again."
        )
    about = document["cell"]
    rest = {k: v for k, v in about.items() if k not in _NAMED | {"shots"} and v is not None}
    shift = ", ".join(str(v) if k == "shift" else f"{k} {v}" for k, v in sorted(rest.items()))
    shots = about.get("shots")
    setting = Setting(about["task"], about["backbone"], about["protocol"], shots, shift)
    stored = path.with_suffix(".npz")
    arrays = _load_arrays(stored, list(document["arms"]), document.get("arrays_sha256"))
    cell = Cell(path.stem, setting, int(about["seed"]), document, arrays)
    _check_accuracy(cell, path)
    return cell


def _load_arrays(path: Path, arms: list[str], sha256: str | None) -> dict[str, NDArray[Any]]:
    if not path.exists():
        raise FileNotFoundError(
            f"Expected {path} beside the cell's JSON, but it isn't there; do delete the cell and "
            "run it again."
        )
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise ValueError(
            f"Expected {path} with the sha256 {sha256} that its JSON names, but got {found}: it is "
            "damaged or of another run; do delete the cell and run it again."
        )
    wanted = [*_ARRAYS, *(f"{kind}/{arm}" for arm in arms for kind in _PER_ARM)]
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        missing = [name for name in wanted if name not in stored]
        if missing:
            raise ValueError(
                f"Expected {path} to hold {', '.join(missing)}, but it doesn't; do delete the "
                "cell and run it again."
            )
        arrays = {name: stored[name] for name in wanted}
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) != 1 or len(shapes.pop()) != 1 or not len(arrays["ids"]):
        raise ValueError(
            f"Expected arrays [n] of one length n >= 1 in {path}, but got "
            f"{ {name: list(a.shape) for name, a in arrays.items()} }; do delete the cell and run "
            "it again."
        )
    return arrays


def _check_accuracy(cell: Cell, path: Path) -> None:
    """The JSON and the arrays must be of the same run."""
    for arm, entry in cell.arms.items():
        said, found = entry["test"]["top1"], float(cell.correct(arm).mean())
        if abs(said - found) > _TOLERANCE:
            raise ValueError(
                f"Expected the answers of {arm} beside {path} to give its top-1 {said:.4f}, but "
                f"they give {found:.4f}; do delete the cell and run it again."
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"Expected {path} to be JSON, but got {error}; do delete it and run it again."
        ) from error
    if not isinstance(document, dict):
        raise ValueError(f"Expected {path} to be a JSON object, but got {type(document).__name__}.")
    found = document.get("format", FORMAT if path.parent.name == "failures" else None)
    if found != FORMAT:
        raise ValueError(
            f"Expected {path} to be of format {FORMAT}, but got {found}; do make the report with "
            "the version of benchmark/report.py that belongs to it."
        )
    return document
