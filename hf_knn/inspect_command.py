"""`hf-knn inspect`: what a datastore remembers, what is wrong with it, and a map of it."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import typer
from PIL import Image
from rich.markup import escape

from .checkup import Checkup, Watch
from .checkup_report import sections_of
from .console import console
from .datastore import Datastore
from .doctor_command import CSV_NAME, PAGE_NAME, print_checkup, summary_of, watching
from .drawings import map_svg
from .feature_map import MOST_ROWS, place_features
from .findings import write_csv
from .images import BadImageError, decode_image
from .inspection import inspect_datastore, open_picture
from .modeling_knn import KnnForImageClassification
from .pages import Drawing, Section, Table, plain, svg_uri, write_page


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
    names = model.config.class_names
    with watching(not json_output) as watch:
        checkup = inspect_datastore(store, names, root=root, seed=seed, watch=watch)
        drawing = _map(checkup, seed, watch)
    pictures = checkup.pictures

    def show(number: int) -> Image.Image | None:
        image = None if root is None else open_picture(root, pictures.paths[number])
        if image is not None or model.thumbnails is None:
            return image
        return _decoded(model.thumbnails.get(int(store.ids[number])))

    sections = sections_of(checkup, show)
    sections[1:1] = [drawing] if drawing else []
    sections.insert(-1, _facts(model, store))
    name = plain(Path(checkpoint).name)
    with checkup.phase("report"):
        write_csv(output / CSV_NAME, checkup.findings, pictures)
        lead = _lead(root, model.thumbnails is not None)
        page = write_page(output / PAGE_NAME, f"What {name} remembers", sections, [lead])
    if json_output:
        values = summary_of(checkup, page) | {"checkpoint": _fact_rows(model, store)}
        typer.echo(json.dumps(values, indent=2, ensure_ascii=False))
        return
    print_checkup(checkup, page)
    console.print(
        f"All {len(store)} rows are what {escape(store_name(checkpoint))} promises, byte for byte.",
        highlight=False,
    )
    place = escape(shlex.quote(plain(checkpoint)))
    if checkup.findings and Path(checkpoint).is_dir():
        console.print(
            f"Next: look at the page; with the ids in {CSV_NAME}: [bold]hf-knn relabel {place} "
            f"--ids ID --label CLASS[/], or [bold]hf-knn forget {place} --ids ID[/]",
            soft_wrap=True, highlight=False,
        )  # fmt: skip


def store_name(checkpoint: str) -> str:
    """The manifest of a checkpoint, for a reader."""
    return f"{plain(checkpoint)}/datastore.json"


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


def _facts(model: KnnForImageClassification, store: Datastore) -> Section:
    facts = _fact_rows(model, store)
    rows = [(name, str(value)) for name, value in facts.items() if value != ""]
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


def _lead(root: Path | None, has_thumbnails: bool) -> str:
    said = "What hf-knn inspect found among the rows of the datastore"
    if root is not None:
        return f"{said}; pictures from {root.name}."
    if has_thumbnails:
        return f"{said}; small pictures from the checkpoint."
    return f"{said}. This checkpoint holds no pictures: pass --pictures FOLDER to see them here."


def _decoded(small: bytes | None) -> Image.Image | None:
    """A stored thumbnail; None where there is none that can be read."""
    if small is None:
        return None
    try:
        return decode_image(small)
    except BadImageError:
        return None
