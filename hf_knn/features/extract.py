"""From pictures to features: on all ranks, resumable after a kill, cached picture by picture."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..core.backbone import hash_tensors
from ..core.config import KnnConfig
from ..data.batches import IMAGE, BadRow, ReadyBatch, pixel_batches, pixels_of, read_batch
from ..data.keys import picture_keys
from ..data.loading import groups_of, ids_of, label_names, labels_of, prepare
from ..data.places import paths_of
from ..model.backbones import default_pooling, in_eval_mode, measure_width
from ..model.modeling import KnnForImageClassification
from ..store.folders import cache_root, short_name
from ..store.products import has_fast_bfloat16
from .backends import FEWEST_ROWS, SAMPLE, check_backend, choose_backend, open_encoder
from .cache import KEYS_FOLDER, FeatureCache, FeatureTable, key_list
from .encoders import (
    AUTO,
    COMPILE,
    PRECISIONS,
    TORCH,
    Encoded,
    Encoder,
    Work,
    encode_rows,
    in_order,
    one_torch_thread,
)

logger = logging.getLogger(__name__)


@dataclass
class ImageFeatures:
    """Features of a set of labelled pictures, in row order.

    Attributes:
        features: [N, D] float32, CPU.
        labels: [N] int64.
        ids: [N] int64, the sample ids.
        label_names: the class names, if known.
        paths: where each picture lies, relative to its folder; empty strings if unknown.
        skipped: pictures that could not be decoded; they have no row.
        seconds: how long the forward passes took; 0 when all came from the cache.
        computed: how many pictures went through the backbone in this call.
        knn_log_probs: [N] leave-one-out log p_knn of each row's own label, for the loss.
        gives_ids: whether a row tells its sample id, as a trainer wants.
        groups: [N] int64, which rows belong together (one patient, one camera) and must be on the
            same side of every split; None where each row is its own.
        backend: what encoded the pictures, `torch`, `onnx` or `openvino`; empty if unknown.
        contents: [N, 16] uint8, the print of each picture, by which the same picture is known
            again, see `content_of`; None if unknown.
    """

    features: Tensor
    labels: Tensor
    ids: Tensor
    label_names: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    skipped: list[BadRow] = field(default_factory=list)
    seconds: float = 0.0
    computed: int = 0
    knn_log_probs: Tensor | None = None
    gives_ids: bool = False
    groups: Tensor | None = None
    backend: str = ""
    contents: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: column[row] for name, column in self._columns().items()}

    def __getitems__(self, rows: Sequence[int]) -> ReadyBatch:
        """All rows of a batch at once, which a `DataLoader` asks for where it can."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        return ReadyBatch({name: column[index] for name, column in self._columns().items()})

    def _columns(self) -> dict[str, Tensor]:
        """What a row tells, for all rows."""
        columns = {"features": self.features, "labels": self.labels}
        if self.gives_ids:
            columns["sample_ids"] = self.ids
        if self.knn_log_probs is not None:
            columns["knn_log_probs"] = self.knn_log_probs
        return columns

    def select(self, rows: Sequence[int] | NDArray | Tensor) -> Self:
        """Some of the rows, in the order given."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        paths = [self.paths[row] for row in index.tolist()] if self.paths else []
        return replace(
            self, features=self.features[index], labels=self.labels[index], ids=self.ids[index],
            paths=paths, skipped=[], seconds=0.0, computed=0, knn_log_probs=None,
            groups=None if self.groups is None else self.groups[index],
            contents=None if self.contents is None else self.contents[index],
        )  # fmt: skip


def extract_features(
    model: PreTrainedModel,
    dataset: Any,
    processing_class: Any = None,
    *,
    pooling: str | None = None,
    batch_size: int = 32,
    precision: str = "fp32",
    backend: str | None = None,
    on_bad_image: str = "fail",
    cache_dir: str | Path | None = None,
    use_cache: bool = True,
    progress: bool = True,
    group_by: str | None = None,
) -> ImageFeatures:
    """Runs a model over a dataset, once: what was computed before comes from the cache.

    With several ranks (`accelerate launch`, `torchrun`) each computes its share of the pictures and
    every rank returns all features, without padding duplicates.

    Args:
        model: a `KnnForImageClassification` (its poolings are used) or any vision model.
        dataset: a `datasets.Dataset` with pictures and labels.
        processing_class: the image processor; None takes the model's own.
        pooling: for a plain vision model: `cls`, `mean`, …; None chooses as `from_backbone` does.
        batch_size: pictures per forward pass, >= 1; on a CPU at most 4, several at once.
        precision: `fp32`, or `bf16` / `fp16` by autocast; features are float32 in any case.
        backend: `torch`, `compile` (torch.compile, which is never chosen for you), `onnx`,
            `openvino`, or `auto`: from 500 new pictures on, the fastest of those installed whose
            features are within 1e-2 of PyTorch's, measured once per model and machine if PyTorch
            would take over half a minute; and one that encoded most of these pictures before, if
            that leaves less to wait for. None takes `$HF_KNN_BACKEND`, else `auto`.
        on_bad_image: `fail` raises at the first picture that cannot be decoded, `skip` leaves it
            out and reports it in `skipped`.
        cache_dir: where features are kept; None is `$HF_KNN_CACHE/features`, or below
            `~/.cache/hf_knn`.
        use_cache: False neither reads nor writes the cache of features, and `auto` exports nothing.
        progress: show a progress bar.
        group_by: a column that says which pictures belong together, for `ImageFeatures.groups`.

    Returns:
        The features with labels and ids, in row order.

    Raises:
        ValueError: for an empty dataset, a picture that cannot be decoded (with its row), a picture
            without label, a missing column, or a bad option.
        ImportError: for a backend that is not installed.
    """
    _check_options(batch_size, precision, on_bad_image)
    backend = check_backend(backend)
    rows = prepare(dataset)
    if len(rows) == 0:
        raise ValueError("Expected a dataset with at least one picture, but it is empty.")
    labels = labels_of(rows)
    groups = None if group_by is None else groups_of(rows, group_by)
    processor = processing_class or getattr(model, "image_processor", None)
    if processor is None:
        raise ValueError("Expected `processing_class`, since the model has no image processor.")
    config = _pooling_config(model, pooling)
    backbone = model.backbone if isinstance(model, KnnForImageClassification) else model
    root = Path(cache_dir) if cache_dir is not None else cache_root() / "features"
    keys = picture_keys(rows, root / KEYS_FOLDER) if use_cache else None

    def missing(backend: str) -> int:
        if keys is None:
            return len(rows)
        wanted = set(key_list(keys))
        return len(wanted) - _cache_of(root, work, backend, rows).count(wanted)

    work = Work(
        backbone, config, mark_of(backbone), precision, batch_size, settings_of(processor),
        missing, use_cache, partial(_sample, rows, processor),
    )  # fmt: skip
    _warn_of_slow_precision(backbone, precision)
    with in_eval_mode(backbone):
        chosen = _choose_together(backend, work)
        cache = _cache_of(root, work, chosen, rows) if use_cache else FeatureCache(None)
        table = FeatureTable(len(rows), config.feature_dim + config.extra_dim, keys, cache)
        started = time.perf_counter()
        computed = _fill(table, rows, work, chosen, processor, on_bad_image, progress)
        seconds = time.perf_counter() - started if computed else 0.0
    found = _collect(table, rows, labels, groups)
    return replace(found, seconds=seconds, computed=computed, backend=chosen)


def _fill(
    table: FeatureTable, rows: Any, work: Work, backend: str, processor: Any, on_bad_image: str,
    progress: bool,
) -> int:  # fmt: skip
    """Fills in this rank's share and what other ranks have; returns how many were encoded here."""
    state = PartialState()
    table.share(state.process_index, state.num_processes)
    table.take(with_bad=on_bad_image == "skip")
    missing = table.missing()
    computed = 0
    if missing:
        encoder = open_encoder(backend, work)
        shown = progress and state.is_main_process
        with transformers_logging.tqdm(
            total=len(missing), desc="Extracting features", unit="img", disable=not shown
        ) as bar:
            try:
                for part in encode_rows(rows, missing, processor, encoder):
                    if part.bad and on_bad_image == "fail":
                        raise _refusal(part.bad[0])
                    table.put(part)
                    computed += len(part.rows)
                    bar.update(len(part.rows) + len(part.bad))
            finally:  # also at a bad picture or Ctrl-C: what was computed is kept
                table.flush()
    if state.num_processes > 1:
        table.merge(gather_object([table.own()]))
    return computed


def _collect(
    table: FeatureTable, rows: Any, labels: Tensor, groups: Tensor | None
) -> ImageFeatures:
    paths, ids = paths_of(rows), ids_of(rows)
    raw = rows.select_columns([IMAGE])
    bad = [
        BadRow(row, int(ids[row]), (raw[row][IMAGE] or {}).get("path") or "", reason)
        for row, reason in table.bad()
    ]
    kept = table.good()
    if len(kept) == 0:
        raise ValueError(
            f"Expected at least one picture that can be decoded, but none of {len(rows)} can; "
            f"row 0: {bad[0].reason}."
        )
    for one in bad:
        logger.warning("Skipped row %d (%s): %s.", one.row, one.path or "no path", one.reason)
    return ImageFeatures(
        features=table.features if len(kept) == len(rows) else table.features[kept],
        labels=labels[kept],
        ids=ids[kept],
        label_names=label_names(rows),
        paths=[paths[row] for row in kept.tolist()],
        skipped=bad,
        groups=None if groups is None else groups[kept],
        contents=torch.from_numpy(table.contents)[kept],
    )


def _refusal(bad: BadRow) -> ValueError:
    return ValueError(
        f"Expected pictures that can be decoded, but row {bad.row} ({bad.path or 'no path'}) "
        f"cannot: {bad.advice()}, or pass on_bad_image='skip'."
    )


def _choose_together(wanted: str, work: Work) -> str:
    """One choice for all ranks: what each would measure by itself differs."""
    if PartialState().num_processes == 1 or wanted != AUTO:
        return choose_backend(wanted, work)
    found = [choose_backend(wanted, work) if PartialState().is_main_process else ""]
    return str(broadcast_object_list(found)[0])


def _sample(rows: Any, processor: Any, count: int) -> Tensor | None:
    """The pixels of the first pictures that can be decoded, at most so many; None if none can."""
    for start in range(0, len(rows), count):
        batch = read_batch(rows, range(start, min(start + count, len(rows))), processor)
        if batch.pixel_values is not None:
            return batch.pixel_values
    return None


def mark_of(backbone: PreTrainedModel) -> str:
    """A name of a backbone's weights and architecture."""
    weights = hash_tensors(sorted(backbone.state_dict().items()))
    architecture = backbone.config.to_dict() | {"_name_or_path": ""}
    text = json.dumps([weights, architecture], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def settings_of(processor: Any) -> str:
    """A name of what an image processor does."""
    return json.dumps(processor.to_dict(), sort_keys=True, default=str)


def _cache_of(root: Path, work: Work, backend: str, rows: Any) -> FeatureCache:
    names = label_names(rows)
    about = {
        "model": work.backbone.config.name_or_path or type(work.backbone).__name__,
        "pooling": "+".join(dict.fromkeys(map(str, work.key["poolings"]))),
        "precision": work.precision,
        "backend": backend,
        "first_pictures": f"{len(rows)} of {', '.join(names[:3])}{' …' * (len(names) > 3)}",
    }
    return FeatureCache(root / short_name(work.key | {"backend": backend, "format": 3}), about)


def _pooling_config(model: PreTrainedModel, pooling: str | None) -> KnnConfig:
    if isinstance(model, KnnForImageClassification):
        if pooling is not None:
            raise ValueError("Expected no `pooling` for a k-NN model, which has its own.")
        return model.config
    pooling = pooling or default_pooling(model)
    return KnnConfig(pooling=pooling, feature_dim=measure_width(model, pooling))


def _warn_of_slow_precision(backbone: PreTrainedModel, precision: str) -> None:
    """Says so where a short dtype saves nothing: a CPU that has no instructions for it."""
    is_fast = precision == "bf16" and has_fast_bfloat16()
    if precision != "fp32" and not is_fast and next(backbone.parameters()).device.type == "cpu":
        logger.warning(
            "This CPU has no instructions for %s, so that it is emulated; precision='fp32' is "
            "faster and exact.", precision,
        )  # fmt: skip


def _check_options(batch_size: int, precision: str, on_bad_image: str) -> None:
    if batch_size < 1:
        raise ValueError(f"Expected `batch_size` to be >= 1, but got {batch_size}.")
    if precision not in PRECISIONS:
        raise ValueError(f"Expected `precision` to be fp32, bf16 or fp16, but got {precision!r}.")
    if on_bad_image not in ("fail", "skip"):
        raise ValueError(f"Expected `on_bad_image` to be fail or skip, but got {on_bad_image!r}.")


class FeatureStream:
    """Features of pictures as they come, kept nowhere: for more of them than memory holds.

    Args:
        model: whose backbone makes them, in `eval()` mode.
        rows: N pictures, as `encode_rows` takes them.
        backend: as for `extract_features`.

    Attributes:
        backend: the one that was chosen.

    Raises:
        ValueError: without an image processor, or for a backend that cannot run this model.
        ImportError: for one that is not installed.
    """

    def __init__(
        self, model: KnnForImageClassification, rows: Any, backend: str | None = None
    ) -> None:
        wanted = check_backend(backend)
        if wanted == AUTO and len(rows) < FEWEST_ROWS:
            wanted = TORCH  # and nothing is measured: nor need the weights have a name
        processor = model.image_processor
        if processor is None:
            raise ValueError(
                "Expected a checkpoint with an image processor to read pictures, but it has none; "
                "copy its preprocessor_config.json again."
            )
        self._work = Work(
            model.backbone, model.config, "" if wanted == TORCH else mark_of(model.backbone),
            "fp32", _BATCH, settings_of(processor), lambda _: len(rows), True,
            partial(_sample, rows, processor),
        )  # fmt: skip
        self.backend = choose_backend(wanted, self._work)
        self._rows, self._processor = rows, processor
        self._encoder: Encoder | None = None

    def __call__(self, numbers: list[int]) -> Iterator[Encoded]:
        """Decodes and encodes some rows, while others are read ahead.

        Args:
            numbers: of the rows, in the order wanted.

        Yields:
            Some of them at a time; see `encode_rows`.
        """
        if numbers:
            self._encoder = self._encoder or open_encoder(self.backend, self._work)
            yield from encode_rows(self._rows, numbers, self._processor, self._encoder)


_BATCH = 32
_ANSWERS = 100_000
"""Pictures that a server is expected to answer: worth the export of a graph."""


class PictureEncoder:
    """Makes features of decoded pictures; several threads may call it at the same time.

    Args:
        model: a `KnnForImageClassification` with an image processor; it is put into `eval()` mode
            and must stay in it.
        backend: `torch`, the model itself; `onnx` or `openvino`, whose features are checked against
            it first and may differ by 1e-2 at most; or `auto`, the fastest of those installed,
            measured once per model and machine.

    Attributes:
        backend: the one that was chosen.

    Raises:
        ValueError: without an image processor, or for a backend that cannot run this model;
            `compile` is refused, since threads share the model.
        ImportError: for a backend that is not installed.
    """

    def __init__(self, model: KnnForImageClassification, backend: str = TORCH) -> None:
        self.backend = check_backend(backend)
        if self.backend == COMPILE:
            raise ValueError(
                "Expected `backend` to be torch, onnx, openvino or auto for a server, but got "
                "'compile'; choose onnx or openvino."
            )
        self._model = model.eval()
        ((sample, _),) = pixel_batches(_patterns(), model.image_processor, SAMPLE)
        work = Work(
            model.backbone, model.config, mark_of(model.backbone), "fp32", _BATCH,
            settings_of(model.image_processor), lambda _: _ANSWERS, True, lambda _: sample,
        )  # fmt: skip
        self.backend = choose_backend(self.backend, work)
        self._torch = open_encoder(TORCH, work)
        self._graph = self._torch if self.backend == TORCH else open_encoder(self.backend, work)
        self._shape = sample.shape[1:]

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Runs the processor and the backbone.

        Args:
            images: B >= 1 RGB pictures, as `decode_image` returns them.

        Returns:
            [B, D] float32 on the CPU, as in `pooler_output`.
        """
        return self.encode(self.read(images))

    def read(self, images: Sequence[Image.Image]) -> Tensor:
        """[B, 3, H, W] float32: what the processor makes of B decoded pictures."""
        return pixels_of(images, self._model.image_processor)

    def encode(self, pixels: Tensor) -> Tensor:
        """Runs the backbone; many pictures go through it in parts, one on each core.

        Args:
            pixels: [B, 3, H, W], as `read` makes them, B >= 1.

        Returns:
            [B, D] float32 on the CPU.
        """
        fits = pixels.shape[1:] == self._shape  # a graph has one size
        encoder = self._graph if fits else self._torch
        even = -(-len(pixels) // encoder.streams)  # no core waits for a longer part
        parts = pixels.split(min(encoder.batch_size, even))
        if len(parts) == 1 or encoder.streams == 1:
            return torch.cat([encoder.encode(part)() for part in parts])
        with one_torch_thread():
            found = in_order(lambda part: encoder.encode(part)(), parts, encoder.streams)
            return torch.cat([*found])


def _patterns() -> list[Image.Image]:
    """Pictures that a graph is compared on before there are any: smooth ones and noise."""
    made = [Image.effect_noise((256, 256), spread) for spread in (5, 30, 90)]
    made += [Image.linear_gradient("L"), Image.radial_gradient("L")]
    return [image.convert("RGB") for image in made]


@contextmanager
def progress_bars() -> Iterator[None]:
    """Shows the progress bars of what takes long, unless `HF_KNN_VERBOSITY` is `quiet`."""
    if os.environ.get("HF_KNN_VERBOSITY") == "quiet":
        yield
        return
    transformers_logging.enable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.disable_progress_bar()
