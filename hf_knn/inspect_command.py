"""`hf-knn inspect`: what a datastore remembers, what is wrong with it, and a map of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.markup import escape

from .checkup import Checkup, Watch, examine, unwatched
from .checkup_report import sections_of
from .console import console
from .datastore import Datastore
from .doctor_command import CSV_NAME, PAGE_NAME, print_checkup, summary_of, watching
from .drawings import map_svg
from .feature_map import MOST_ROWS, place_features
from .findings import Pictures, write_csv
from .images import BadImageError, decode_image
from .modeling_knn import KnnForImageClassification
from .pages import Drawing, Section, Table, plain, svg_uri, write_page
from .prints import Print, print_of

SPLIT = "datastore"


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
    model = KnnForImageClassification.from_pretrained(checkpoint)
    store = model.datastore
    if store is None or not len(store):
        raise ValueError(f"Expected {checkpoint} to hold a datastore with rows, but it has none.")
    store.verify()
    pictures = pictures_of(store, model.config.class_names)
    if root is not None:
        check_root(root, pictures)
    with watching(not json_output) as watch:
        checkup = examine_store(store, pictures, root, seed, watch)
        drawing = _map(checkup, seed, watch)

    def show(number: int) -> Image.Image | None:
        return None if root is None else _opened(root, pictures.paths[number])

    sections = sections_of(checkup, show)
    sections[1:1] = [_facts(model, store)] + ([drawing] if drawing else [])
    name = plain(Path(checkpoint).name)
    with checkup.phase("report"):
        write_csv(output / CSV_NAME, checkup.findings, pictures)
        page = write_page(output / PAGE_NAME, f"What {name} remembers", sections, [_lead(root)])
    if json_output:
        values = summary_of(checkup, page) | {"checkpoint": _fact_rows(model, store)}
        typer.echo(json.dumps(values, indent=2, ensure_ascii=False))
        return
    print_checkup(checkup, page)
    console.print(
        f"All {len(store)} rows are what {escape(store_name(checkpoint))} promises, byte for byte.",
        highlight=False,
    )


def store_name(checkpoint: str) -> str:
    """The manifest of a checkpoint, for a reader."""
    return f"{plain(checkpoint)}/datastore.json"


def pictures_of(store: Datastore, names: list[str]) -> Pictures:
    """The rows of a datastore as pictures of one split.

    Args:
        store: N rows.
        names: of the classes.
    """
    paths = store.paths or [""] * len(store)
    rows = np.arange(len(store))
    return Pictures(
        [SPLIT] * len(store), rows, store.ids.numpy(), paths, store.labels.numpy(), names
    )


def examine_store(
    store: Datastore, pictures: Pictures, root: Path | None, seed: int, watch: Watch = unwatched
) -> Checkup:
    """Looks for everything that rows can have; copies are confirmed by pixels where there are any.

    Args:
        store: N rows.
        pictures: from `pictures_of`.
        root: the folder of the pictures; None compares features alone.
        seed: of folds and parts.
        watch: told of the progress.
    """
    prints: list[Print] | None = None
    checkup = Checkup(pictures, np.arange(len(pictures)), store.features.float())
    if root is None:
        checkup.skipped.append("Pixels: pass --pictures FOLDER to compare and show the pictures.")
    else:
        with checkup.phase("decoding"):
            prints = _prints(root, pictures, watch)
        if prints is None:
            checkup.skipped.append("Pixels: not every picture of the datastore can be opened.")
    examine(checkup, prints, None, seed, watch)
    return checkup


def check_root(root: Path, pictures: Pictures) -> None:
    """Refuses a folder that has none of the pictures, or paths that leave it.

    Args:
        root: the folder.
        pictures: with paths.

    Raises:
        ValueError: naming the folder and a path.
    """
    if not any(_place(root, path) is not None for path in pictures.paths):
        example = next((path for path in pictures.paths if path), "")
        wanted = f"such as {plain(example)}" if example else "but the datastore knows no paths"
        raise ValueError(f"Expected {root} to hold the pictures of the datastore, {wanted}.")


def _place(root: Path, path: str) -> Path | None:
    """The file of a stored path, which a stranger may have written, if it lies in the folder."""
    place = (root / path).resolve()
    is_inside = path and place.is_relative_to(root.resolve())
    return place if is_inside and place.is_file() else None


def _opened(root: Path, path: str) -> Image.Image | None:
    place = _place(root, path)
    if place is None:
        return None
    try:
        return decode_image(place)
    except BadImageError:
        return None


def _prints(root: Path, pictures: Pictures, watch: Watch) -> list[Print] | None:
    done = watch("Decoding", len(pictures))
    found = []
    for path in pictures.paths:
        image = _opened(root, path)
        if image is None:
            return None
        found.append(print_of(image))
        done(1)
    return found


def _map(checkup: Checkup, seed: int, watch: Watch) -> Section | None:
    if len(checkup.features) < 4:
        checkup.skipped.append("Map: fewer than four rows.")
        return None
    done = watch("Drawing the map", 1)
    with checkup.phase("map"):
        rows, places = place_features(_unit(checkup.features), seed)
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


def _unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features - features.mean(0), dim=1)


def _facts(model: KnnForImageClassification, store: Datastore) -> Section:
    rows = [(name, str(value)) for name, value in _fact_rows(model, store).items()]
    return Section("Checkpoint", tables=[Table(("", ""), rows)])


def _fact_rows(model: KnnForImageClassification, store: Datastore) -> dict[str, Any]:
    config = model.config
    facts: dict[str, Any] = {
        "rows": len(store), "width": store.dim, "stored as": store.dtype, "metric": store.metric,
        "normalisation": store.normalization, "index": str(store.index), "k": config.k,
        "temperature": config.knn_temperature, "λ": config.knn_weight, "head": config.head,
        "classes": config.classes, "backbone": getattr(config, "base_model", None) or "",
    }  # fmt: skip
    facts |= {f"source: {name}": value for name, value in store.source.items()}
    if store.manifest is not None:
        facts |= {f"sha256 of {blob.name}": blob.sha256 for blob in store.manifest.blobs}
        if store.manifest.binding is not None:
            facts["fingerprint of backbone"] = store.manifest.binding.fingerprint
    return facts


def _lead(root: Path | None) -> str:
    if root is None:
        return (
            "What hf-knn inspect found among the rows of the datastore. No pictures are stored "
            "in a checkpoint: pass --pictures FOLDER to see them here."
        )
    return f"What hf-knn inspect found among the rows of the datastore; pictures from {root.name}."
