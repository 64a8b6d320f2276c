"""The model card: a block that is made from what was measured, between what users wrote."""

import html
import json
import logging
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.manifest import MANIFEST_NAME, signed_json
from ..core.plain_json import read_json
from ..core.reading import THUMBNAILS_NAME
from ..store.hub import CARD_NAME, OpenTarget
from .code import legacy_code
from .endpoint import settle_endpoint, write_endpoint
from .receipts import PICTURES_MARK, ROWS_MARK

if TYPE_CHECKING:
    from .modeling import KnnForImageClassification

try:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData
except ImportError as missing:  # transformers needs it too, so that this is a formality
    raise ImportError("Expected huggingface_hub to be installed.") from missing


from ..store.backend import RowStore, learned_map_of

if TYPE_CHECKING:
    from .modeling import KnnForImageClassification

logger = logging.getLogger(__name__)

MEASURED_NAME = "measured.json"
"""File of a checkpoint with what was measured, which the card is made from."""

VOICE_NAMES = {"head": "head alone", "knn": "neighbours alone", "blend": "blend"}
_BEGIN = "<!-- hf_knn: what follows is made anew at each push; write above or below -->"
_END = "<!-- hf_knn: end -->"
_BLOCK = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END), re.DOTALL)
BLOB_GLOB = "datastore-*.safetensors"
_LARGEST_MEASUREMENT = 10**6
_BIN_WIDTH = 3  # confidence, accuracy, pictures
THUMBNAILS_NOTE = (
    " It also holds small copies of training pictures, without metadata; a row that is forgotten "
    "takes its own along."
)

RELIABILITY_NAME, NEIGHBORS_NAME = "reliability.png", "neighbors.png"
_PICTURES = {
    RELIABILITY_NAME: "How sure it is, and how often right",
    NEIGHBORS_NAME: "Pictures, answers, and the training pictures that voted",
}

_LARGEST_PICTURE = 5 * 10**6
_LONGEST_TEXT = 200
_HUB_ID = re.compile(r"(?:\w[\w.-]{0,95}/)?\w[\w.-]{0,95}", re.ASCII)
# all that Markdown, its tables, its links or formulas begin or end with
_MARKUP = re.compile(r"[\\`*_{}\[\]()|~#$^!=+]|\.(?=[^\W\d])|/(?=/)")
_LINK = re.compile(r"(?:https?|ftp|www)(?=\\?[:.])|@(?=[^\W\d]|[\w.-]*\\?\.)", re.IGNORECASE)
_COLUMNS = {
    "top1": "top-1",
    "mean_class": "mean per class",
    "nll": "NLL (p floored at 1e-12)",
    "ece": "ECE",
}


def read_measured(path: Path | None) -> dict[str, Any] | None:
    """What a checkpoint says was measured; None if it says nothing that can be used.

    Args:
        path: of `measured.json`; None if there is none.
    """
    if path is None:
        return None
    try:
        found = read_json(path, _LARGEST_MEASUREMENT)
        metrics = {str(k): float(v) for k, v in found["metrics"].items()}
        known = {"metrics": metrics, "rows": int(found["rows"])}
        bins = [[float(value) for value in row] for row in found.get("reliability", [])]
        known["reliability"] = [row for row in bins if len(row) == _BIN_WIDTH]
        return known | {name: str(found.get(name, "")) for name in ("dataset", "split", "note")}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        logger.warning("Expected %s to hold metrics and rows, but: %r.", path.name, error)
        return None


def read_picture(path: Path | None) -> bytes | None:
    """The picture of neighbours that comes with a checkpoint, which is kept as it is."""
    if path is None or path.stat().st_size > _LARGEST_PICTURE:
        return None
    return path.read_bytes()


def write_measured(measured: dict[str, Any], folder: Path) -> None:
    """Writes `measured.json`.

    Args:
        measured: `metrics` (`eval_…`), `rows`, and `dataset`, `split`, `note` where known.
        folder: the checkpoint.
    """
    text = json.dumps(measured, indent=2, ensure_ascii=False)
    (folder / MEASURED_NAME).write_text(text + "\n", encoding="utf-8")


def draw_reliability(model: "KnnForImageClassification", folder: Path) -> None:
    """Draws how often the blend is right when it says how sure it is, if that was measured.

    Args:
        model: what it is about.
        folder: where `reliability.png` goes; nothing is drawn without matplotlib.
    """
    bins = (model.measured or {}).get("reliability")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.info("Without matplotlib the card has no reliability diagram.")
        return
    if not bins:
        return
    figure = Figure(figsize=(4, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], "--", color="grey", label="perfectly calibrated")
    axis.plot([row[0] for row in bins], [row[1] for row in bins], "o-", label="blend")
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    axis.set_title(f"{len(bins)} bins of equally many pictures")
    axis.legend()
    figure.savefig(folder / RELIABILITY_NAME, dpi=100)


def is_made_here(card: str) -> bool:
    """Whether a card has the block that `make_card` writes."""
    return _BLOCK.search(card) is not None


def make_card(
    model: "KnnForImageClassification",
    name: str,
    existing: str | None = None,
    folder: Path | None = None,
    license: str | None = None,  # noqa: A002 - what the Hub calls it
    thumbnails: bool = True,
) -> str:
    """The text of `README.md`.

    Args:
        model: what it is about.
        name: of the repository or folder.
        existing: the card that is there; what users wrote, and metadata that is not ours, survives.
        folder: where the checkpoint lies, with pictures of the card.
        license: of the model, such as `apache-2.0`; None keeps what the card says.
        thumbnails: whether small pictures that the model keeps are where the card is.
    """
    has_pictures = thumbnails and model.thumbnails is not None
    drawn = [name for name in _PICTURES if folder is not None and (folder / name).is_file()]
    block = f"{_BEGIN}\n{_body(model, name, drawn, folder, has_pictures)}\n{_END}"
    metadata, text = {}, f"# {_text(name)}\n\n{block}\n"
    if existing is not None:
        before = ModelCard(existing, ignore_metadata_errors=True)
        metadata, old = before.data.to_dict(), before.text.strip()
        if _BLOCK.search(old):
            text = _BLOCK.sub(lambda _: block, old, count=1) + "\n"
        elif old:
            text = f"{old}\n\n{block}\n"
    data = _metadata(model, name, metadata, license)
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _metadata(
    model: "KnnForImageClassification",
    name: str,
    existing: dict[str, Any],
    license_name: str | None,
) -> Any:
    measured = model.measured or {}
    metrics, dataset = measured.get("metrics", {}), measured.get("dataset") or "pictures"
    split = _plain(measured.get("split") or "")
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="image-folder",
            dataset_name=_plain(dataset),
            dataset_split=split or None,
            metric_type="accuracy",
            metric_name=f"top-1 ({label})",
            metric_value=metrics[f"eval_{voice}_top1"],
        )
        for voice, label in VOICE_NAMES.items()
        if f"eval_{voice}_top1" in metrics
    ]
    kept = {k: v for k, v in existing.items() if k not in ("model-index", "model_name")}
    ours: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": [*dict.fromkeys([*(kept.pop("tags", None) or []), "knn", "hf-knn"])],
    }
    if base := _hub_ids(getattr(model.config, "base_model", None)):
        ours["base_model"] = base[0]
    source = {} if model.datastore is None else model.datastore.source
    named = _hub_ids(source.get("dataset")) if source.get("revision") else []  # it is on the Hub
    if named:
        ours["datasets"] = [*dict.fromkeys([*(kept.pop("datasets", None) or []), *named])]
    if license_name:
        ours["license"] = license_name
    if results:
        ours |= {"eval_results": results, "model_name": name.rpartition("/")[2]}
        ours["metrics"] = kept.pop("metrics", None) or ["accuracy"]
    return ModelCardData(**kept | ours)


def _body(
    model: "KnnForImageClassification",
    name: str,
    drawn: list[str],
    folder: Path | None,
    has_thumbnails: bool,
) -> str:
    config, quoted = model.config, json.dumps(_plain(name), ensure_ascii=False)
    lines = [
        "An image classifier that also remembers: a head on a vision backbone, blended with the "
        "votes of the nearest training pictures.",
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForImageClassification, pipeline",
        "",
        "# without the package: the code comes with the repository",
        f"model = AutoModelForImageClassification.from_pretrained({quoted}, "
        "trust_remote_code=True)",
        "",
        "# with it",
        "import hf_knn",
        f'pipeline("image-classification", model={quoted})("picture.jpg")',
        "```",
        "",
        "## Measured",
        "",
        *_measured(model),
        *(line for picture in drawn for line in ("", f"![{_PICTURES[picture]}]({picture})")),
        "",
        f"The blend uses k = {config.k}, temperature {config.knn_temperature:g}, "
        f"λ = {config.knn_weight:g}"
        + (
            f", and its own temperature {config.blend_temperature:.3g}."
            if config.blend_temperature != 1
            else "."
        ),
        "",
        "## Datastore",
        "",
        *_datastore(model, folder),
        "",
        "## Limits and privacy",
        "",
        "The answer is one of the classes it knows, also for a picture of something else. The "
        "datastore holds features of the training pictures, which can reveal something about them, "
        "and prints, by which whoever has a picture can tell whether it is stored: share it only "
        "where you may share that. Removing a row leaves no byte of it in the next "
        "version, but earlier commits of a repository still hold it until its history is squashed "
        "(`HfApi().super_squash_history`); a `linear` or `mlp` head keeps what it learned."
        + (THUMBNAILS_NOTE if has_thumbnails else ""),
    ]
    return "\n".join(lines)


def _measured(model: "KnnForImageClassification") -> list[str]:
    measured = model.measured
    if not measured:
        return ["Nothing was measured on pictures held out."]
    metrics = measured["metrics"]
    present = [voice for voice in VOICE_NAMES if f"eval_{voice}_top1" in metrics]
    head = f"| voice | {' | '.join(_COLUMNS.values())} |"
    rows = [
        f"| {VOICE_NAMES[voice]} | "
        + " | ".join(f"{metrics.get(f'eval_{voice}_{c}', float('nan')):.4f}" for c in _COLUMNS)
        + " |"
        for voice in present
    ]
    source = _text(measured.get("dataset") or "a dataset without a name")
    split = f", split {_text(measured['split'])}" if measured.get("split") else ""
    lines = [head, "|---|" + "---|" * len(_COLUMNS), *rows, ""]
    note = f" {_text(measured['note'])}" if measured.get("note") else ""
    lines.append(f"On {measured['rows']} pictures of {source}{split}.{note}")  # one paragraph
    return lines


def _datastore(model: "KnnForImageClassification", folder: Path | None) -> list[str]:
    config, store = model.config, model.datastore
    if store is None:
        return ["None: this is the head alone."]
    known = {k: v for k, v in store.source.items() if v and k not in (PICTURES_MARK, ROWS_MARK)}
    named = ", ".join(f"{_text(k)} {_text(v)}" for k, v in known.items())
    size = sum(path.stat().st_size for path in folder.glob(BLOB_GLOB)) if folder else 0
    return [
        f"{len(store):,} rows of {store.dim} values over {config.classes} classes"
        + (f", {size / 1e6:,.1f} MB" if size else "")
        + f"; {config.store_pooling} pooling, {config.normalization} "
        f"normalisation, {_learned(store)}{config.metric} similarity, index {_text(store.index)}."
        + (f" Made from {named}." if named else "")
        + _location(store),
    ]


def _learned(store: RowStore) -> str:
    learned = learned_map_of(store)
    return "" if learned is None else f"learned metric ({_text(learned)} values), "


def _location(store: RowStore) -> str:
    if store.location is None:
        return ""
    return (
        f" The rows are not in this repository: they lie in {_text(store.location)}, and opening "
        "the model asks that server, with `trust_remote_datastore=True` or `datastore_uri=`."
    )


def _text(value: Any) -> str:
    """A name as text: it can neither end a line nor be markup, a link or a table cell."""
    shown = _MARKUP.sub(r"\\\g<0>", html.escape(_plain(value), quote=False))
    return _LINK.sub("\\g<0>\u2060", shown)  # a word joiner, which nobody sees


def _plain(value: Any) -> str:
    """One line of what can be seen."""
    flat = " ".join(str(value).split())[:_LONGEST_TEXT]
    return "".join(each if each.isprintable() else "\ufffd" for each in flat)


def _hub_ids(*names: Any) -> list[str]:
    """Those of some names that a repository of the Hub can have, which makes them links."""
    return [name for name in names if isinstance(name, str) and _HUB_ID.fullmatch(name)]


def leave_thumbnails(folder: Path) -> None:
    """Takes the small pictures out of a copy of a checkpoint, and out of what its files promise.

    Args:
        folder: the copy, whose files may be links to those of others.
    """
    (folder / THUMBNAILS_NAME).unlink(missing_ok=True)
    place = folder / MANIFEST_NAME
    values = read_json(place) if place.is_file() else {}
    binding = values.get("binding")
    if binding is None or all(file["name"] != THUMBNAILS_NAME for file in binding["files"]):
        return
    binding["files"] = [file for file in binding["files"] if file["name"] != THUMBNAILS_NAME]
    del values["checksum"]
    place.unlink()
    place.write_text(signed_json(values), encoding="utf-8")


def publish(
    model: "KnnForImageClassification",
    target: OpenTarget,
    message: str,
    description: str | None,
    license_name: str | None,
    options: dict[str, Any],
    *,
    thumbnails: bool,
    endpoint: bool,
) -> Any:
    """Saves a model with its card, and pushes both.

    Args:
        model: what is pushed.
        target: an open one.
        message: of the commit.
        description: likewise.
        license_name: for the card; None keeps what the card says.
        options: of `save_pretrained`.
        thumbnails: whether small pictures that the model keeps go along.
        endpoint: also push what Inference Endpoints needs; else what there is of it goes.

    Returns:
        `huggingface_hub.CommitInfo`.

    Raises:
        ValueError: with `endpoint`, for a repository with a handler that somebody else wrote.
    """
    gone = settle_endpoint(target.read_text, endpoint)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        model.save_pretrained(folder, **options)
        if not thumbnails:
            leave_thumbnails(folder)
        draw_reliability(model, folder)
        before = target.read_text(CARD_NAME)
        card = make_card(model, target.repo_id, before, folder, license_name, thumbnails)
        (folder / CARD_NAME).write_text(card, encoding="utf-8")
        replaced = [*sorted(legacy_code(target.read_text)), *gone]
        if endpoint:
            write_endpoint(model, folder)
        return target.push(folder, message, description, replaced=replaced)
