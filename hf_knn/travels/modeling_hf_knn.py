# A k-NN image classifier: what a checkpoint needs where the package is not installed.
#
# Made from hf_knn/core of the package hf-knn; do not edit. Sources: sha256 4506683f2806682c84b377589900f4d86631717b522339409d2df81dc3867502.
# `hf-knn code FOLDER` says whether these files are those of the installed package.
# Licence: Apache-2.0.

import hashlib
import inspect
import json
import logging
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, Self

import numpy as np
import torch
import transformers
import transformers.initialization as init
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, ModelOutput
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, SAFE_WEIGHTS_INDEX_NAME, cached_file
from transformers.utils.hub import resolve_revision

from .configuration_hf_knn import (
    Head, Kernel, KnnConfig, Metric, Normalization, Pooling, Weighting, check_metric
)


# ---- votes.py: The method as pure functions on tensors, in log space.

PROBABILITY_FLOOR = 1e-12
"""Where `logits` and every NLL stop: a class of probability 0 has ``log(1e-12)``, never -inf."""

def squared_distances(similarities: Tensor, metric: str = Metric.COSINE) -> Tensor:
    """Turns similarities into squared distances, never negative."""
    if Metric(metric) is Metric.L2:
        return (-similarities).clamp_min(0)
    return (2 - 2 * similarities).clamp_min(0)

def neighbor_log_weights(
    similarities: Tensor,
    temperature: float,
    *,
    metric: str = Metric.COSINE,
    weighting: str = Weighting.SOFTMAX,
    reliability: Tensor | None = None,
) -> Tensor:
    """The log of each neighbour's share of the vote."""
    if similarities.ndim != 2:
        raise ValueError(
            f"Expected `similarities` to be [B, k], but got shape {tuple(similarities.shape)}."
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"Expected `temperature` to be a number > 0, but got {temperature}.")
    values = _widen(similarities)
    if values.isnan().any():
        rows = values.isnan().any(dim=1).nonzero().flatten().tolist()
        raise ValueError(f"Expected `similarities` without NaN, but rows {rows[:10]} have some.")
    distances = squared_distances(values, metric)  # [B, k]
    match Weighting(weighting):
        case Weighting.SOFTMAX:
            scores = -distances / temperature
        case Weighting.UNIFORM:
            scores = torch.zeros_like(distances)
        case Weighting.INVERSE_DISTANCE:
            # 2 - 2 s cannot tell an identical row from one a rounding error away
            rounding = 4 * torch.finfo(similarities.dtype).eps if metric == Metric.COSINE else 0
            is_zero = distances <= rounding
            at_zero = torch.where(is_zero, 0.0, -torch.inf)
            scores = torch.where(is_zero.any(1, keepdim=True), at_zero, -0.5 * distances.log())
        case Weighting.RANK:
            ranks = torch.arange(values.shape[1], dtype=values.dtype, device=values.device)
            scores = -(2 + ranks).log().expand_as(values)
    if reliability is not None:
        if reliability.shape != similarities.shape:
            raise ValueError(
                f"Expected `reliability` to have the shape of `similarities` "
                f"{tuple(similarities.shape)}, but got {tuple(reliability.shape)}."
            )
        if not ((reliability >= 0) & (reliability <= 1)).all():
            raise ValueError("Expected `reliability` to be in [0, 1], but got values outside.")
        scores = scores + reliability.to(scores.dtype).log()
    return _log_normalize(scores)

def knn_log_probs(
    similarities: Tensor,
    labels: Tensor,
    num_labels: int,
    temperature: float,
    *,
    metric: str = Metric.COSINE,
    weighting: str = Weighting.SOFTMAX,
    reliability: Tensor | None = None,
) -> Tensor:
    """Log-probability of each class by the votes of the neighbours (the paper's p_kNN)."""
    if labels.shape != similarities.shape:
        raise ValueError(
            f"Expected `labels` to have the shape of `similarities` {tuple(similarities.shape)}, "
            f"but got {tuple(labels.shape)}."
        )
    check_labels(labels, num_labels, "labels")
    weights = neighbor_log_weights(
        similarities, temperature, metric=metric, weighting=weighting, reliability=reliability
    )
    log_probs = _log_scatter_sum(weights, labels, num_labels)  # [B, C]
    return log_probs.to(_result_dtype(similarities))

def blend_log_probs(
    head_log_probs: Tensor,
    knn_log_probs: Tensor,
    knn_weight: float,
    num_tuned: int | None = None,
) -> Tensor:
    """Blends head and neighbours: ``p = λ p_knn + (1 - λ) p_head``, in log space."""
    if not 0 <= knn_weight <= 1:
        raise ValueError(f"Expected `knn_weight` to be in [0, 1], but got {knn_weight}.")
    if head_log_probs.ndim != 2 or knn_log_probs.ndim != 2:
        raise ValueError(
            "Expected `head_log_probs` and `knn_log_probs` to be [B, C_head] and [B, C], but got "
            f"{tuple(head_log_probs.shape)} and {tuple(knn_log_probs.shape)}."
        )
    rows, head_width = head_log_probs.shape
    if knn_log_probs.shape[0] != rows or knn_log_probs.shape[1] < head_width:
        raise ValueError(
            f"Expected `knn_log_probs` to be [{rows}, at least {head_width}], "
            f"but got {tuple(knn_log_probs.shape)}."
        )
    has_neighbors = (knn_log_probs > -torch.inf).any(dim=1, keepdim=True)  # [B, 1]
    tuned = head_width if num_tuned is None else min(num_tuned, head_width)
    known, taught = knn_log_probs[:, :tuned], knn_log_probs[:, tuned:]
    missing = knn_log_probs.shape[1] - head_width
    head = torch.nn.functional.pad(head_log_probs, (0, missing), value=-torch.inf)  # [B, C]
    head_share = _log(1 - knn_weight) + head
    if taught.shape[1]:
        head_share = head_share + torch.logsumexp(known, dim=1, keepdim=True)  # log(1 - q)
    votes = torch.cat([_log(knn_weight) + known, taught], dim=1)
    return torch.where(has_neighbors, torch.logaddexp(votes, head_share), head)

def floor_log_probs(log_probs: Tensor) -> Tensor:
    """Clamps log-probabilities at ``log(1e-12)``, as `logits` and every NLL are."""
    return log_probs.clamp_min(math.log(PROBABILITY_FLOOR))

def soften(log_probs: Tensor, temperature: float) -> Tensor:
    """Temperature scaling (Guo et al., 2017): ``log_softmax(log p / T)``."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"Expected `temperature` to be > 0, but got {temperature}.")
    if temperature == 1:
        return log_probs
    return torch.log_softmax(floor_log_probs(log_probs) / temperature, dim=-1)

def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf

def _widen(values: Tensor) -> Tensor:
    """float64 where the device has it: ``d / 1e-4`` in float32 is off by a part in a thousand."""
    return values.float() if values.device.type == "mps" else values.double()

def _result_dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32

def _log_normalize(scores: Tensor) -> Tensor:
    """Log-softmax over the last dimension; rows without any vote stay -inf instead of NaN."""
    total = torch.logsumexp(scores, dim=-1, keepdim=True) if scores.shape[-1] else 0.0
    normalized = scores - total
    return torch.where(normalized.isnan(), -torch.inf, normalized)

def _log_scatter_sum(log_weights: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """[B, k], [B, k] -> [B, C]: log of the sum of exp per class, the class maximum subtracted."""
    empty = log_weights.new_full((log_weights.shape[0], num_labels), -torch.inf)
    largest = empty.scatter_reduce(1, labels, log_weights, "amax")  # [B, C]
    offset = torch.where(largest == -torch.inf, 0.0, largest)
    scaled = (log_weights - offset.gather(1, labels)).exp()  # [B, k]
    return torch.zeros_like(empty).scatter_add(1, labels, scaled).log() + offset

def check_labels(labels: Tensor, num_labels: int, name: str) -> None:
    """Refuses what is no class number."""
    if labels.dtype != torch.int64:
        raise ValueError(f"Expected `{name}` to be int64, but got {labels.dtype}.")
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= num_labels):
        raise ValueError(
            f"Expected `{name}` to be in [0, {num_labels}), "
            f"but got values from {int(labels.min())} to {int(labels.max())}."
        )


# ---- learned.py: A learned metric: a linear map that rows and queries go through before they are compared.

Doubles = NDArray[np.float64]
LARGEST_WEIGHT = 1e6
_EXACT_BITS, _ROW_BITS = 53, 24

class LearnedMap:
    """A linear map A; `z = A (x - mean)`, and then the normalisation scales z to length 1."""

    def __init__(self, weight: Tensor) -> None:
        largest = float(weight.abs().max()) if weight.numel() else 0.0
        is_sound = weight.ndim == 2 and weight.dtype == torch.float32
        if not (is_sound and len(weight) <= weight.shape[1] and 0 < largest <= LARGEST_WEIGHT):
            raise ValueError(
                "Expected a learned map to be [E, D] float32, E <= D, with finite values, not all "
                f"0 and up to {LARGEST_WEIGHT:g}, but got {tuple(weight.shape)} {weight.dtype} up "
                f"to {largest:g}."
            )
        self.weight = weight.detach().cpu().clone(memory_format=torch.contiguous_format)
        values = self.weight.numpy().astype("<f4")
        self.sha256 = hashlib.sha256(repr(values.shape).encode() + values.tobytes()).hexdigest()
        bits = _EXACT_BITS - _ROW_BITS - (self.dim - 1).bit_length()
        self._shift = bits - int(np.frexp(largest)[1])
        self._table = np.rint(np.ldexp(values.T.astype(np.float64), self._shift))  # [D, E]

    def __repr__(self) -> str:
        return f"{self.dim} → {self.width}"

    def __deepcopy__(self, memo: dict[int, object]) -> "LearnedMap":
        return self  # it is never changed

    @property
    def dim(self) -> int:
        """D, the width of what goes in."""
        return self.weight.shape[1]

    @property
    def width(self) -> int:
        """E, the width of what comes out."""
        return len(self.weight)

    def apply(self, rows: Doubles) -> Doubles:
        """[N, D] centred rows to [N, E]; a zero vector stays zero."""
        _, exponents = np.frexp(np.abs(rows).max(axis=1, initial=0.0)[:, None])
        whole = np.rint(np.ldexp(rows, _ROW_BITS - exponents))
        mapped: Doubles = np.ldexp(whole @ self._table, exponents - _ROW_BITS - self._shift)
        return mapped

def width_of(learned: LearnedMap | None, dim: int) -> int:
    """How wide rows of width `dim` are when they are compared."""
    return dim if learned is None else learned.width


# ---- rows.py: Rows in one or more arrays, and the checks of what goes into them: features, labels, ids.

Values = Tensor | NDArray | Sequence[int]
_AT_ONCE = 8192  # rows that stay in the processor's cache

def as_features(values: Tensor | NDArray, name: str, dim: int | None = None) -> Tensor:
    """Brings features of any float dtype, device and layout to the CPU."""
    rows = values.detach().cpu() if isinstance(values, Tensor) else _as_tensor(values, name)
    if rows.ndim != 2 or rows.shape[1] == 0 or not rows.dtype.is_floating_point:
        raise ValueError(
            f"Expected `{name}` to be [N, D] of a float dtype with D >= 1, "
            f"but got shape {tuple(rows.shape)} {rows.dtype}."
        )
    if dim is not None and rows.shape[1] != dim:
        raise ValueError(
            f"Expected `{name}` to have width {dim} as the datastore has, but got {rows.shape[1]}."
        )
    rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    refuse_non_finite(rows, name)
    return rows.contiguous()

def _as_tensor(values: NDArray, name: str) -> Tensor:
    """An array of any float kind, byte order and layout."""
    array = np.asarray(values)
    if array.dtype.kind != "f":
        raise ValueError(
            f"Expected `{name}` to be [N, D] of a float dtype with D >= 1, "
            f"but got shape {array.shape} {array.dtype}."
        )
    kind = array.dtype if array.dtype.itemsize <= 8 else np.dtype(np.float64)
    # torch knows one byte order and no negative strides; numpy's own check skips rows of one
    is_turned = any(stride < 0 for stride in array.strides)
    native = array.astype(kind.newbyteorder("="), order="C", copy=is_turned)
    return torch.from_numpy(np.ascontiguousarray(native))

def refuse_non_finite(rows: Tensor, name: str) -> None:
    """Refuses NaN, infinities and what float32 cannot hold."""
    parts = rows.split(_AT_ONCE)
    bad = ~np.concatenate([np.isfinite(part.float().numpy()).all(axis=1) for part in parts])
    if bad.any():
        raise ValueError(
            f"Expected `{name}` to be finite numbers within float32's range, "
            f"but rows {shown(bad.nonzero()[0])} are not; drop or repair them."
        )

def as_whole_numbers(values: Values, name: str, lowest: int = 0) -> Tensor:
    """Brings labels or ids of any integer dtype to the CPU."""
    if isinstance(values, Tensor) and (values.is_floating_point() or values.is_complex()):
        raise ValueError(f"Expected `{name}` to be whole numbers, but got {values.dtype}.")
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.size == 0:
        return torch.empty(0, dtype=torch.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"Expected `{name}` to be a list of whole numbers, "
            f"but got shape {array.shape} {array.dtype}."
        )
    numbers = torch.from_numpy(array.astype(np.int64))  # a copy: the caller may change theirs
    if int(numbers.min()) < lowest:
        raise ValueError(f"Expected `{name}` to be >= {lowest}, but got {int(numbers.min())}.")
    return numbers

def check_row_numbers(labels: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Checks that there is one label and one id per row and no id twice."""
    labels, ids = as_whole_numbers(labels, "labels"), as_whole_numbers(ids, "ids")
    if not len(labels) == len(ids) == count:
        raise ValueError(
            f"Expected one label and one id per row ({count}), "
            f"but got {len(labels)} labels and {len(ids)} ids."
        )
    values, counts = ids.unique(return_counts=True)
    if len(values) != count:
        raise ValueError(f"Expected unique `ids`, but got some twice: {shown(values[counts > 1])}.")
    return labels, ids

def shown(numbers: Tensor | NDArray) -> str:
    """The first ten numbers of a list, for a message."""
    listed = ", ".join(str(number) for number in numbers[:10].tolist())
    return f"[{listed}{', …' if len(numbers) > 10 else ''}]"

class RowParts:
    """[N, D] features in one or more arrays, such as the mapped files of a large datastore."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        filled = [part.contiguous() for part in parts if len(part)]
        self.parts = filled or [parts[0]]
        self._ends = np.cumsum([len(part) for part in self.parts])
        self.shape = (int(self._ends[-1]), self.parts[0].shape[1])
        self.dtype = self.parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray:
        """Rows by slice (without a copy inside one part) or by positions, in their order."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step != 1:
                raise ValueError(f"Expected a slice of step 1, but got {step}.")
            return self._between(start, stop)
        if len(self.parts) == 1:
            return self.parts[0].numpy()[rows]
        taken = np.empty((len(rows), self.shape[1]), self.parts[0].numpy().dtype)
        owner = np.searchsorted(self._ends, rows, side="right")
        for number, part in enumerate(self.parts):
            mine = owner == number
            taken[mine] = part.numpy()[rows[mine] - (self._ends[number] - len(part))]
        return taken

    def joined(self) -> Tensor:
        """[N, D] all rows as one tensor; a copy if there are several parts."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)

    def _between(self, start: int, stop: int) -> NDArray:
        pieces, begin = [], 0
        for part, end in zip(self.parts, self._ends.tolist(), strict=True):
            if start < end and stop > begin:
                pieces.append(part.numpy()[max(0, start - begin) : stop - begin])
            begin = end
        if not pieces:
            return self.parts[0].numpy()[:0]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


# ---- plain_json.py: JSON that anybody may have written: of a size, of a depth, and saying each thing once.

MANIFEST_NAME = "datastore.json"
LARGEST_JSON = 64 * 2**20
SHA256_PATTERN = re.compile(r"[0-9a-f]{64}")
_DEEPEST = 50
_LARGEST_COUNT = 2**48

class DatastoreError(ValueError):
    """A datastore on disk that is damaged, incomplete or not what it says it is."""

def read_json(path: Path, most: int = LARGEST_JSON) -> Any:
    """What a JSON file holds that anybody may have written."""
    if path.stat().st_size > most:
        raise DatastoreError(f"Expected {path.name} to have at most {most} bytes; it is not ours.")
    return parse_json(path.read_bytes(), path.name)

def parse_json(text: bytes | str, name: str) -> Any:
    """What a JSON text holds that anybody may have written; see `read_json`."""
    try:
        values = json.loads(text, object_pairs_hook=_said_once)
        level: list[Any] = [[values]]
        for _ in range(_DEEPEST):
            parts = (part.values() if isinstance(part, dict) else part for part in level)
            level = [value for part in parts for value in part if isinstance(value, dict | list)]
        if level:
            raise ValueError(f"more than {_DEEPEST} levels")
    except (ValueError, RecursionError) as error:
        raise DatastoreError(
            f"Expected {name} to be JSON that is not nested deeply, but got: {error}; the file is "
            "damaged, download or save it again."
        ) from None
    return values

def _said_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name that is there twice")
    return values

class Fields:
    """Typed access to one JSON object, with the field's full name in each error."""

    def __init__(self, values: Any, prefix: str) -> None:
        if not isinstance(values, dict):
            raise DatastoreError(
                f"Expected {f'`{prefix[:-1]}` in ' if prefix else ''}{MANIFEST_NAME} to be an "
                f"object, but got {type(values).__name__}."
            )
        self.values, self.prefix = values, prefix

    def get(self, name: str) -> Any:
        """The value of a field."""
        if name not in self.values:
            raise DatastoreError(f"Expected {MANIFEST_NAME} to have `{self.prefix}{name}`.")
        return self.values[name]

    def wrong(self, name: str, wanted: str) -> DatastoreError:
        """The error for a field of another kind."""
        shown = repr(self.values.get(name))[:80]
        return DatastoreError(
            f"Expected `{self.prefix}{name}` in {MANIFEST_NAME} to be {wanted}, but got {shown}."
        )

    def count(self, name: str) -> int:
        """A whole number >= 0."""
        value: int = self._checked(
            name, f"a whole number in [0, {_LARGEST_COUNT}]",
            lambda value: type(value) is int and 0 <= value <= _LARGEST_COUNT,
        )  # fmt: skip
        return value

    def share(self, name: str) -> float:
        """A number in [0, 1]."""
        value: float = self._checked(
            name, "a number in [0, 1]", lambda value: type(value) is float and 0 <= value <= 1
        )
        return value

    def text(self, name: str) -> str:
        """A string."""
        value: str = self._checked(name, "a string", lambda value: isinstance(value, str))
        return value

    def matching(self, name: str, pattern: re.Pattern[str]) -> str:
        """A string that a pattern matches whole."""
        self.text(name)
        value: str = self._checked(name, f"a name like {pattern.pattern}", pattern.fullmatch)
        return value

    def sha256_or_none(self, name: str) -> str | None:
        """A sha256; None where the field is missing."""
        return self.matching(name, SHA256_PATTERN) if name in self.values else None

    def choice(self, name: str, choices: Iterable[str]) -> str:
        """One of some strings."""
        allowed = [str(choice) for choice in choices]
        value: str = self._checked(name, f"one of {allowed}", allowed.__contains__)
        return value

    def items(self, name: str) -> list[Any]:
        """A list."""
        value: list[Any] = self._checked(name, "a list", lambda value: isinstance(value, list))
        return value

    def texts(self, name: str) -> dict[str, str]:
        """An object of strings."""
        value: dict[str, str] = self._checked(
            name, "an object of strings",
            lambda value: isinstance(value, dict)
            and all(isinstance(text, str) for text in value.values()),
        )  # fmt: skip
        return value

    def _checked(self, name: str, wanted: str, is_right: Callable[[Any], object]) -> Any:
        value = self.get(name)
        if not is_right(value):
            raise self.wrong(name, wanted)
        return value


# ---- config.py: The configuration of a k-NN image classifier.

CLOSED_FORM = (Head.RIDGE, Head.KERNEL, Head.LDA)
"""Heads that are solved, and that follow the rows of a datastore exactly."""


# ---- backbone.py: Any vision model of transformers, or of timm through transformers, as a source of features.

# arguments of timm.create_model that only shape the network; others can name files, URLs or repos
_TIMM_SHAPE_ARGUMENTS = frozenset(
    {"act_layer", "class_token", "depth", "dim", "drop_path_rate", "drop_rate", "dynamic_img_size"}
    | {"embed_dim", "global_pool", "img_size", "in_chans", "init_values", "mlp_ratio"}
    | {"norm_layer", "num_heads", "output_stride", "patch_size", "pos_embed", "reg_tokens"}
    | {"window_size"}
)
_CHANNELS_LAST = ("dinat", "edgetam_vision_model", "sam2_hiera_det_model", "sam2_vision_model")
_ONE_FIRST = ("dinov3_convnext", "pvt")

def build_backbone(config: PreTrainedConfig, poolings: Iterable[str]) -> PreTrainedModel:
    """Builds the architecture with random weights, without network and without foreign code."""
    if config.model_type == "timm_wrapper":
        _check_timm(config)
    if type(config) not in MODEL_MAPPING:
        raise ValueError(
            f"Expected `backbone_config` of a vision model, but got {type(config).__name__}."
        )
    options = {}
    takes_pooler = "add_pooling_layer" in inspect.signature(model_class(config)).parameters
    if takes_pooler and Pooling.POOLER not in list(poolings):
        options["add_pooling_layer"] = False
    return AutoModel.from_config(config, trust_remote_code=False, **options)

def extract(
    backbone: PreTrainedModel, pixel_values: Tensor, config: KnnConfig, **outputs: Any
) -> tuple[Tensor, BaseModelOutput]:
    """Runs the backbone and pools."""
    # convolutions on CPUs are 1.5 times faster in this layout
    pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
    output = backbone(pixel_values=pixel_values, return_dict=True, **outputs)
    head_part = pool(backbone, output, pixel_values, config.pooling)
    if config.store_pooling == config.pooling:
        return head_part, output
    store_part = pool(backbone, output, pixel_values, config.store_pooling)
    return torch.cat([head_part, store_part], dim=1), output

def split_features(features: Tensor, config: KnnConfig) -> tuple[Tensor, Tensor]:
    """Splits features into what the head and what the datastore sees."""
    wanted = config.feature_dim + config.extra_dim
    if features.ndim != 2 or features.shape[1] != wanted:
        raise ValueError(
            f"Expected `features` to be [B, {wanted}], but got {tuple(features.shape)}."
        )
    if config.store_pooling == config.pooling:
        return features, features
    return features[:, : config.feature_dim], features[:, config.feature_dim :]

def pool(backbone: PreTrainedModel, output: Any, pixel_values: Tensor, pooling: str) -> Tensor:
    """Pools the last hidden state into one vector per image."""
    if pooling == Pooling.POOLER:
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            raise ValueError(
                "Expected a backbone with a pooler for pooling='pooler', but it has none; "
                "use 'cls' or 'mean'."
            )
        return pooled.flatten(1)  # [B, D] also from [B, D, 1, 1]
    hidden = output.last_hidden_state
    if hidden.ndim == 4:
        tokens, prefix = _spatial_tokens(backbone, hidden), 0  # [B, H*W, D]
    else:
        own = getattr(backbone.config, "num_detection_tokens", 0)  # YOLOS has them at the end
        tokens = hidden[:, : hidden.shape[1] - own]
        prefix = count_prefix_tokens(backbone, pixel_values, tokens.shape[1])
    if pooling in (Pooling.CLS, Pooling.CLS_MEAN) and prefix == 0:
        raise ValueError(
            f"Expected a backbone with a CLS token for pooling={pooling!r}, but "
            f"{type(backbone).__name__} has none; use 'mean'."
        )
    match Pooling(pooling):
        case Pooling.CLS:
            return tokens[:, 0]
        case Pooling.MEAN:
            return tokens[:, prefix:].mean(dim=1)
        case Pooling.MAX:
            return tokens[:, prefix:].amax(dim=1)
        case _:
            return torch.cat([tokens[:, 0], tokens[:, prefix:].mean(dim=1)], dim=1)

def hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """The hex sha256 over names, dtypes, shapes and bytes, in the order given."""
    total = hashlib.sha256()
    for name, tensor in named:
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()

def model_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that a configuration belongs to."""
    return MODEL_MAPPING[type(config)]

def _spatial_tokens(backbone: PreTrainedModel, hidden: Tensor) -> Tensor:
    """[B, D, H, W], or [B, H, W, D] as timm's Swin has it, to [B, H*W, D]."""
    width = getattr(getattr(backbone, "timm_model", None), "num_features", hidden.shape[1])
    is_last = backbone.config.model_type in _CHANNELS_LAST
    if is_last or (hidden.shape[1] != width and hidden.shape[-1] == width):
        return hidden.flatten(1, 2)
    return hidden.flatten(2).transpose(1, 2)

def count_prefix_tokens(backbone: PreTrainedModel, pixel_values: Tensor, tokens: int) -> int:
    """How many tokens (CLS, registers, distillation) come before the patches."""
    timm_count = getattr(getattr(backbone, "timm_model", None), "num_prefix_tokens", None)
    if timm_count is not None:
        return timm_count
    patch = getattr(backbone.config, "patch_size", None)
    if patch is None:
        return int(backbone.config.model_type in _ONE_FIRST)
    down, across = patch if isinstance(patch, (list, tuple)) else (patch, patch)
    patches = (pixel_values.shape[-2] // down) * (pixel_values.shape[-1] // across)
    return max(0, tokens - patches)  # hierarchical models end with fewer tokens than patches

def _check_timm(config: PreTrainedConfig) -> None:
    if ":" in config.architecture or "/" in config.architecture:
        raise ValueError(
            f"Expected `architecture` to be the plain name of a timm model, "
            f"but got {config.architecture!r}, which names a place to load from; refused."
        )
    foreign = sorted(set(config.model_args or {}) - _TIMM_SHAPE_ARGUMENTS)
    if foreign:
        raise ValueError(
            f"Expected `model_args` of a timm backbone to shape the network only, "
            f"but got {foreign}; refused."
        )

_SMALLEST_LENGTH = 1e-30

class KnnHead(nn.Module):
    """A classifier on standardised features: linear, with hidden layers, or in closed form."""

    def __init__(
        self,
        dim: int,
        num_labels: int,
        hidden_sizes: Sequence[int] = (),
        unit_length: bool = False,
        kernel: str = Kernel.RBF,
        expansion: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))
        self.unit_length, self.kernel = unit_length, Kernel(kernel)
        (components, self.random), axes, directions = expansion, None, None
        if self.random:
            rows = self.random if self.kernel is Kernel.RELU else self.random // 2
            axes, directions = torch.zeros(components, dim), torch.zeros(rows, components)
        self.register_buffer("axes", axes)  # [P, D]
        self.register_buffer("directions", directions)  # [R, P], of `rbf` [R / 2, P]
        widths = [dim + self.random, *hidden_sizes]
        pairs = zip(widths, hidden_sizes, strict=False)
        self.hidden = nn.ModuleList(nn.Linear(width, out) for width, out in pairs)
        self.classifier = nn.Linear(widths[-1], num_labels)

    mean: Tensor
    scale: Tensor
    axes: Tensor | None
    directions: Tensor | None

    @classmethod
    def from_config(cls, config: KnnConfig) -> "KnnHead":
        """The head that a configuration asks for, with new weights."""
        is_closed = config.head in CLOSED_FORM
        return cls(
            config.feature_dim,
            config.head_classes,
            config.head_hidden_sizes if config.head == Head.MLP else (),
            unit_length=is_closed and config.normalization != Normalization.NONE,
            kernel=config.head_kernel,
            expansion=(config.head_components, config.head_features),
        )

    def standardize(self, features: Tensor) -> None:
        """Fixes what is subtracted and divided, so that learning rates mean the same everywhere."""
        mean = features.double().mean(dim=0)
        deviation = (features.double() - mean).pow(2).mean().sqrt()
        self.mean.copy_(mean)
        self.scale.copy_(deviation if deviation > 0 else torch.ones(()))

    def prepared(self, features: Tensor) -> Tensor:
        """[B, D] features as the first layer sees them: [B, R + D]."""
        rows = (features - self.mean.to(features.dtype)) / self.scale.to(features.dtype)
        if self.unit_length:
            rows = functional.normalize(rows, dim=-1, eps=_SMALLEST_LENGTH)
        if self.axes is None or self.directions is None:
            return rows
        components = rows @ self.axes.to(rows.dtype).T  # [B, P]
        components = functional.normalize(components, dim=-1, eps=_SMALLEST_LENGTH)
        angles = components @ self.directions.to(rows.dtype).T
        random = (
            angles.relu() * self.random**-0.5
            if self.kernel is Kernel.RELU
            else torch.cat([angles.cos(), angles.sin()], dim=-1) * (self.random / 2) ** -0.5
        )
        return torch.cat([random, rows], dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C_head] logits."""
        rows = self.prepared(features)
        for layer in self.hidden:
            rows = functional.relu(layer(rows))
        return self.classifier(rows)

    def soften(self, temperature: float) -> None:
        """Divides the logits by a temperature, for good."""
        with torch.no_grad():
            self.classifier.weight.div_(temperature)
            self.classifier.bias.div_(temperature)

    def reset(self) -> None:
        """New buffers; called by the model when it initialises weights."""
        init.zeros_(self.mean)
        init.ones_(self.scale)
        for part in (self.axes, self.directions):
            if part is not None:
                init.zeros_(part)


# ---- manifest.py: The manifest of a datastore: what a checkpoint promises about its files, and the check.

HASH_BLOCK = 64 * 2**20
"""Bytes per separately hashed block of a blob."""

Read = Callable[[int, int], bytes | memoryview]
_READ_BYTES = 2**20
_SEEKING = threading.Lock()

def hash_blocks(path: Path) -> tuple[str, list[str]]:
    """The hex sha256 of a file, and of each block of `HASH_BLOCK` bytes; it is read once."""
    whole, blocks = hashlib.sha256(), []
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            whole.update(block)
            blocks.append(hashlib.sha256(block).hexdigest())
    return whole.hexdigest(), blocks

def read_at(file: BinaryIO, position: int, count: int) -> bytes:
    """Reads an open file at a place, whatever other threads and forked processes read of it."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), count, position)
    with _SEEKING:  # Windows, where nothing forks
        file.seek(position)
        return file.read(count)

def hash_read_blocks(read: Read, count: int) -> list[str]:
    """Hashes the blocks of a file, as many at once as there are processors."""

    def hash_block(number: int) -> str:
        found, position = hashlib.sha256(), number * HASH_BLOCK
        end = position + HASH_BLOCK if number + 1 < count else sys.maxsize
        while piece := read(position, min(_READ_BYTES, end - position)):
            found.update(piece)
            position += len(piece)
        return found.hexdigest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(hash_block, range(count)))

FORMAT = "hf_knn.datastore"
FORMAT_VERSION, MAPPED_VERSION = 1, 2  # the second, of a datastore with a learned map
REFERENCE_FORMAT = "hf_knn.datastore-reference"
"""Of a `datastore.json` that says in which vector database the rows lie."""

STORAGE_DTYPES = ("float16", "float32")
MEASURED_ON = ("rows", "perturbed rows", "queries unlike the rows")
FAISS_NAME = "datastore.faiss"
BLOB_PATTERN = re.compile(r"datastore-[0-9a-f]{12}\.safetensors")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")

class StaleDatastoreError(DatastoreError):
    """A datastore whose features were made by other weights, processor settings or pooling."""

@dataclass(frozen=True)
class FileRecord:
    """What the manifest promises about one file: size in bytes, sha256 whole and per block."""

    name: str
    size: int
    sha256: str
    blocks: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """Measures a file."""
        sha256, blocks = hash_blocks(path)
        return cls(path.name, path.stat().st_size, sha256, blocks)

    def verify_size(self, path: Path | None) -> Path:
        """Compares a file's size with its record, without reading it; returns its path."""
        if path is None or not path.is_file():
            raise DatastoreError(
                f"Expected the file {self.name}, which {MANIFEST_NAME} names, but it is missing; "
                "download or save the checkpoint again."
            )
        size = path.stat().st_size
        if size != self.size:
            raise DatastoreError(
                f"Expected {self.name} to have {self.size} bytes, but got {size}; "
                "the file is truncated or from another save, download or save it again."
            )
        return path

    def verify(self, path: Path | None) -> None:
        """Compares a file with its record, byte for byte."""
        with self.verify_size(path).open("rb") as file:
            self.compare(partial(read_at, file))

    def read(self, path: Path | None) -> bytes:
        """Reads a file whole; what is returned is what was compared with the record."""
        data = self.verify_size(path).read_bytes()
        self.compare(lambda start, count: memoryview(data)[start : start + count])
        return data

    def compare(self, read: Read, only: int | None = None) -> None:
        """Compares the bytes of a file, or of one block, with the record; several blocks at once."""
        numbers = range(len(self.blocks)) if only is None else [only]
        found = hash_read_blocks(read, len(numbers))
        for number, theirs in zip(numbers, found, strict=True):
            if (mine := self.blocks[number]) != theirs:
                raise DatastoreError(
                    f"Expected {self.name} to have sha256 {mine[:12]}… in block {number} of "
                    f"{len(self.blocks)}, but got {theirs[:12]}…; the file is damaged or from "
                    "another save, download or save it again."
                )

@dataclass(frozen=True)
class IndexInfo:
    """Which index a datastore has."""

    requested: str
    spec: str
    parameters: dict[str, int] = field(default_factory=dict)
    recall: float | None = None
    measured_on: str | None = None
    recalls: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        facts = [f"{name} {value}" for name, value in self.parameters.items()]
        known = self.recalls or {self.measured_on or "rows": self.recall or 0.0}
        facts += [] if self.recall is None else [f"recall@20 {say_recalls(known)}"]
        return f"{self.spec} ({', '.join(facts)})" if facts else self.spec

def say_recalls(recalls: dict[str, float]) -> str:
    """Recalls in words, by what they were measured on."""
    return ", ".join(f"{recall:.4f} on {kind}" for kind, recall in recalls.items())

@dataclass(frozen=True)
class Binding:
    """The checkpoint a datastore belongs to."""

    fingerprint: str
    weights: str
    processor: str
    pooling: str
    dtype: str
    files: list[FileRecord]

@dataclass(frozen=True)
class Manifest:
    """The content of `datastore.json`."""

    num_rows: int
    dim: int
    dtype: str
    metric: str
    normalization: str
    index: IndexInfo
    blobs: list[FileRecord]
    faiss_index: FileRecord | None = None
    binding: Binding | None = None
    source: dict[str, str] = field(default_factory=dict)
    learned_map: str | None = None

    def to_json(self) -> str:
        """The text of `datastore.json`."""
        values = {"format": FORMAT, "format_version": FORMAT_VERSION, "block_size": HASH_BLOCK}
        found = asdict(self)
        for name in ("measured_on", "recalls"):
            if not found["index"][name]:
                del found["index"][name]  # as every version wrote it
        return signed_json(values | found)

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Reads and checks `datastore.json`."""
        return cls.parse(read_json(path))

    @classmethod
    def parse(cls, values: Any) -> "Manifest":
        """Checks the decoded JSON field by field; nothing is trusted because of where it came from."""
        fields = Fields(values, "")
        if fields.text("format") == REFERENCE_FORMAT:
            raise DatastoreError(
                f"Expected {MANIFEST_NAME} to name files with rows, but it refers to a vector "
                "database, which only the package can ask: `pip install 'hf-knn[milvus]'`, `import "
                "hf_knn` and open the checkpoint as a model, or pass load_datastore=False for the "
                "plain classifier."
            )
        check_format(fields, FORMAT)
        if fields.count("block_size") != HASH_BLOCK:
            raise fields.wrong("block_size", str(HASH_BLOCK))
        metric = fields.choice("metric", list(Metric))
        normalization = fields.choice("normalization", list(Normalization))
        try:
            check_metric(metric, normalization)
        except ValueError as error:
            raise DatastoreError(f"{MANIFEST_NAME}: {error}") from None
        faiss_index, binding = fields.get("faiss_index"), fields.get("binding")
        if faiss_index is not None:
            faiss_index = _parse_file(faiss_index, "faiss_index", re.compile(re.escape(FAISS_NAME)))
        manifest = cls(
            num_rows=fields.count("num_rows"),
            dim=fields.count("dim"),
            dtype=fields.choice("dtype", STORAGE_DTYPES),
            metric=metric,
            normalization=normalization,
            index=parse_index(fields.get("index")),
            blobs=_parse_files(fields, "blobs", BLOB_PATTERN),
            faiss_index=faiss_index,
            binding=None if binding is None else parse_binding(binding),
            source=fields.texts("source"),
            learned_map=fields.sha256_or_none("learned_map"),
        )
        stored = manifest.num_rows * manifest.dim * (2 if manifest.dtype == "float16" else 4)
        available = sum(blob.size for blob in manifest.blobs)
        if not manifest.blobs or stored > available:
            raise DatastoreError(
                f"Expected the blobs of {MANIFEST_NAME} to hold {manifest.num_rows} x "
                f"{manifest.dim} {manifest.dtype} values ({stored} bytes), but they have "
                f"{available} bytes."
            )
        return manifest

def signed_json(values: dict[str, Any]) -> str:
    """The text of a `datastore.json` with its own checksum."""
    values = {k: v for k, v in values.items() if k != "learned_map" or v is not None}
    if "learned_map" in values:  # without one all is as every version wrote it
        values["format_version"] = MAPPED_VERSION
    return json.dumps(values | {"checksum": _checksum(values)}, indent=2) + "\n"

def check_format(fields: Fields, wanted: str) -> None:
    """Checks what a `datastore.json` says about itself: format, version and its own checksum."""
    if fields.text("format") != wanted:
        raise fields.wrong("format", wanted)
    version, has_map = fields.count("format_version"), "learned_map" in fields.values
    if version != (wanted_version := MAPPED_VERSION if has_map else FORMAT_VERSION):
        raise DatastoreError(
            f"Expected {MANIFEST_NAME} of format version {wanted_version}, but got version "
            f"{version}; upgrade hf_knn."
        )
    checksum = fields.matching("checksum", SHA256_PATTERN)
    if checksum != _checksum({k: v for k, v in fields.values.items() if k != "checksum"}):
        raise DatastoreError(
            f"Expected {MANIFEST_NAME} to match its own checksum {checksum[:12]}…, but it does "
            "not; the file is damaged, download or save it again."
        )

def _checksum(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

def _parse_file(values: Any, prefix: str, pattern: re.Pattern[str]) -> FileRecord:
    fields = Fields(values, f"{prefix}.")
    size = fields.count("size")
    blocks = fields.items("blocks")
    if len(blocks) != -(-size // HASH_BLOCK):
        raise fields.wrong("blocks", f"one hash per {HASH_BLOCK} bytes of {size}")
    if not all(isinstance(block, str) and SHA256_PATTERN.fullmatch(block) for block in blocks):
        raise fields.wrong("blocks", "a list of sha256 sums")
    sha256 = fields.matching("sha256", SHA256_PATTERN)
    if len(blocks) == 1 and blocks != [sha256]:
        raise fields.wrong("blocks", "the hash of the file, which is one block")
    return FileRecord(fields.matching("name", pattern), size, sha256, blocks)

def _parse_files(fields: Fields, name: str, pattern: re.Pattern[str]) -> list[FileRecord]:
    places = [f"{fields.prefix}{name}[{i}]" for i in range(len(fields.items(name)))]
    pairs = zip(fields.items(name), places, strict=True)
    return [_parse_file(values, place, pattern) for values, place in pairs]

def parse_index(values: Any) -> IndexInfo:
    """Checks the part of a JSON file that says which index there is; raises DatastoreError."""
    fields = Fields(values, "index.")
    recall = None if fields.get("recall") is None else fields.share("recall")
    measured_on = fields.values.get("measured_on")
    if measured_on not in (None, *MEASURED_ON):  # version 0.1 measured on rows alone, and said None
        raise fields.wrong("measured_on", f"one of {MEASURED_ON} or null")
    named = Fields(fields.get("parameters"), "index.parameters.")
    by_kind = Fields(fields.values.get("recalls", {}), "index.recalls.")
    if not by_kind.values.keys() <= set(MEASURED_ON):
        raise fields.wrong("recalls", f"numbers by {MEASURED_ON}")
    return IndexInfo(
        fields.text("requested"), fields.text("spec"),
        {name: named.count(name) for name in named.values}, recall, measured_on,
        {name: by_kind.share(name) for name in by_kind.values},
    )  # fmt: skip

def parse_binding(values: Any) -> Binding:
    """Checks the part of a `datastore.json` that ties it to a checkpoint."""
    fields = Fields(values, "binding.")
    return Binding(
        fingerprint=fields.matching("fingerprint", SHA256_PATTERN),
        weights=fields.matching("weights", SHA256_PATTERN),
        processor=fields.text("processor"),
        pooling=fields.choice("pooling", list(Pooling)),
        dtype=fields.text("dtype"),
        files=_parse_files(fields, "files", _PLAIN_NAME),
    )


# ---- search.py: Nearest neighbours: a fast first pass proposes candidates, float64 rescoring decides.

Ints = NDArray[np.int64]
Singles = NDArray[np.float32]
Floats = NDArray[np.float64]
Rows = NDArray | RowParts
ROW_BLOCK = 65_536
"""So many rows are multiplied, or normalised, at once."""

_FLOAT32_ROUNDING = 2.0**-24
_SHORTCUTS = {"tf32": 2.0**-9, "high": 2.0**-9, "bf16": 2.0**-6, "medium": 2.0**-6}
_PAIRS_AT_ONCE = 2**22
_COMPARE_BYTES = 2**20  # rows that stay in the cache while they are compared
_CANDIDATES_PER_ROW = 6  # what it costs to gather one, in rows that are compared in their order
_PAIRS_FOR_THREADS = 4096  # fewer pairs are compared before a thread has started
_PAIRS_OF_FEW = 128  # so many are compared at once, before it is known which are needed
_ONE_THREAD = 32_768  # values that torch converts without threads
_SMALLEST_SQUARE = 2.0**-800  # of a length; smaller and larger ones are scaled first
_EXTENDED = 1.2  # a little more than sqrt(5) / 2, which rounding must not exceed

class Neighbors(NamedTuple):
    """The nearest rows of a batch of queries, by (similarity, id).

    Attributes:
        similarities: [B, k'] float32, higher is closer: inner products of unit vectors (`cosine`)
            or negative squared distances (`l2`).
        labels: [B, k'] int64.
        ids: [B, k'] int64.
    """

    similarities: Tensor
    labels: Tensor
    ids: Tensor

    def rounded(self, like: Tensor | NDArray) -> "Neighbors":
        """The answer to a caller: similarities in float32, on the device of the queries."""
        largest = torch.finfo(torch.float32).max
        device = like.device if isinstance(like, Tensor) else torch.device("cpu")
        return Neighbors(
            self.similarities.clamp(-largest, largest).float().to(device),
            self.labels.to(device),
            self.ids.to(device),
        )

class Request(NamedTuple):
    """A search whose arguments were checked."""

    queries: NDArray
    k: int
    excluded: Ints | None

    def width(self, rows: int) -> int:
        """How many neighbours there are among so many rows."""
        return max(0, min(self.k, rows - (self.excluded is not None)))

def check_request(
    queries: Tensor | NDArray, k: int, exclude_ids: Values | None, dim: int
) -> Request:
    """Checks the arguments of a search, the same for every kind of datastore."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"Expected `k` to be a whole number >= 1, but got {k!r}.")
    wanted = as_features(queries, "queries", dim).numpy()
    excluded: Ints | None = None
    if exclude_ids is not None:
        excluded = as_whole_numbers(exclude_ids, "exclude_ids", lowest=-1).numpy()
        if len(excluded) != len(wanted):
            raise ValueError(
                f"Expected `exclude_ids` to have one id per query ({len(wanted)}), "
                f"but got {len(excluded)}."
            )
    return Request(wanted, int(k), excluded)

class FirstPass(Protocol):
    """A search by inner product over rows that all have length at most 1."""

    extra: int

    def candidates(self, queries: Singles, count: int) -> tuple[Ints, Floats]:
        """The best rows per query."""
        ...

class TorchFirstPass:
    """Blocked matmul and top-k in plain torch; needs no faiss."""

    extra = 12

    def __init__(self, rows: Singles) -> None:
        self.blocks = list(torch.from_numpy(rows).split(ROW_BLOCK))
        self.rounding = float32_rounding(rows.shape[1])

    def candidates(self, queries: Singles, count: int) -> tuple[Ints, Floats]:
        """See `FirstPass.candidates`."""
        scores, positions = best_of_blocks(self.blocks, torch.from_numpy(queries), count)
        return positions.numpy(), scores.double().numpy() + self.rounding + shortcut()

def best_of_blocks(blocks: Sequence[Tensor], queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The rows with the largest inner products."""
    scores, positions, start = [], [], 0
    for block in blocks:  # nothing waits for a device before all of them are at work
        with torch.autocast(block.device.type, enabled=False):
            products = queries.to(block.device) @ block.T  # [B, n]
        best = products.topk(min(count, len(block)), dim=1)
        scores.append(best.values)
        positions.append(best.indices + start)
        start += len(block)
    merged = torch.cat([values.cpu() for values in scores], dim=1).topk(count, dim=1)
    found = torch.cat([rows.cpu() for rows in positions], dim=1).gather(1, merged.indices)
    return merged.values, found

def float32_rounding(width: int) -> float:
    """How far an inner product of float32 vectors of length 1 may be off, whatever the order."""
    return 4 * (width + 4) * _FLOAT32_ROUNDING

def shortcut() -> float:
    """How much further off torch's settings let it be, on a GPU or a CPU."""
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):
        return _SHORTCUTS.get(torch.get_float32_matmul_precision(), 0.0)
    found = (backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision)
    return max(_SHORTCUTS.get(precision, 0.0) for precision in found)

def normalize_rows(
    features: NDArray, mean: Floats, normalization: str, learned: LearnedMap | None = None
) -> Floats:
    """Applies the datastore's normalisation in float64: centre, map if there is one, length 1."""
    rows = _widened(features)
    if normalization == Normalization.L2_CENTERED:
        rows -= mean
    if learned is not None:
        rows = learned.apply(rows)
    if normalization == Normalization.NONE:
        return rows
    squares = np.einsum("nd,nd->n", rows, rows)
    least, most = squares.min(initial=1.0), squares.max(initial=1.0)
    if not _SMALLEST_SQUARE < least <= most < 1 / _SMALLEST_SQUARE:
        _, exponents = np.frexp(np.abs(rows).max(axis=1, initial=0.0))
        rows = np.ldexp(rows, -exponents[:, None])  # exact; keeps the squares in range
        squares = np.einsum("nd,nd->n", rows, rows)
        squares[squares == 0] = 1.0
    rows /= np.sqrt(squares)[:, None]
    return rows

class RowSpace:
    """How stored rows and queries look to a first pass, and how a pair is really compared."""

    def __init__(
        self,
        mean: Floats,
        metric: str,
        normalization: str,
        learned: LearnedMap | None,
        features: Rows,
        largest: float | None = None,
    ) -> None:
        self.mean, self.normalization, self.learned = mean, normalization, learned
        self.width = width_of(learned, features.shape[1])
        self.is_l2 = Metric(metric) is Metric.L2
        self.largest = 1.0
        if self.is_l2:
            self.largest = largest or self.largest_length(features) or 1.0
        # a row of length 1 is sqrt(1 + 1/4) long once it is extended
        self.scale = self.largest * _EXTENDED if self.is_l2 else 1.0

    def normalize(self, features: NDArray) -> Floats:
        """[N, D] raw features to the float64 vectors that are compared, [N, E] behind a map."""
        return normalize_rows(features, self.mean, self.normalization, self.learned)

    def first_pass_rows(self, features: Rows) -> Singles:
        """[N, D] raw features to [N, D'] float32 rows of length at most 1."""
        count, dim = len(features), self.width
        rows = np.empty((count, dim + self.is_l2), np.float32)
        for start in range(0, count, ROW_BLOCK):
            part = slice(start, start + ROW_BLOCK)
            block = self.normalize(features[part]) / self.scale
            rows[part, :dim] = block
            if self.is_l2:
                rows[part, dim] = -0.5 * np.einsum("nd,nd->n", block, block)
        return rows

    def first_pass_queries(self, queries: Floats) -> tuple[Singles, Floats]:
        """[B, D] normalised queries to [B, D'] of length 1, and the length each had."""
        if not self.is_l2:
            return queries.astype(np.float32), np.ones(len(queries))
        extended = np.concatenate([queries / self.scale, np.ones((len(queries), 1))], axis=1)
        length = np.sqrt(np.einsum("nd,nd->n", extended, extended))
        return (extended / length[:, None]).astype(np.float32), length

    def as_score(self, similarities: Floats, queries: Floats, length: Floats) -> Floats:
        """What an exact first pass would have scored, less float64's own rounding error."""
        if not self.is_l2:
            return similarities
        squares = np.einsum("nd,nd->n", queries, queries)
        scores = (similarities + squares) / (2 * self.scale**2 * length)
        return scores - 1e-14 * squares / (self.scale**2 * length)

    def compare(self, rows: Floats, queries: Floats) -> Floats:
        """[K, D] normalised rows with one query [D], or [K, D] each with its own: [K]."""
        # [1, D] by [D, 1] for each row is one dot product of BLAS, by itself, also in numpy 1
        if self.is_l2:
            rows = rows - queries
            return -np.matmul(rows[:, None, :], rows[:, :, None])[:, 0, 0]
        return np.matmul(rows[:, None, :], queries[..., None])[:, 0, 0]

    def largest_length(self, features: Rows) -> float:
        """Of the rows, once they are normalised."""
        largest = 0.0
        for start in range(0, len(features), ROW_BLOCK):
            rows = self.normalize(features[start : start + ROW_BLOCK])
            largest = max(largest, float(np.einsum("nd,nd->n", rows, rows).max()))
        return largest**0.5

class Searcher:
    """Nearest neighbours of queries among rows."""

    is_exact = True

    def __init__(self, features: Rows, ids: Ints, space: RowSpace, first_pass: FirstPass) -> None:
        self.features, self.ids, self.space, self.first_pass = features, ids, space, first_pass

    def propose(self, queries: Floats, count: int) -> tuple[Ints, Floats, Floats]:
        """Candidates for normalised queries."""
        scaled, length = self.space.first_pass_queries(queries)
        return *self.first_pass.candidates(scaled, count), length

    def search(self, queries: NDArray, k: int, exclude_ids: Ints | None) -> tuple[Floats, Ints]:
        """Finds the k nearest rows."""
        normalized = self.space.normalize(queries)  # [B, D]
        similarities = np.empty((len(queries), k))
        positions = np.empty((len(queries), k), np.int64)
        pending = np.arange(len(queries))
        count = k + (exclude_ids is not None) + self.first_pass.extra
        while len(pending):
            certain = []
            every_row = self.compares_every_row(count)
            width = len(self.ids) if every_row else count
            step = max(1, _PAIRS_AT_ONCE // width)
            for start in range(0, len(pending), step):
                chunk = pending[start : start + step]
                excluded = None if exclude_ids is None else exclude_ids[chunk]
                found = self._search_chunk(normalized[chunk], k, excluded, width, every_row)
                similarities[chunk], positions[chunk], is_certain = found
                certain.append(is_certain)
            pending = pending[~np.concatenate(certain)]
            count *= 4
        return similarities, positions

    def compares_every_row(self, count: int) -> bool:
        """Whether that takes less time than to gather so many candidates of each query."""
        return _CANDIDATES_PER_ROW * count >= len(self.ids)

    def _search_chunk(
        self, queries: Floats, k: int, excluded: Ints | None, width: int, every_row: bool
    ) -> tuple[Floats, Ints, NDArray[np.bool_]]:
        nothing = np.full((len(queries), width), -np.inf)
        if every_row:
            candidates = np.broadcast_to(np.arange(width), nothing.shape)
            reach, length = nothing, np.ones(len(queries))
        else:
            candidates, reach, length = self.propose(queries, width)
        allowed = candidates >= 0
        if excluded is not None:
            allowed &= self.ids[candidates] != excluded[:, None]
        if every_row:
            similarities = np.where(allowed, self._compare_all(queries), -np.inf)
        else:
            similarities, count = nothing, np.cumsum(allowed, axis=1)
            is_few = self.is_exact and allowed.size <= _PAIRS_OF_FEW
            first = allowed & (count <= (width if is_few else k))
            self._rescore(queries, candidates, first, similarities)
            # whatever cannot reach the least of these needs no rescoring
            lowest = similarities.min(axis=1, where=first, initial=np.inf)
            lowest = self.space.as_score(lowest, queries, length)
            more = allowed & ~first & (reach >= lowest[:, None])
            self._rescore(queries, candidates, more, similarities)
            width = max(k, 1 + int(np.flatnonzero((first | more).any(axis=0)).max(initial=0)))
        candidates, similarities = candidates[:, :width], similarities[:, :width]
        own = np.arange(len(queries))[:, None]
        order = nearest_first(similarities, self.ids[candidates], k)
        best = similarities[own, order]
        # what the first pass left out must score less than the k-th place
        limit = reach[:, -1] if self.is_exact else -np.inf
        certain = self.space.as_score(best[:, -1], queries, length) > limit
        return best, candidates[own, order], certain

    def _rescore(
        self, queries: Floats, candidates: Ints, chosen: NDArray[np.bool_], similarities: Floats
    ) -> None:
        """Fills in the similarity of each chosen pair, one by one in float64."""
        numbers, places = chosen.nonzero()
        rows = candidates[numbers, places]
        order = np.argsort(rows)
        step = max(1, _COMPARE_BYTES // (8 * self.features.shape[1]))

        def fill(block: int) -> None:
            part = order[block * step : (block + 1) * step]
            wanted = rows[part]
            is_new = np.diff(wanted, prepend=-1) != 0
            normalized = self.space.normalize(self.features[wanted[is_new]])
            if len(normalized) < len(part):
                normalized = normalized[np.cumsum(is_new) - 1]
            asked = queries[numbers[part]] if len(queries) > 1 else queries[0]
            similarities[numbers[part], places[part]] = self.space.compare(normalized, asked)

        _in_threads(fill, -(-len(order) // step), len(order))

    def _compare_all(self, queries: Floats) -> Floats:
        """[B, N] similarity of each query with each row."""
        similarities = np.empty((len(queries), len(self.ids)))
        step = max(1, _COMPARE_BYTES // (8 * self.features.shape[1]))
        for start in range(0, len(self.ids), step):
            part = slice(start, start + step)
            rows = self.space.normalize(self.features[part])

            def fill(i: int, rows: Floats = rows, part: slice = part) -> None:
                similarities[i, part] = self.space.compare(rows, queries[i])

            _in_threads(fill, len(queries), len(queries) * len(rows))
        return similarities

def nearest_first(similarities: Floats, ids: Ints, k: int) -> Ints:
    """Where the k nearest of each row of [B, K] similarities lie: [B, k], by (similarity, id)."""
    return np.lexsort((ids, -similarities), axis=-1)[:, :k]

def _widened(features: NDArray) -> Floats:
    """A float64 copy; of float16 by torch, whose conversion is several times as fast."""
    if features.dtype != np.float16:
        return features.astype(np.float64)
    widened = np.empty(features.shape)
    step = max(1, _ONE_THREAD // features.shape[1])
    for start in range(0, len(features), step):  # its threads would be in the way of ours
        part = slice(start, start + step)
        torch.from_numpy(widened[part]).copy_(torch.from_numpy(features[part]))
    return widened

def _in_threads(task: Callable[[int], None], count: int, pairs: int) -> None:
    """Runs a task for each of `count` numbers; numpy lets go of the interpreter meanwhile."""
    threads = max(1, min(torch.get_num_threads(), count)) if pairs > _PAIRS_FOR_THREADS else 1

    def run(first: int) -> None:
        for number in range(first, count, threads):
            task(number)

    if threads < 2:
        run(0)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(run, first) for first in range(threads)]:
            done.result()


# ---- frozen.py: The rows of a checkpoint: read, hashed, searched exactly, copied; never changed.

Resolve = Callable[[str], Path | None]
"""Finds a file by name; None if it is missing."""

class FrozenDatastore:
    """Rows of (features, label, id) as a checkpoint holds them."""

    def __init__(self, manifest: Manifest, resolve: Resolve) -> None:
        self.manifest = manifest
        self.metric, self.normalization = manifest.metric, manifest.normalization
        self.places = [record.verify_size(resolve(record.name)) for record in manifest.blobs]
        files = [parse_blob(*pair) for pair in zip(manifest.blobs, self.places, strict=True)]
        self.features = join_features(files, manifest)
        self.labels = join_vectors(files, "labels", manifest, torch.int64)
        self.ids = join_vectors(files, "ids", manifest, torch.int64)
        self.mean = take_vector(files[0], "mean", torch.float32, manifest.blobs[0])
        self.learned_map = take_map(files[0], manifest)
        self.paths = decode_paths(files, manifest)
        check_content(self.features, self.labels, self.ids, self.mean)
        compared = (self.mean.double().numpy(), self.metric, self.normalization, self.learned_map)
        space = RowSpace(*compared, self.features)
        first_pass = TorchFirstPass(space.first_pass_rows(self.features))
        self._searcher = Searcher(self.features, self.ids.numpy(), space, first_pass)

    def __len__(self) -> int:
        return len(self.features)

    def __repr__(self) -> str:
        return f"FrozenDatastore({len(self)} x {self.dim}, metric={self.metric!r})"

    def __deepcopy__(self, memo: dict[int, object]) -> "FrozenDatastore":
        return self  # nothing of it ever changes

    @property
    def dim(self) -> int:
        """Width of a row (D)."""
        return self.features.shape[1]

    def path_of(self, row_id: int) -> str:
        """Where the picture of a row lies, relative to its dataset; empty if not known."""
        rows = (self.ids == row_id).nonzero().flatten().tolist()
        if not rows:
            raise ValueError(f"Expected an id that the datastore has, but got {row_id}.")
        return "" if self.paths is None else self.paths[rows[0]]

    def search(
        self, queries: Tensor | NDArray, k: int = 20, exclude_ids: Values | None = None
    ) -> Neighbors:
        """Finds the k nearest rows of each query, exactly."""
        wanted = check_request(queries, k, exclude_ids, self.dim)
        shape = (len(wanted.queries), wanted.width(len(self)))
        similarities, positions = np.zeros(shape), np.zeros(shape, np.int64)
        if 0 not in shape:
            similarities, positions = self._searcher.search(
                wanted.queries, shape[1], wanted.excluded
            )
        found = torch.from_numpy(positions)
        neighbors = Neighbors(torch.from_numpy(similarities), self.labels[found], self.ids[found])
        return neighbors.rounded(queries)

    def copy_to(self, folder: Path) -> None:
        """Copies the row files into another folder, before anything else is written there."""
        folder.mkdir(parents=True, exist_ok=True)
        for path, record in zip(self.places, self.manifest.blobs, strict=True):
            target = folder / record.name
            if not target.exists() or not target.samefile(path):
                target.unlink(missing_ok=True)
                shutil.copyfile(path, target)
            record.verify(target)  # afterwards: what was copied is what was opened

    def write_manifest(self, folder: Path, binding: Binding) -> None:
        """Binds the row files to the checkpoint that lies beside them."""
        manifest = replace(self.manifest, binding=binding, faiss_index=None)
        (folder / FAISS_NAME).unlink(missing_ok=True)  # made from the rows, and not copied
        (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")

def check_content(
    features: RowParts, labels: Tensor, ids: Tensor, mean: Tensor, *, reads_features: bool = True
) -> None:
    """Refuses rows of a file that no datastore could have written."""
    try:
        check_row_numbers(labels, ids, len(features))
        for part in features.parts if reads_features else ():
            refuse_non_finite(part, "features")
        refuse_non_finite(mean.unsqueeze(0), "mean")
        if mean.shape != features.shape[1:]:
            raise ValueError(
                f"Expected `mean` to have shape {features.shape[1:]}, but got {tuple(mean.shape)}."
            )
    except ValueError as error:
        raise DatastoreError(f"The datastore is not usable: {error}") from error

def parse_blob(record: FileRecord, path: Path | None) -> dict[str, Tensor]:
    """The tensors of a row file, in memory: what is kept is what was hashed."""
    data = record.read(path)
    try:
        return load(data)
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise DatastoreError(
            f"Expected {record.name} to be a safetensors file, but: {error}"
        ) from error

def take(tensors: dict[str, Tensor], key: str, record: FileRecord) -> Tensor:
    """A tensor that a row file must hold."""
    if key not in tensors:
        raise DatastoreError(
            f"Expected {record.name} to hold `{key}`, but it holds {sorted(tensors)}."
        )
    return tensors[key]

def take_vector(
    tensors: dict[str, Tensor], key: str, dtype: torch.dtype, record: FileRecord
) -> Tensor:
    """A list of one dtype that a row file must hold."""
    vector = take(tensors, key, record)
    if vector.ndim != 1 or vector.dtype != dtype:
        raise DatastoreError(
            f"Expected `{key}` in {record.name} to be a list of {dtype}, "
            f"but got {tuple(vector.shape)} {vector.dtype}."
        )
    return vector

def take_map(tensors: dict[str, Tensor], manifest: Manifest) -> LearnedMap | None:
    """The learned map in the first row file, which must be that of the manifest; None without."""
    if manifest.learned_map is None:
        return None
    record = manifest.blobs[0]
    try:
        found = LearnedMap(take(tensors, "learned_map", record))
    except ValueError as error:
        raise DatastoreError(f"The datastore is not usable: {error}") from error
    if (found.sha256, found.dim) != (manifest.learned_map, manifest.dim):
        raise DatastoreError(
            f"Expected `learned_map` in {record.name} to have {manifest.dim} columns and sha256 "
            f"{manifest.learned_map[:12]}…, but got {found.dim} and {found.sha256[:12]}…; the file "
            "is from another save, download or save it again."
        )
    return found

def join_features(files: list[dict[str, Tensor]], manifest: Manifest) -> RowParts:
    """The features of all row files, which must be those of the manifest."""
    pairs = zip(files, manifest.blobs, strict=True)
    parts = [take(tensors, "features", record) for tensors, record in pairs]
    kinds = {f"{list(part.shape[1:])} {part.dtype}" for part in parts}
    if len(kinds) != 1 or parts[0].ndim != 2:
        raise DatastoreError(
            f"Expected features of ({manifest.num_rows}, {manifest.dim}) of one dtype in all "
            f"blobs, but they hold {[tuple(part.shape) for part in parts]}: {sorted(kinds)}."
        )
    features, shape = RowParts(parts), (manifest.num_rows, manifest.dim)
    if features.shape != shape or str(features.dtype) != f"torch.{manifest.dtype}":
        raise DatastoreError(
            f"Expected features of {shape} {manifest.dtype} as the manifest says, "
            f"but the blobs hold {features.shape} {features.dtype}."
        )
    return features

def join_vectors(
    files: list[dict[str, Tensor]], key: str, manifest: Manifest, dtype: torch.dtype
) -> Tensor:
    """One list over all row files."""
    pairs = zip(files, manifest.blobs, strict=True)
    parts = [take_vector(tensors, key, dtype, record) for tensors, record in pairs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)

def decode_paths(files: list[dict[str, Tensor]], manifest: Manifest) -> list[str] | None:
    """Where each row's picture lies; None if the row files do not say."""
    if "path_ends" not in files[0]:
        return None
    paths: list[str] = []
    for tensors, record in zip(files, manifest.blobs, strict=True):
        text = take_vector(tensors, "path_bytes", torch.uint8, record).numpy().tobytes()
        ends = take_vector(tensors, "path_ends", torch.int64, record).tolist()
        rows = len(take(tensors, "ids", record))
        starts = [0, *ends[:-1]] if ends else []
        in_order = all(a <= b for a, b in zip(starts, ends, strict=True))
        if len(ends) != rows or not in_order or (ends[-1] if ends else 0) != len(text):
            raise DatastoreError(
                f"Expected {record.name} to hold the paths of its {rows} rows, in order."
            )
        spans = zip(starts, ends, strict=True)
        paths += [text[start:end].decode(errors="surrogateescape") for start, end in spans]
    return paths


# ---- reading.py: A checkpoint and its datastore: read together, and the one must belong to the other.

logger = logging.getLogger(__name__)
THUMBNAILS_NAME = "thumbnails.safetensors"
"""File of a checkpoint: ids, where each picture ends, and the bytes of all of them."""

CONTENTS_NAME = "contents.safetensors"
"""File of a checkpoint: ids, marks of the rows, and prints of their pictures."""

_NO_WEIGHTS = (THUMBNAILS_NAME, CONTENTS_NAME)
HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download", "subfolder")
"""Of `from_pretrained`, which hold for every file."""

PUSH_OPTIONS = (
    "repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr",
)  # fmt: skip
"""Of `save_pretrained`, which go to `push_to_hub`."""

# where the processor runs does not change its pixels by intent
_PROCESSOR_PLACES = ("feature_extractor_type", "processor_class", "device")
_BACKEND_SUFFIX = re.compile(r"(Fast|Pil)$")

class HubFiles:
    """Finds files by name, all of one version."""

    def __init__(self, name: str | Path | None, options: dict[str, Any]) -> None:
        self.name = str(name)
        self.options = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
        places = {key: self.options[key] for key in HUB_OPTIONS[:3] if key in self.options}
        self.revision = resolve_revision(self.name, options.get("revision"), **places)

    def resolve(self, name: str) -> Path | None:
        """Finds a file by name; None if there is none."""
        try:
            found = cached_file(
                self.name, name, revision=self.revision,
                _raise_exceptions_for_missing_entries=False, **self.options,
            )  # fmt: skip
        except (OSError, ValueError):
            raise
        except Exception as error:  # the HTTP client's own, of whichever client there is
            raise OSError(
                f"Could not get {name} of {self.name}: {error}; nothing was loaded, try again."
            ) from error
        return None if found is None else Path(found)

def read_datastore(files: HubFiles, config: KnnConfig, allow_stale: bool) -> FrozenDatastore | None:
    """The datastore of a checkpoint, with every byte checked."""
    path = files.resolve(MANIFEST_NAME)
    if path is None:
        refuse_missing(files.name, config)
        return None
    manifest = Manifest.read(path)
    problem = find_problem(files.resolve, manifest.binding)
    if problem is not None and not allow_stale:
        raise problem
    if problem is not None:
        logger.warning("Using a datastore that does not fit its checkpoint: %s", problem)
    store = FrozenDatastore(manifest, files.resolve)
    largest = int(store.labels.max()) if len(store) else -1
    has_map = store.learned_map is not None
    check_fits(config, store.dim, store.metric, store.normalization, has_map, largest)
    return store

def refuse_missing(name: str, config: KnnConfig) -> None:
    """Refuses a checkpoint without the datastore that its configuration speaks of."""
    if config.has_datastore:
        raise DatastoreError(
            f"Expected {name} to hold {MANIFEST_NAME}, as its {CONFIG_NAME} says, but it is "
            "missing; pass load_datastore=False for the plain classifier."
        )

def check_fits(
    config: KnnConfig, dim: int, metric: str, normalization: str, has_map: bool, largest: int | None
) -> None:
    """Refuses a datastore that a model cannot use."""
    width, learned = config.extra_dim or config.feature_dim, config.learned_metric
    for name, mine, theirs in (
        ("width", width, dim),
        ("metric", config.metric, metric),
        ("normalization", config.normalization, normalization),
        ("learned_metric", learned, has_map),
    ):
        if theirs != mine:
            raise ValueError(
                f"Expected a datastore of {name} {mine}, as the model has, but got {theirs}."
            )
    if largest is not None and largest >= config.classes:
        raise ValueError(
            f"Expected labels below {config.classes} in the datastore, the number of classes of "
            f"the model, but got {largest}."
        )

def find_problem(resolve: Resolve, binding: Binding | None) -> DatastoreError | None:
    """What of a checkpoint is not what its datastore was saved with; None if all is."""
    if binding is None:
        return None
    damaged: list[DatastoreError] = []
    found: dict[str, Path] = {}
    for record in binding.files:
        path = resolve(record.name)
        if path is not None:
            found[record.name] = path
        try:
            record.verify(path)
        except DatastoreError as error:
            damaged.append(error)
    names = [record.name for record in binding.files if _is_weights(record.name)]
    if any(name not in found for name in names):
        return damaged[0]
    processor = resolve(IMAGE_PROCESSOR_NAME)
    if processor is not None and not binding.processor:
        logger.warning("%s was put beside a datastore saved without one: they must fit.", processor)
        processor = None
    try:
        pooling = _stored_pooling(resolve(CONFIG_NAME), binding.pooling)
        now = fingerprint_files([found[name] for name in names], processor, pooling)
    except DatastoreError as error:
        return damaged[0] if damaged else error
    except SafetensorError:
        return damaged[0] if damaged else None  # not a readable file: which one, the hashes say
    if now[0] == binding.fingerprint:
        return damaged[0] if damaged else None
    parts = ("weights", "processor settings", "pooling")
    was = (binding.weights, binding.processor, binding.pooling)
    changed = [p for p, a, b in zip(parts, now[1:], was, strict=True) if a != b]
    changed += [record.name for record in binding.files if record.name in str(damaged)]
    return StaleDatastoreError(
        f"Expected a datastore made by the backbone beside it, fingerprint {now[0][:12]}…, but "
        f"{MANIFEST_NAME} names {binding.fingerprint[:12]}… (other {', '.join(changed)}); "
        f"build it again, or pass allow_stale=True to use it anyway."
    )

def bind(folder: Path, pooling: str, dtype: str, weight_sum: str | None = None) -> Binding:
    """Ties a datastore to the files of the checkpoint that lie in a folder."""
    weights = sorted(folder.glob("model*.safetensors"))
    found = fingerprint_files(weights, folder / IMAGE_PROCESSOR_NAME, pooling)
    fingerprint, here, processor_sum, _ = found
    if weight_sum is not None:
        fingerprint = _combine(weight_sum, processor_sum, pooling)
    names = [CONFIG_NAME, *(path.name for path in weights)]
    others = (SAFE_WEIGHTS_INDEX_NAME, *_NO_WEIGHTS)
    names += [name for name in others if (folder / name).is_file()]
    files = [FileRecord.of(folder / name) for name in names]
    return Binding(fingerprint, weight_sum or here, processor_sum, pooling, dtype, files)

def bind_again(folder: Path, pooling: str, dtype: torch.dtype, before: Binding | None) -> Binding:
    """Ties rows that were opened with one checkpoint to another; what was stale stays so."""
    name = str(dtype).removeprefix("torch.")
    binding = bind(folder, pooling, name)
    alike = binding.fingerprint, _combine(binding.weights, "", binding.pooling)
    if before is None or before.dtype != name or before.fingerprint in alike:
        return binding
    logger.warning(
        "The datastore was not made by the backbone, image processor and pooling as they are now; "
        "it is saved as stale."
    )
    return bind(folder, pooling, name, before.fingerprint)  # which is no hash of weights

def warn_of_dtype(dtype: torch.dtype, binding: Binding | None) -> None:
    """Says so if a backbone is loaded in another dtype than made the datastore's features."""
    name = str(dtype).removeprefix("torch.")
    if binding is not None and name != binding.dtype:
        logger.warning(
            "The backbone is loaded as %s, but %s made the datastore's features; similarities "
            "can differ a little.", name, binding.dtype,
        )  # fmt: skip

def refuse_other_rows(folder: Path, mine: Manifest | None) -> None:
    """Refuses to save over another datastore, of which files would be left."""
    if not (folder / MANIFEST_NAME).exists():
        return
    if mine is None or Manifest.read(folder / MANIFEST_NAME).blobs != mine.blobs:
        raise ValueError(
            f"Expected {folder} to hold no other datastore; choose another folder, or `pip install "
            "hf-knn`, which replaces a checkpoint as a whole."
        )

def fingerprint_files(
    weights: list[Path], processor: Path | None, pooling: str
) -> tuple[str, str, str, str]:
    """The fingerprint of what makes features, and its three parts."""
    weight_sum = _hash_stored_backbone(weights)
    processor_sum = ""
    if processor is not None and processor.is_file():
        processor_sum = hash_settings(_read_object(processor))
    return _combine(weight_sum, processor_sum, pooling), weight_sum, processor_sum, pooling

def hash_settings(settings: dict[str, Any]) -> str:
    """The sha256 of a processor's settings, wherever it runs."""
    kept = {key: value for key, value in settings.items() if key not in _PROCESSOR_PLACES}
    kind = str(kept.get("image_processor_type", ""))
    kept["image_processor_type"] = _BACKEND_SUFFIX.sub("", kind)
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") and name not in _NO_WEIGHTS

def _stored_pooling(config: Path | None, fallback: str) -> str:
    """The pooling that the configuration beside the datastore asks for."""
    values = {} if config is None else _read_object(config)
    return str(values.get("knn_pooling") or values.get("pooling") or fallback)

def _read_object(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict):
        raise DatastoreError(
            f"Expected {path.name} to hold a JSON object, but it does not; the file is damaged, "
            "download or save it again."
        )
    return values

def _combine(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()

def _hash_stored_backbone(paths: list[Path]) -> str:
    """Hashes the backbone's tensors under the names and dtypes they are stored with."""
    place: dict[str, Path] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            place |= {name: path for name in file.keys() if name.startswith("backbone.")}  # noqa: SIM118

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in sorted(place):
            with safe_open(place[name], "pt") as file:
                yield name, file.get_tensor(name)

    return hash_tensors(tensors())


# ---- model.py: The model: a vision backbone, a head and a datastore, with both voices blended.

_METHODS = (
    "teach", "forget", "relabel", "merge", "undo", "explain", "keep_thumbnails", "fingerprint_rows",
)  # fmt: skip
_OPTIONS = ("trust_faiss_index", "trust_remote_datastore", "datastore_uri", "datastore_token")
_ONLY_IN_PACKAGE = (
    "`{}` needs the package, of which only what answers came along with this checkpoint: "
    "`pip install hf-knn`, and `import hf_knn` before the checkpoint is opened."
)

@dataclass
class KnnImageClassifierOutput(ModelOutput):
    """What `KnnForImageClassification` returns.

    Attributes:
        loss: mean cross-entropy of the head, if labels were given.
        logits: [B, C] float32 log-probabilities: the blend in `eval()` mode, the head's in
            `train()` mode; floored at log(1e-12).
        head_logits: [B, C_head] the head alone.
        knn_log_probs: [B, C] float32 the neighbours alone, -inf for a class without one; None
            without a datastore and in `train()` mode.
        neighbors: `Neighbors` of [B, k'], if asked for.
        pooler_output: [B, D] the features.
        hidden_states: of the backbone, if asked for.
        attentions: of the backbone, if asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    head_logits: Tensor | None = None
    knn_log_probs: Tensor | None = None
    neighbors: Neighbors | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

class KnnForImageClassification(PreTrainedModel):
    """An image classifier that also remembers.

    A backbone makes features, a head classifies them, a datastore of training features votes by its
    nearest neighbours, and `logits` is the blend of both. With no datastore, or an empty one, the
    model is its head alone. The package `hf_knn` has the same class with more: it teaches, forgets,
    explains, trains, and searches with faiss or Milvus.

    Attributes:
        datastore: what is searched, or None; a plain attribute that no device move, cast or
            distributed wrapper touches.
        image_processor: the image processor that goes with the backbone, or None.
    """

    config_class = KnnConfig
    config: KnnConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False

    def __init__(self, config: KnnConfig) -> None:
        super().__init__(config)
        poolings = (config.pooling, config.store_pooling)
        self.backbone = build_backbone(config.backbone, poolings)
        # a class attribute of transformers, which here depends on the backbone
        self.supports_gradient_checkpointing = self.backbone.supports_gradient_checkpointing
        self.head = KnnHead.from_config(config)
        self.datastore: FrozenDatastore | None = None
        self.image_processor: Any = None
        self.post_init()

    def __getattr__(self, name: str) -> Any:
        if name in _METHODS:
            raise AttributeError(_ONLY_IN_PACKAGE.format(name))
        return super().__getattr__(name)

    @classmethod
    def from_backbone(cls, *args: Any, **kwargs: Any) -> Self:
        """Of the package: puts a new head and no datastore on a pretrained backbone."""
        raise AttributeError(_ONLY_IN_PACKAGE.format("from_backbone"))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *model_args: Any,
        load_datastore: bool = True,
        allow_stale: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Opens a checkpoint with its datastore and image processor.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id.
            model_args: see `PreTrainedModel.from_pretrained`.
            load_datastore: False gives the plain classifier.
            allow_stale: True accepts, with a warning, a datastore whose features were made by other
                weights, processor settings or pooling, and files beside it that were changed.
            kwargs: see `PreTrainedModel.from_pretrained`; `revision`, `token`, `cache_dir`,
                `subfolder`, … hold for every file of the checkpoint.

        Raises:
            DatastoreError: for a damaged or incomplete datastore, naming the file, or for rows in
                a vector database, which only the package reads.
            StaleDatastoreError: for a datastore of other weights, with both fingerprints.
            ValueError: for an option that only the package has.
        """
        for name in _OPTIONS:
            if kwargs.pop(name, None):
                raise ValueError(_ONLY_IN_PACKAGE.format(name))
        files = HubFiles(pretrained_model_name_or_path, kwargs)
        kwargs["revision"] = files.revision
        kwargs.setdefault("use_safetensors", True)  # a pickle is never opened
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for tensor in (*model.parameters(), *model.buffers()):  # mapped: they change with the file
            if tensor.device.type == "cpu" and type(tensor.data) is Tensor:
                tensor.data = tensor.data.clone()
        if files.resolve(IMAGE_PROCESSOR_NAME) is not None:
            model.image_processor = transformers.AutoImageProcessor.from_pretrained(
                files.name, revision=files.revision, **files.options
            )
        if load_datastore:
            model.datastore = read_datastore(files, model.config, allow_stale)
            if model.datastore is not None:
                warn_of_dtype(model.dtype, model.datastore.manifest.binding)
        return loaded

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves weights, configuration, processor, code, and the datastore as it was opened.

        Args:
            save_directory: the folder.
            is_main_process: False does nothing: only the main process saves.
            push_to_hub: also push, to `repo_id` or a repository of the folder's name; `private`,
                `token`, `revision`, `commit_message`, … go to `push_to_hub`.
            kwargs: see `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: for a folder with another datastore, which only the package replaces whole.
            DatastoreError: if the files of the datastore are no longer what was opened.
        """
        if not is_main_process:
            return
        self.config.check()
        folder, store = Path(save_directory), self.datastore
        options = {name: kwargs.pop(name) for name in PUSH_OPTIONS if name in kwargs}
        refuse_other_rows(folder, None if store is None else store.manifest)
        if store is not None:
            store.copy_to(folder)
        self.config.has_datastore = store is not None
        super().save_pretrained(folder, **kwargs)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(folder)
        if store is not None:
            binding = bind_again(
                folder, self.config.store_pooling, self.dtype, store.manifest.binding
            )
            store.write_manifest(folder, binding)
        if push_to_hub:
            repo_id = options.pop("repo_id", folder.name)
            self.push_to_hub(repo_id, **options)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        features: Tensor | None = None,
        sample_ids: Tensor | None = None,
        return_neighbors: bool = False,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | list[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> KnnImageClassifierOutput | tuple[Any, ...]:
        """Classifies images, or features computed before.

        In `train()` mode nothing is searched and `logits` is the head alone.

        Args:
            pixel_values: [B, 3, H, W].
            labels: [B] int64; the loss is the head's cross-entropy, over the classes it has.
            features: [B, D] instead of `pixel_values`, as in `pooler_output`.
            sample_ids: [B] int64; the stored row with that id is no neighbour of that image
                (-1 = none).
            return_neighbors: also return the neighbours.
            output_hidden_states: also return the backbone's hidden states, all or some.
            output_attentions: also return the backbone's attentions, all or some.
            return_dict: False returns a tuple.
            kwargs: ignored values that generic callers pass (`num_items_in_batch`, …).

        Raises:
            ValueError: unless exactly one of `pixel_values` and `features` is given.
        """
        if (pixel_values is None) == (features is None):
            raise ValueError("Expected exactly one of `pixel_values` and `features`.")
        body = BaseModelOutput()
        if pixel_values is not None:
            given = {"output_hidden_states": output_hidden_states}
            given["output_attentions"] = output_attentions
            wanted = {
                name: getattr(self.config, name) if value is None else value
                for name, value in given.items()
            }
            asked = {name: value for name, value in wanted.items() if value}
            features, body = extract(self.backbone, pixel_values, self.config, **asked)
        assert features is not None
        head_part, store_part = split_features(features, self.config)
        neighbors = None if self.training else self._find_neighbors(store_part, sample_ids)
        log_probs, head_logits, votes = self.weigh(head_part, neighbors)
        output = KnnImageClassifierOutput(
            loss=None if labels is None else self._head_loss(head_logits, labels),
            logits=log_probs,
            head_logits=head_logits,
            knn_log_probs=votes,
            neighbors=neighbors if return_neighbors else None,
            pooler_output=features,
            hidden_states=body.get("hidden_states"),
            attentions=body.get("attentions"),
        )
        use_dict = self.config.return_dict if return_dict is None else return_dict
        return output if use_dict else output.to_tuple()

    def weigh(
        self, features: Tensor, neighbors: Neighbors | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the head says, what the neighbours vote, and the blend of both."""
        config = self.config
        head_logits = self.head(features.to(self.head.mean.dtype))  # [B, C_head]
        log_probs = functional.log_softmax(head_logits.float(), dim=-1)
        votes = None if neighbors is None else self._count_votes(neighbors)
        if votes is not None:
            log_probs = blend_log_probs(log_probs, votes, config.knn_weight, config.blended_classes)
            log_probs = soften(log_probs, config.blend_temperature)
        else:
            missing = max(0, config.classes - log_probs.shape[1])
            log_probs = functional.pad(log_probs, (0, missing), value=-torch.inf)
        return floor_log_probs(log_probs), head_logits, votes  # [B, C], [B, C_head], [B, C]

    @torch.compiler.disable  # a search is no graph; under `inference_mode` its capture fails
    def _find_neighbors(self, features: Tensor, sample_ids: Tensor | None) -> Neighbors | None:
        store = self.datastore
        if store is None or len(store) == 0:
            return None
        return store.search(features.float(), self.config.k, sample_ids)

    @torch.compiler.disable
    def _count_votes(self, neighbors: Neighbors) -> Tensor:
        assert self.datastore is not None
        return knn_log_probs(
            neighbors.similarities,
            neighbors.labels,
            self.config.classes,
            self.config.knn_temperature,
            metric=self.datastore.metric,
            weighting=self.config.knn_weighting,
        )

    def _head_loss(self, head_logits: Tensor, labels: Tensor) -> Tensor:
        if len(labels) and int(labels.max()) >= self.config.classes:
            raise ValueError(
                f"Expected `labels` below {self.config.classes}, the number of classes, "
                f"but got {int(labels.max())}."
            )
        known = labels < head_logits.shape[1]  # a class taught later has no logit to train
        if known.all():
            return functional.cross_entropy(head_logits.float(), labels)
        kept = functional.cross_entropy(head_logits[known].float(), labels[known], reduction="sum")
        return kept / known.sum().clamp_min(1)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, KnnHead):
            module.reset()
