"""`hf-knn tune | push | export | cache | milvus`: from a checkpoint to its use; tidying up."""

import math
import shlex
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from safetensors import SafetensorError, safe_open

from ..core.manifest import MANIFEST_NAME
from ..core.plain_json import read_json
from ..features.cache import ABOUT_NAME, KEYS_FOLDER
from ..features.extract import progress_bars
from ..fit.plots import check_drawing, draw_tuning
from ..milvus.datastore import MilvusDatastore
from ..model.endpoint import HANDLER_NAME, REQUIREMENTS_NAME
from ..model.export import GRAPH_NAME, SCRIPT_NAME, check_export, export_onnx
from ..model.stored import shown
from ..store.advice import install, needs
from ..store.datastore import Datastore
from ..store.folders import cache_root
from ..store.kept import FOLDER as INDEXES
from ..store.remote import LOCAL_ENDING, DatastoreReference, read_manifest
from ..training.trainer import KnnTrainer
from .console import (
    changing,
    console,
    escape,
    open_checkpoint,
    print_json,
    right,
    typed,
)
from .evaluate import MOST_NAMED, open_split, silent_arguments, stored_names
from .stopping import stands

PUSH_STANDS = (
    "The repository holds the old version or the new one, whole; what was sent already is not sent "
    "again."
)
"""Said when a push is stopped."""

_PUSHED_PICTURES = (
    "The small pictures of the stored rows went along: whoever sees the repository sees them."
)
_PICTURES_LEFT = (
    "The small pictures of the stored rows stayed here; --thumbnails takes them along, for whoever "
    "sees the repository."
)


def tune_checkpoint(
    checkpoint: str,
    pictures: str,
    split: str | None,
    criterion: str | None,
    calibrate: bool,
    on_bad_image: str,
    plot: Path | None,
    splits: str = "auto",
) -> None:
    """Chooses k, temperature and λ on labelled pictures and saves them into the checkpoint.

    Args:
        checkpoint: a folder.
        pictures: see `load_splits`; none that the model was trained on.
        split: which one; None takes `validation`, else the only one there is.
        criterion: see `hf_knn.tune`.
        calibrate: also scale the temperatures of head and blend.
        on_bad_image: `fail` or `skip`.
        plot: where to draw what was tried; None draws nothing.
        splits: how folders called like splits are read, `auto` or `none`.

    Raises:
        ValueError: for pictures that cannot be used, or a checkpoint that is not a folder.
        OSError: if something is not there or cannot be written.
    """
    if plot is not None:
        check_drawing()
    with changing(Path(checkpoint)):
        model, rows, _ = open_split(checkpoint, pictures, split, "validation", splits, on_bad_image)
        if model.datastore is None:
            raise ValueError(f"Expected {checkpoint} to hold a datastore, but it has none.")
        stored, known = stored_names(model, rows), set(model.datastore.paths or [])
        if stored:
            console.print(
                f"[yellow]{len(stored)} of these {len(rows)} pictures are stored in the model[/], "
                f"and nothing is chosen on them: {escape(shown(stored, MOST_NAMED))}.",
                soft_wrap=True,
            )
        elif known - {""} and len(known & set(rows.paths)) > len(rows) / 2:
            console.print(
                "[yellow]Most of these pictures are named like those in the datastore.[/] If they "
                "are the same, k-NN has seen them, and what is chosen here will favour it."
            )
        with tempfile.TemporaryDirectory() as folder:
            trainer = KnnTrainer(model, silent_arguments(folder))
            with progress_bars():
                result = trainer.tune(rows, criterion, calibrate, progress=True)
        model.save_pretrained(checkpoint)
        said = result.say("in these pictures" if result.has_few_labels else "on these pictures")
        console.print(f"{said} Saved in {escape(checkpoint)}.", soft_wrap=True)
        if plot is not None:
            draw_tuning(result, plot)
            console.print(f"Drawn: {escape(str(plot))}")


def push_checkpoint(
    checkpoint: Path,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    parent_commit: str | None,
    message: str,
    token: str | None,
    model_license: str | None = None,
    thumbnails: bool = False,
    endpoint: bool = False,
) -> None:
    """Checks a checkpoint as a reader would and pushes it.

    Args:
        checkpoint: a folder.
        repo_id: `org/name`.
        private: whether a repository that is made is private.
        revision: a branch; None is main.
        create_pr: open a pull request instead.
        parent_commit: the commit that the branch must be at; None is where it is.
        message: of the commit.
        token: a token; None is the one that is logged in.
        model_license: for the card; None keeps what it says.
        thumbnails: also push small pictures that are kept in it.
        endpoint: also push a handler for Inference Endpoints.

    Raises:
        ValueError: if it is no checkpoint folder, or a damaged one.
        OSError: if the Hub refuses, or the branch moved on.
    """
    if not checkpoint.is_dir():
        raise ValueError(f"Expected {checkpoint} to be a checkpoint folder.")
    model = open_checkpoint(checkpoint)
    stands(PUSH_STANDS)
    commit = model.push_to_hub(
        repo_id, commit_message=message, private=private, token=token, revision=revision,
        create_pr=create_pr, parent_commit=parent_commit, license=model_license,
        thumbnails=thumbnails, endpoint=endpoint,
    )  # fmt: skip
    console.print(f"Pushed: {escape(commit.pr_url or commit.commit_url)}", soft_wrap=True)
    if model.thumbnails is not None:
        console.print(_PUSHED_PICTURES if thumbnails else _PICTURES_LEFT, soft_wrap=True)
    if endpoint:
        console.print(
            f"{HANDLER_NAME} and {REQUIREMENTS_NAME} went along: choose Deploy, Inference "
            "Endpoints on the page of the repository.", soft_wrap=True,
        )  # fmt: skip
    console.print(f"Next: [bold]{typed('predict', repo_id, 'PICTURE.jpg')}[/]", soft_wrap=True)


def export_checkpoint(checkpoint: str, folder: Path) -> None:
    """Exports a checkpoint to ONNX.

    Args:
        checkpoint: a folder or a Hub id.
        folder: where graph, settings and script go.

    Raises:
        ImportError: without onnx and onnxruntime.
        ValueError: for what cannot be exported, with the reason.
        OSError: if something is not there or cannot be written.
    """
    check_export()
    model = open_checkpoint(checkpoint)
    stands(f"{folder} may hold a part of the export, which is written anew.")
    with console.status("Tracing the model …"):
        exported = export_onnx(model, folder)
    size = sum(path.stat().st_size for path in folder.glob(f"{GRAPH_NAME}*"))
    console.print(
        f"Exported {escape(str(folder / GRAPH_NAME))}: {size / 1e6:.1f} MB with "
        f"{exported.rows:,} rows, log-probabilities within {exported.largest_gap:.0e} of PyTorch's."
    )
    console.print(
        f"Next: [bold]python {escape(shlex.quote(str(folder / SCRIPT_NAME)))} PICTURE.jpg[/]",
        soft_wrap=True,
    )


@dataclass(frozen=True)
class CacheEntry:
    """One folder of the cache.

    Attributes:
        kind: `features`, `index`, `graph`, `choices` (of backends) or `keys` (of pictures in
            memory).
        name: of the folder.
        model: what it belongs to; empty if unknown.
        backend: and precision, of features; of an index its kind.
        pictures: how the first dataset looked, of features.
        rows: pictures it holds, of features; rows of an index.
        bytes: on disk.
        used: seconds since 1970 at which it was last of use.
    """

    kind: str
    name: str
    model: str
    backend: str
    pictures: str
    rows: int
    bytes: int
    used: float


def show_cache(clear: bool, older_than: int | None, json_output: bool) -> None:
    """Lists the cache, and clears what is listed.

    Args:
        clear: remove what is listed.
        older_than: list only what was not used for so many days, >= 0; None lists everything.
        json_output: print JSON instead of a table.

    Raises:
        OSError: if something cannot be removed.
    """
    latest = math.inf if older_than is None else time.time() - older_than * 86_400
    found = {path: entry for path, entry in cache_entries().items() if entry.used <= latest}
    entries = list(found.values())
    if clear:
        stands("What was not removed yet is still there.")
        for path in found:
            shutil.rmtree(path)
    if json_output:
        document = {"root": str(cache_root()), "cleared": clear}
        print_json(document | {"entries": [asdict(entry) for entry in entries]})
        return
    if entries:
        console.print(_cache_table(entries))
    total = sum(entry.bytes for entry in entries)
    verb = "Cleared" if clear else "Kept"
    console.print(f"{verb} in {escape(str(cache_root()))}: {_size(total)}.", soft_wrap=True)
    if entries and not clear:
        console.print(f"Next: [bold]{typed('cache', '--clear')}[/], or with --older-than 30")


def cache_entries() -> dict[Path, CacheEntry]:
    """What the cache holds by folder, the most recently used first."""
    root = cache_root()
    features, keys = root / "features", root / "features" / KEYS_FOLDER
    places = {
        "features": [path for path in features.glob("*") if path != keys],
        "index": list((root / INDEXES).glob("*")),
        "graph": list((root / "graphs").glob("*")),
        "choices": [root / "backends", root / "search"],
        "keys": [keys],
    }
    found = {
        p: _cache_entry(kind, p) for kind, paths in places.items() for p in paths if p.is_dir()
    }
    return dict(sorted(found.items(), key=lambda pair: -pair[1].used))


def _cache_entry(kind: str, folder: Path) -> CacheEntry:
    states = [path.stat() for path in folder.rglob("*") if path.is_file()]
    used = max((state.st_mtime for state in states), default=folder.stat().st_mtime)
    about: dict[str, Any] = {}
    rows, place = 0, folder / ABOUT_NAME
    if kind in ("features", "index") and place.is_file():
        used = place.stat().st_mtime
        with suppress(ValueError):  # damaged: it is listed and can be cleared all the same
            about = read_json(place)
    if kind == "features":
        rows = sum(map(_rows_of, folder.glob("shard-*.safetensors")))
    elif kind == "index":
        rows, index = int(about.get("rows", 0)), about.get("index", {})
        about = {"model": about.get("folder", ""), "backend": index.get("spec", "")}
    return CacheEntry(
        kind, folder.name, str(about.get("model", "")),
        " ".join(filter(None, [about.get("backend"), about.get("precision")])),
        str(about.get("first_pictures", "")), rows, sum(state.st_size for state in states), used,
    )  # fmt: skip


def _rows_of(path: Path) -> int:
    try:
        with safe_open(path, framework="pt") as file:
            return int(file.get_slice("features").get_shape()[0])
    except SafetensorError:
        return 0  # damaged: the next extraction computes it again


def _cache_table(entries: list[CacheEntry]) -> Table:
    table = Table(
        "kind", "model", "backend", "first pictures", right("rows"), right("size"), "last used"
    )
    for entry in entries:
        table.add_row(
            entry.kind, escape(Path(entry.model).name), entry.backend, escape(entry.pictures),
            f"{entry.rows:,}" if entry.rows else "", _size(entry.bytes),
            time.strftime("%Y-%m-%d", time.localtime(entry.used)),
        )  # fmt: skip
    return table


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def move_to_milvus(
    checkpoint: Path,
    uri: str,
    collection: str,
    token: str | None,
    batch_size: int,
    index: str = "flat",
) -> None:
    """Loads the rows of a checkpoint into Milvus and saves the checkpoint with a reference.

    The checkpoint is changed when all rows were read back; until then it is as it was, and the
    command may be called again to go on.

    Args:
        checkpoint: a folder whose rows lie beside the model.
        uri: of the server, or a file of Milvus Lite.
        collection: name for the rows.
        token: of the server; None takes `MILVUS_TOKEN`.
        batch_size: rows per call.
        index: see `MilvusDatastore.from_datastore`.

    Raises:
        ValueError: for another folder, or one whose rows lie elsewhere.
        ImportError: without pymilvus.
        OSError: if the server does not answer, or something cannot be written.
    """
    lite = {"milvus_lite": "milvus-lite"} if uri.endswith(LOCAL_ENDING) else {}
    needs({"pymilvus": "pymilvus"} | lite, "hf-knn milvus", install("milvus"))
    manifest = checkpoint / MANIFEST_NAME
    with changing(checkpoint):  # or a row that is taught meanwhile would be lost
        if manifest.is_file() and isinstance(read_manifest(manifest), DatastoreReference):
            raise ValueError(
                f"Expected {checkpoint} to hold rows of its own, but it refers to Milvus already."
            )
        model = open_checkpoint(checkpoint)
        if not isinstance(model.datastore, Datastore):
            raise ValueError(f"Expected {checkpoint} to hold a datastore, but it has none.")
        stands("Rows that Milvus has already are not sent again.")
        with progress_bars():
            store = MilvusDatastore.from_datastore(
                model.datastore, uri, collection, token=token, batch_size=batch_size, index=index
            )
        model.datastore = store
        model.save_pretrained(checkpoint)
    console.print(
        f"{len(store):,} rows lie in {escape(str(store.location))}, read back and compared, "
        f"searched by {escape(str(store.index))}. "
        f"{escape(str(checkpoint))} holds a reference to them, and no rows."
    )
    console.print(
        f"Next: [bold]HF_KNN_MILVUS_URI={escape(store.collection.server.uri)} "
        f"{typed('predict', checkpoint, 'PICTURE.jpg')}[/]", soft_wrap=True,
    )  # fmt: skip
