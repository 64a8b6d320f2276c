"""From pictures to features: on all ranks, resumable after a kill, cached by fingerprint."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from .backbone import default_pooling, evaluating, extract, hash_tensors, measure_width
from .configuration_knn import KnnConfig
from .data import (
    BadRow,
    fingerprint_of,
    groups_of,
    ids_of,
    label_names,
    labels_of,
    paths_of,
    prepare,
    read_batch,
)
from .modeling_knn import KnnForImageClassification
from .storage import hash_blocks

logger = logging.getLogger(__name__)

SHARD_ROWS = 256
"""Rows per cache file: what a kill can cost."""

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


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

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        item = {"features": self.features[row], "labels": self.labels[row]}
        if self.gives_ids:
            item["sample_ids"] = self.ids[row]
        if self.knn_log_probs is not None:
            item["knn_log_probs"] = self.knn_log_probs[row]
        return item

    def select(self, rows: Sequence[int] | NDArray | Tensor) -> Self:
        """Some of the rows, in the order given."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        paths = [self.paths[row] for row in index.tolist()] if self.paths else []
        return replace(
            self, features=self.features[index], labels=self.labels[index], ids=self.ids[index],
            paths=paths, skipped=[], seconds=0.0, computed=0, knn_log_probs=None,
            groups=None if self.groups is None else self.groups[index],
        )  # fmt: skip


def extract_features(
    model: PreTrainedModel,
    dataset: Any,
    processing_class: Any = None,
    *,
    pooling: str | None = None,
    batch_size: int = 32,
    precision: str = "fp32",
    on_bad_image: str = "fail",
    cache_dir: str | Path | None = None,
    use_cache: bool = True,
    progress: bool = True,
    group_by: str | None = None,
) -> ImageFeatures:
    """Runs a model over a dataset, once: what was computed before comes from the cache.

    With several ranks (`accelerate launch`, `torchrun`) each computes its share of the shards and
    every rank returns all features, without padding duplicates.

    Args:
        model: a `KnnForImageClassification` (its poolings are used) or any vision model.
        dataset: a `datasets.Dataset` with pictures and labels.
        processing_class: the image processor; None takes the model's own.
        pooling: for a plain vision model: `cls`, `mean`, …; None chooses as `from_backbone` does.
        batch_size: pictures per forward pass, >= 1.
        precision: `fp32`, or `bf16` / `fp16` by autocast; features are float32 in any case.
        on_bad_image: `fail` raises at the first picture that cannot be decoded, `skip` leaves it
            out and reports it in `skipped`.
        cache_dir: where features are kept; None is `$HF_KNN_CACHE/features`, or below
            `~/.cache/hf_knn`.
        use_cache: False neither reads nor writes the cache.
        progress: show a progress bar.
        group_by: a column that says which pictures belong together, for `ImageFeatures.groups`.

    Returns:
        The features with labels and ids, in row order.

    Raises:
        ValueError: for an empty dataset, a picture that cannot be decoded (with its row), a picture
            without label, a missing column, or a bad option.
    """
    _check_options(batch_size, precision, on_bad_image)
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
    folder = _cache_folder(rows, backbone, config, processor, precision, cache_dir)
    shards = _Shards(folder if use_cache else None, on_bad_image)
    runner = _Runner(backbone, config, processor, batch_size, precision)
    started = time.perf_counter()
    computed = shards.fill(rows, runner, progress)
    elapsed = time.perf_counter() - started
    parts = shards.gather()
    bad = [BadRow(*row) for part in parts for row in part["bad"]]
    kept = torch.cat([part["rows"] for part in parts])
    if len(kept) == 0:
        raise ValueError(
            f"Expected at least one picture that can be decoded, but none of {len(rows)} can; "
            f"row 0: {bad[0].reason}."
        )
    for row in bad:
        logger.warning("Skipped row %d (%s): %s.", row.row, row.path or "no path", row.reason)
    paths = paths_of(rows)
    return ImageFeatures(
        features=torch.cat([part["features"] for part in parts]),
        labels=labels[kept],
        ids=ids_of(rows)[kept],
        label_names=label_names(rows),
        paths=[paths[row] for row in kept.tolist()],
        skipped=bad,
        seconds=elapsed if computed else 0.0,
        computed=computed,
        groups=None if groups is None else groups[kept],
    )


class _Runner:
    """The forward pass, with the model put back as it was."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        config: KnnConfig,
        processor: Any,
        batch_size: int,
        precision: str,
    ) -> None:
        self.backbone, self.config, self.processor = backbone, config, processor
        self.batch_size, self.precision = batch_size, precision

    def run(
        self, rows: Any, numbers: range, on_batch: Callable[[int], None], stop_at_bad: bool
    ) -> tuple[Tensor, list[int], list[BadRow]]:
        parameter = next(self.backbone.parameters())
        autocast = _AUTOCAST.get(self.precision)
        parts: list[Tensor] = []
        good: list[int] = []
        bad: list[BadRow] = []
        context = torch.autocast(parameter.device.type, autocast) if autocast else nullcontext()
        with evaluating(self.backbone), context:
            for start in range(numbers.start, numbers.stop, self.batch_size):
                wanted = range(start, min(start + self.batch_size, numbers.stop))
                batch = read_batch(rows, wanted, self.processor)
                good += batch.rows
                bad += batch.bad
                if bad and stop_at_bad:
                    break
                if batch.pixel_values is not None:
                    pixels = batch.pixel_values.to(parameter.device, parameter.dtype)
                    features, _ = extract(self.backbone, pixels, self.config)
                    parts.append(features.float().cpu())
                on_batch(len(wanted))
        empty = torch.empty(0, self.config.feature_dim + self.config.extra_dim)
        return torch.cat([empty, *parts]), good, bad


class _Shards:
    """Features in files of `SHARD_ROWS` rows, each written whole under the hash of its content."""

    def __init__(self, folder: Path | None, on_bad_image: str) -> None:
        self.folder, self.on_bad_image = folder, on_bad_image
        self.parts: dict[int, dict[str, Any]] = {}

    def fill(self, rows: Any, runner: _Runner, progress: bool) -> int:
        """Computes this rank's share of what is not cached; returns how many pictures."""
        state = PartialState()
        starts = range(0, len(rows), SHARD_ROWS)
        mine = list(starts)[state.process_index :: state.num_processes]
        cached = {start: self._read(start) for start in mine}
        self.parts = {start: part for start, part in cached.items() if part is not None}
        missing = [start for start in mine if start not in self.parts]
        total = sum(min(SHARD_ROWS, len(rows) - start) for start in missing)
        computed = 0
        shown = progress and total > 0 and state.is_main_process
        with transformers_logging.tqdm(
            total=total, desc="Extracting features", unit="img", disable=not shown
        ) as bar:
            for start in missing:
                numbers = range(start, min(start + SHARD_ROWS, len(rows)))
                stops = self.on_bad_image == "fail"
                features, good, bad = runner.run(rows, numbers, bar.update, stops)
                if bad and stops:
                    raise ValueError(
                        f"Expected pictures that can be decoded, but row {bad[0].row} "
                        f"({bad[0].path or 'no path'}) cannot: {bad[0].reason}; repair or remove "
                        "it, or pass on_bad_image='skip'."
                    )
                part = {
                    "features": features,
                    "rows": torch.tensor(good, dtype=torch.int64),
                    "bad": list(map(list, bad)),
                }
                self._write(start, part)
                self.parts[start] = part
                computed += len(good)
        return computed

    def gather(self) -> list[dict[str, Any]]:
        """All ranks' shards that hold features, in row order."""
        parts = list(self.parts.items())
        if PartialState().num_processes > 1:
            parts = gather_object(parts)
        return [part for _, part in sorted(parts, key=lambda item: item[0])]

    def _read(self, start: int) -> dict[str, Any] | None:
        if self.folder is None:
            return None
        for path in self.folder.glob(f"shard-{start:09d}-*.safetensors"):
            sha256, _ = hash_blocks(path)
            if path.stem.rpartition("-")[2] == sha256[:16]:
                part: dict[str, Any] = load_file(path)
                part["bad"] = json.loads(part["bad"].numpy().tobytes() or b"[]")
                if part["bad"] and self.on_bad_image == "fail":
                    return None
                return part
            logger.warning("Computing %s again: the cached file is damaged.", path.name)
            path.unlink()
        return None

    def _write(self, start: int, part: dict[str, Any]) -> None:
        if self.folder is None:
            return
        text = torch.frombuffer(bytearray(json.dumps(part["bad"]).encode()), dtype=torch.uint8)
        temporary = self.folder / f".shard-{start:09d}.{os.getpid()}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(part | {"bad": text}, temporary)
            sha256, _ = hash_blocks(temporary)
            temporary.replace(self.folder / f"shard-{start:09d}-{sha256[:16]}.safetensors")
        except (OSError, SafetensorError) as error:
            logger.warning("Features are not cached, %s cannot be written: %s", self.folder, error)
            self.folder = None
        finally:
            if temporary.exists():
                temporary.unlink()


def cache_root() -> Path:
    """Where this project keeps what it can compute again: `$HF_KNN_CACHE` or `~/.cache/hf_knn`."""
    return Path(os.environ.get("HF_KNN_CACHE") or Path.home() / ".cache" / "hf_knn")


def _cache_folder(
    rows: Any,
    backbone: PreTrainedModel,
    config: KnnConfig,
    processor: Any,
    precision: str,
    cache_dir: str | Path | None,
) -> Path | None:
    fingerprint = fingerprint_of(rows)
    if fingerprint is None:
        return None
    key = {
        "data": fingerprint,
        "backbone": hash_tensors(sorted(backbone.state_dict().items())),
        "architecture": backbone.config.to_dict() | {"_name_or_path": ""},
        "poolings": [config.pooling, config.store_pooling],
        "processor": processor.to_dict(),
        "precision": precision,
        "shard_rows": SHARD_ROWS,
        "format": 1,
    }
    text = json.dumps(key, sort_keys=True, default=str)
    root = Path(cache_dir) if cache_dir is not None else cache_root() / "features"
    return root / hashlib.sha256(text.encode()).hexdigest()[:24]


def _pooling_config(model: PreTrainedModel, pooling: str | None) -> KnnConfig:
    if isinstance(model, KnnForImageClassification):
        if pooling is not None:
            raise ValueError("Expected no `pooling` for a k-NN model, which has its own.")
        return model.config
    pooling = pooling or default_pooling(model)
    return KnnConfig(pooling=pooling, feature_dim=measure_width(model, pooling))


def _check_options(batch_size: int, precision: str, on_bad_image: str) -> None:
    if batch_size < 1:
        raise ValueError(f"Expected `batch_size` to be >= 1, but got {batch_size}.")
    if precision != "fp32" and precision not in _AUTOCAST:
        raise ValueError(f"Expected `precision` to be fp32, bf16 or fp16, but got {precision!r}.")
    if on_bad_image not in ("fail", "skip"):
        raise ValueError(f"Expected `on_bad_image` to be fail or skip, but got {on_bad_image!r}.")
