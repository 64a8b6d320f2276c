"""`hf-knn doctor | inspect | code`: what is wrong with pictures, stored rows, and code."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import typer
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils import CONFIG_NAME

from .. import __version__
from ..checkup.doctor import DoctorOptions, check_up, open_source
from ..checkup.examine import Checkup, Watch, decoded_or_none, inspect_datastore, open_picture
from ..checkup.findings import (
    COLUMNS,
    Kind,
    as_csv,
    harmless,
    in_order,
    kinds_of,
    read_csv,
    write_csv,
)
from ..checkup.report import TITLES, first_things, sections_of
from ..checkup.svg import MOST_ROWS, map_svg, place_features
from ..core.manifest import MANIFEST_NAME
from ..core.reading import HubFiles
from ..data.batches import picture_of
from ..data.decode import BadImageError
from ..data.journal import Move
from ..data.moving import Moved, move_aside, put_back
from ..data.places import is_saved
from ..data.walk import StoredPictures, find_pictures
from ..fit.html import Drawing, Section, plain, svg_uri, write_page
from ..fit.html import Table as PageTable
from ..fit.picking import Picking
from ..model.code import code_hashes, compare_code, legacy_code, reader_of
from ..model.modeling import KnnForImageClassification
from ..store.backend import RowStore, learned_map_of
from ..store.datastore import Datastore
from .console import (
    command_line,
    console,
    escape,
    is_quiet,
    open_checkpoint,
    print_json,
    right,
    say_what_was_left_out,
    typed,
)
from .devices import device_of_process
from .stopping import FEATURES_KEPT, stands

CSV_NAME, PAGE_NAME = "findings.csv", "report.html"

FOUND = 3
"""The exit code of `hf-knn doctor` if it finds what `--fail-on` names."""

MOVED = [Kind.BROKEN, Kind.EXACT]
"""What is moved aside where no kinds are named: what nobody has to look at to be sure."""


def diagnose_pictures(options: DoctorOptions) -> None:
    """Checks pictures, writes a page and a csv, and says what to do first.

    Args:
        options: see `hf-knn doctor --help`.

    Raises:
        ValueError: for pictures that cannot be used at all, or moved.
        OSError: if something is not there, or the report cannot be written.
    """
    if options.move_to is not None:
        check_quarantine(options.pictures, options.move_to)
    moved: dict[str, Any] | None = None
    if options.findings is not None:
        lines = read_csv(options.findings)
        moved = _move(options, [(line.kind, line.path, "named in a csv") for line in lines])
        if options.json_output:
            print_json({"moved": moved})
        return
    stands(FEATURES_KEPT)
    options = replace(options, device=str(device_of_process()))
    source = open_source(options)
    say_what_was_left_out(source.notes)
    with watching(not options.json_output) as watch:
        checkup = check_up(options, source, watch)

    def show(number: int) -> Image.Image | None:
        try:
            return None if source.places[number] < 0 else picture_of(*source.picture(number))
        except (BadImageError, OSError):  # it is a finding already, with this reason
            return None

    name, backbone = Path(options.pictures).name, options.backbone
    shown = Path(backbone).name if Path(backbone).exists() else backbone  # or a Hub id
    lead = [
        f"What hf-knn doctor found in {name}, looked at with {shown}. {CSV_NAME} beside this page "
        "has all of it, to be sorted and worked through."
    ]
    with checkup.phase("report"):
        write_csv(options.output / CSV_NAME, checkup.findings, checkup.pictures)
        picking = _picking_of_files(options.pictures)
        sections = sections_of(checkup, show, picks=picking is not None)
        page = write_page(options.output / PAGE_NAME, f"Check of {name}", sections, lead, picking)
    if not options.json_output:
        print_checkup(checkup, page)
    counts = checkup.counts()
    if any(counts.get(Kind(name)) for name in options.fail_on):
        console.status_code = FOUND
    if options.move_to is not None:
        found = [one for one in in_order(checkup.findings) if one.picture >= 0]
        paths = checkup.pictures.paths
        moved = _move(options, [(one.kind, paths[one.picture], one.detail) for one in found])
    if options.json_output:
        summary = summary_of(checkup, page)
        print_json(summary if moved is None else summary | {"moved": moved})
        return
    labels = "" if checkup.pictures.label_names else "give the pictures labels, "
    words = ["train", options.pictures, "--backbone", backbone]
    words += [] if options.group_by is None else ["--group-by", options.group_by]
    words += [] if options.splits == "auto" else ["--splits", options.splits]
    if moved is None and picking is not None and any(counts.get(kind) for kind in MOVED):
        aside = ("doctor", options.pictures, "--move-to", "quarantine", "--from", options.output)
        console.print(
            f"To move broken files and exact copies aside: [bold]{typed(*aside)}[/]",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
    console.print(
        f"Next: look at the page, act on {CSV_NAME}, {labels}then [bold]"
        f"{typed(*words)}[/]",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


def check_quarantine(pictures: str, folder: Path) -> None:
    """Refuses to move files of what is no folder of files, or into that folder itself.

    Args:
        pictures: what is checked.
        folder: where files would go.

    Raises:
        ValueError: saying what to pass.
    """
    root = Path(pictures)
    if not root.is_dir() or is_saved(root):
        raise ValueError(
            f"Expected a folder of picture files with --move-to, but {pictures} is none; move what "
            f"{CSV_NAME} names yourself."
        )
    if folder.resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"Expected a folder outside of {pictures} to move files into, but got {folder}: what "
            "lies there would be read as pictures of a class again."
        )


def put_files_back(folder: Path, json_output: bool) -> None:
    """Puts all files back that `--move-to` moved into a folder.

    Args:
        folder: the quarantine.
        json_output: print JSON.

    Raises:
        ValueError: for a folder without a journal, or with a damaged one.
        OSError: if it cannot be read or written.
    """
    stands(f"Files that were not put back yet lie in {folder}; the same line goes on with them.")
    found = put_back(folder)
    if json_output:
        print_json({
            "put_back": [str(move.source) for move in found.done],
            "left": [{"file": move.target, "reason": reason} for move, reason in found.left],
        })  # fmt: skip
        return
    verb = "is where it was" if len(found.done) == 1 else "are where they were"
    console.print(f"{_files(len(found.done))} {verb}.")
    _say_left(found, "not put back")


def _move(options: DoctorOptions, found: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """Moves the pictures of some kinds of findings aside; says so, or returns it for `--json`."""
    assert options.move_to is not None  # it was asked for
    kinds, root = kinds_of(options.kinds) or MOVED, Path(options.pictures).absolute()
    listed = {harmless(path): path for path in find_pictures(str(root)).pictures}
    wanted: dict[str, Move] = {}
    outside = []
    for kind, cell, detail in found:
        path = listed.get(harmless(cell))
        if kind not in kinds:
            continue
        if path is None:
            outside.append(cell)
        else:
            wanted.setdefault(path, Move(root / path, f"{kind}/{path}", detail))
    undo = f"`hf-knn doctor --undo {options.move_to}` puts all back"
    stands(f"Files that were moved lie in {options.move_to}: {undo}; the same line moves the rest.")
    moved = move_aside(options.move_to, [*wanted.values()])
    folder = options.move_to
    if not options.json_output:
        said = ", ".join(map(str, kinds))
        console.print(f"Moved {_files(len(moved.done))} into {escape(folder)} ({said}).",
                      soft_wrap=True, highlight=False)  # fmt: skip
        _say_left(moved, "not moved")
        for path in outside:
            console.print(f"[yellow]Not there:[/] {escape(path)}", soft_wrap=True)
        if moved.done:
            console.print(f"To put them back: [bold]{typed('doctor', '--undo', folder)}[/]",
                          soft_wrap=True)  # fmt: skip
    return {
        "folder": str(folder),
        "files": {str(move.source): move.target for move in moved.done},
        "left": {str(move.source): reason for move, reason in moved.left}
        | dict.fromkeys(outside, "it is not among the pictures"),
    }


def _picking_of_files(pictures: str) -> Picking | None:
    """What becomes of chosen files; None where there are no files to move."""
    root = Path(pictures)
    if not root.is_dir() or is_saved(root):
        return None
    words = "doctor", pictures, "--from", "chosen.csv", "--move-to", "quarantine"
    return Picking(move=command_line(*words), header=as_csv(COLUMNS))


def _say_left(moved: Moved, what: str) -> None:
    for move, reason in moved.left:
        console.print(f"[yellow]{what.capitalize()}:[/] {escape(move.target)}: {escape(reason)}.",
                      soft_wrap=True, highlight=False)  # fmt: skip


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count:,} files"


@contextmanager
def watching(shown: bool) -> Iterator[Watch]:
    """Progress bars for phases that take long.

    Args:
        shown: False keeps silent.
    """
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*bars, TimeRemainingColumn(), console=console,
                  disable=not shown or is_quiet(),
                  transient=True) as progress:  # fmt: skip

        def watch(name: str, total: int) -> Callable[[int], object]:
            task = progress.add_task(name, total=total)
            return lambda done: progress.update(task, advance=done)

        yield watch


def print_checkup(checkup: Checkup, page: Path) -> None:
    """The counts, what to do first, and where the page is.

    Args:
        checkup: done.
        page: the report.
    """
    title = f"{len(checkup.pictures)} pictures"
    table = Table("finding", right("how many"), title=title, title_justify="left")
    for kind, count in checkup.counts().items():
        table.add_row(TITLES[kind], f"[{'bold' if count else 'dim'}]{count}[/]")
    console.print(table)
    first = first_things(checkup.findings)
    for number, line in enumerate(first, 1):
        console.print(f"{number}. {escape(line)}", highlight=False)
    if not first:
        console.print("[green]Nothing was found that has to be done.[/]")
    for line in checkup.skipped:
        console.print(f"[yellow]Not looked at:[/] {escape(line)}")
    if checkup.curve is not None:
        console.print(escape(checkup.curve.statement()), highlight=False)
    seconds = sum(checkup.seconds.values())
    console.print(f"Report after {seconds:.0f} s: {escape(str(page))}", soft_wrap=True)


def summary_of(checkup: Checkup, page: Path) -> dict[str, Any]:
    """What `--json` prints.

    Args:
        checkup: done.
        page: the report.
    """
    curve = checkup.curve
    return {
        "pictures": len(checkup.pictures),
        "classes": len(checkup.pictures.label_names),
        "counts": {str(kind): count for kind, count in checkup.counts().items()},
        "first": first_things(checkup.findings),
        "learning_curve": None
        if curve is None
        else {
            "per_class": curve.per_class.tolist(),
            "accuracy": curve.accuracies.mean(axis=0).tolist(),
            "gain": None if curve.reason else curve.gain,
            "spread": None if curve.reason else curve.spread,
            "statement": curve.statement(),
        },
        "not_looked_at": checkup.skipped,
        "seconds": checkup.seconds,
        "report": str(page),
        "csv": str(page.with_name(CSV_NAME)),
    }


def inspect_checkpoint(
    checkpoint: str, output: Path, root: Path | None, seed: int, json_output: bool
) -> None:
    """Checks the rows of a checkpoint's datastore and writes a page and a csv.

    Args:
        checkpoint: a folder or a Hub id; every byte of its datastore is hashed.
        output: where the page and the csv go.
        root: the folder that the stored paths are relative to; None shows no pictures.
        seed: of folds, parts and the map.
        json_output: print JSON instead of tables.

    Raises:
        ValueError: for a checkpoint without a datastore, an empty or a damaged one, or a `root`
            that has none of its pictures.
        OSError: if something is not there or cannot be written.
    """
    model = open_checkpoint(checkpoint)
    store = model.datastore
    if store is None or not len(store):
        raise ValueError(f"Expected {checkpoint} to hold a datastore with rows, but it has none.")
    store.verify()
    names = model.config.class_names
    with watching(not json_output) as watch:
        checkup = inspect_datastore(store, names, root=root, seed=seed, watch=watch)
        drawing = _map(checkup, seed, watch)
    pictures = checkup.pictures
    stored = None if root is None else StoredPictures(root)

    def show(number: int) -> Image.Image | None:
        image = None if stored is None else open_picture(stored, pictures.paths[number])
        if image is not None or model.thumbnails is None:
            return image
        return decoded_or_none(model.thumbnails.get(int(pictures.ids[number])))

    facts = _facts(model, store)
    rows = [(fact, str(value)) for fact, value in facts.items() if value != ""]
    is_here = Path(checkpoint).is_dir()
    words = "forget", "relabel"
    picking = Picking(*(command_line(word, checkpoint) for word in words)) if is_here else None
    sections = sections_of(checkup, show, picks=is_here)
    sections[1:1] = [drawing] if drawing else []
    sections.insert(-1, Section("Checkpoint", tables=[PageTable(("", ""), rows)]))
    name = plain(Path(checkpoint).name)
    with checkup.phase("report"):
        write_csv(output / CSV_NAME, checkup.findings, pictures)
        lead = _lead(root, model.thumbnails is not None)
        page = write_page(output / PAGE_NAME, f"What {name} remembers", sections, [lead], picking)
    if json_output:
        print_json(summary_of(checkup, page) | {"checkpoint": facts})
        return
    print_checkup(checkup, page)
    manifest = escape(f"{checkpoint}/{MANIFEST_NAME}")
    through = "" if (learned := learned_map_of(store)) is None else f" Learned metric: {learned}."
    console.print(
        f"All {len(store)} rows are what {manifest} promises, byte for byte.{through}",
        highlight=False,
    )
    if checkup.findings and Path(checkpoint).is_dir():
        console.print(
            f"Next: look at the page, delete from {CSV_NAME} what is right as it is, then [bold]"
            f"{typed('relabel', checkpoint, '--from', output / CSV_NAME)}[/], or [bold]"
            f"{typed('forget', checkpoint, '--from', output / CSV_NAME)}[/]",
            soft_wrap=True, highlight=False,
        )  # fmt: skip


def _map(checkup: Checkup, seed: int, watch: Watch) -> Section | None:
    if len(checkup.features) < 4:
        checkup.skipped.append("Map: fewer than four rows.")
        return None
    done = watch("Drawing the map", 1)
    with checkup.phase("map"):
        rows, places = place_features(checkup.features, seed)
    done(1)
    pictures = checkup.pictures
    named = {one.picture for one in checkup.findings}
    marked = np.array([row in named for row in rows.tolist()], bool)
    svg = map_svg(places, pictures.labels[rows], pictures.label_names, marked)
    text = ["Rows with similar features lie together (PCA, then t-SNE); distances between clusters "
            "mean little. Rings are rows with a finding."]  # fmt: skip
    if len(rows) < len(checkup.features):
        text.append(f"{MOST_ROWS:,} rows, drawn at random.")
    alt = f"A map of {len(rows)} rows, coloured by class."
    return Section("Map", text, drawings=[Drawing(svg_uri(svg), alt)])


def _facts(model: KnnForImageClassification, store: RowStore) -> dict[str, Any]:
    config = model.config
    facts: dict[str, Any] = {
        "rows": len(store), "width": store.dim, "stored as": store.dtype, "metric": store.metric,
        "normalisation": store.normalization, "index": str(store.index), "k": config.k,
        "temperature": config.knn_temperature, "λ": config.knn_weight, "head": config.head,
        "classes": config.classes, "backbone": getattr(config, "base_model", None) or "",
    }  # fmt: skip
    if learned := learned_map_of(store):
        facts["learned metric"] = str(learned)
    facts |= {f"source: {name}": value for name, value in store.source.items()}
    if isinstance(store, Datastore) and store.manifest is not None:  # the one that has files
        facts |= {f"sha256 of {blob.name}": blob.sha256 for blob in store.manifest.blobs}
    if store.binding is not None:
        facts["fingerprint of backbone"] = store.binding.fingerprint
    return facts


def _lead(root: Path | None, has_thumbnails: bool) -> str:
    said = "What hf-knn inspect found among the rows of the datastore"
    if root is not None:
        return f"{said}; pictures from {root.name}."
    if has_thumbnails:
        return f"{said}; small pictures from the checkpoint."
    return f"{said}. This checkpoint holds no pictures: pass --pictures FOLDER to see them here."


def check_code(checkpoint: str, revision: str | None) -> None:
    """Says whether the code that comes with a checkpoint is that of the installed package.

    Args:
        checkpoint: a folder or a Hub id.
        revision: a branch, a tag or a commit of a Hub id; None is its main branch.

    Raises:
        ValueError: for what is no checkpoint, or a folder with a revision.
        OSError: if there is no such repository or revision, or it cannot be reached.
        typer.Exit: with 1, if there is a difference.
    """
    folder = Path(checkpoint)
    place = plain(checkpoint if revision is None else f"{checkpoint} at {revision}")
    if folder.is_dir() and revision is not None:
        raise ValueError(f"Expected no revision of a folder, but got {revision!r}; leave it out.")
    files = HubFiles(checkpoint, {"revision": revision})

    def read_from_hub(name: str) -> str | None:
        path = files.resolve(name)
        return None if path is None else reader_of(path.parent)(name)

    read = reader_of(folder) if folder.is_dir() else read_from_hub
    if read(CONFIG_NAME) is None:
        raise ValueError(f"Expected {place} to be a checkpoint, but it has no {CONFIG_NAME}.")
    say = partial(console.print, soft_wrap=True, highlight=False)
    installed = f"that of the installed hf-knn {__version__}"
    problems, old = compare_code(read), legacy_code(read)
    if not problems:
        hashes = ", ".join(f"{name} (sha256 {digest})" for name, digest in code_hashes().items())
        say(escape(f"The code of {place} is {installed}: {hashes}."))
        return
    say(escape(f"The code of {place} is not {installed}."))
    if old:
        say(f"{len(old)} files are named like those that hf-knn 0.1 wrote into a checkpoint.")
    for problem in problems:
        say(escape(f"- {problem}"))
    say(
        "Read it before you pass trust_remote_code=True; save the checkpoint again with this "
        "package to replace it."
    )
    raise typer.Exit(1)
