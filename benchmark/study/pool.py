"""Features of all pictures of a task, computed once and shared by every protocol and split."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from numpy.typing import NDArray
from torch import Tensor

from catalog.backbones import SCRATCH, Backbone, place_of
from catalog.loaded_task import LoadedTask
from catalog.splits import Parts, split_pool
from hf_knn import KnnForImageClassification, extract_features
from study.phases import EXTRACT, Phases


class Rows(NamedTuple):
    """Some pictures as numbers.

    Attributes:
        head: [N, D] features for heads.
        store: [N, D'] features for neighbours.
        labels: [N] int64.
    """

    head: Tensor
    store: Tensor
    labels: Tensor

    def select(self, rows: Tensor | NDArray[np.int64] | Sequence[int]) -> "Rows":
        """Some of them, in the order given."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        return Rows(*(part[index] for part in self))


@dataclass(frozen=True)
class Pool:
    """All pictures of a task.

    Attributes:
        rows: N of them.
        groups: [N] what belongs together; None: each is its own.
        roles: [N] what the source says each is for.
    """

    rows: Rows
    groups: NDArray[np.int64] | None
    roles: NDArray[np.int8]

    def parts(self, seed: int) -> Parts:
        """Row numbers of the split of a seed."""
        return split_pool(self.rows.labels.numpy(), self.groups, self.roles, seed)


class OpenBackbone:
    """A backbone that is opened when it is first needed; all ranks make this object together.

    Args:
        entry: which.
        label_names: of the task.
        cache_dir: where offline backbones and features are kept.
        batch_size: pictures per forward pass.
        precision: `fp32`, `bf16` or `fp16`.
        phases: told how long features take.
    """

    def __init__(
        self,
        entry: Backbone,
        label_names: list[str],
        cache_dir: Path | None = None,
        batch_size: int = 32,
        precision: str = "fp32",
        phases: Phases | None = None,
    ) -> None:
        self.entry, self.label_names, self.cache_dir = entry, label_names, cache_dir
        self.batch_size, self.precision = batch_size, precision
        self.phases = phases or Phases()
        # here, where all ranks come by once: the first of them makes it while the others wait
        self.place = place_of(entry, cache_dir)

    @property
    def is_scratch(self) -> bool:
        """Whether its features are those of a training on each split."""
        return self.entry.kind == SCRATCH

    @property
    def is_on_hub(self) -> bool:
        """Whether its weights come from the Hub, and not from a folder."""
        return not isinstance(self.place, Path) and not Path(self.place).is_dir()

    @cached_property
    def revision(self) -> str:
        """What its weights are of: package versions, a commit on the Hub, or a folder's content."""
        if isinstance(self.place, Path):
            return self.place.name
        if not self.is_on_hub:
            return _content_of(Path(self.place))
        name = self.place if "/" in self.place else f"timm/{self.place}"
        return str(HfApi().model_info(name, revision=self.entry.revision).sha)

    def fresh(self) -> KnnForImageClassification:
        """A new model on the pretrained backbone."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = KnnForImageClassification.from_backbone(
            self.place,
            self.label_names,
            pooling=self.entry.pooling,
            knn_pooling=self.entry.knn_pooling,
            normalization=self.entry.normalization,
            hub_options={"revision": self.revision} if self.is_on_hub else None,
        )
        model.to(torch.device(device))  # type: ignore[arg-type]
        return model

    @cached_property
    def model(self) -> KnnForImageClassification:
        """The model whose backbone stays as it is."""
        return self.fresh()

    def features(self, dataset: Dataset, model: KnnForImageClassification | None = None) -> Any:
        """Features of some pictures, from the cache where they were computed before."""
        cache = None if self.cache_dir is None else self.cache_dir / "features"
        with self.phases.phase(EXTRACT):
            found = extract_features(
                model or self.model, dataset, cache_dir=cache, batch_size=self.batch_size,
                precision=self.precision, use_cache=model is None,
            )  # fmt: skip
        if found.computed:
            self.phases.images += found.computed
            self.phases.image_seconds += found.seconds
        return found

    def rows(self, found: Any, model: KnnForImageClassification | None = None) -> Rows:
        """Features as the two parts that heads and neighbours see."""
        config = (model or self.model).config
        head = found.features[:, : config.feature_dim]
        store = found.features[:, config.feature_dim :] if config.extra_dim else head
        return Rows(head, store, found.labels)


def _content_of(folder: Path) -> str:
    """A name of what the files of a folder hold, whatever the folder is called."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as stream:
            found.update(
                f"{path.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode()
            )
    return f"files-{found.hexdigest()[:16]}"


def pool_features(
    loaded: LoadedTask, backbone: OpenBackbone, see: Callable[[Dataset], None] = lambda rows: None
) -> Pool:
    """Computes or reads the features of all pictures; all ranks take part.

    Args:
        loaded: the task.
        backbone: a frozen one.
        see: shown the pictures that go through, some at a time.
    """
    parts, roles, groups = [], [], []
    for role, rows in loaded.chunks():
        see(rows)
        found = backbone.features(rows)
        parts.append(backbone.rows(found))
        roles.append(np.full(len(rows), role, np.int8))
        groups += list(map(str, rows["group"][:])) if "group" in rows.column_names else []
    joined = Rows(*(torch.cat(same) for same in zip(*parts, strict=True)))
    owners = np.unique(groups, return_inverse=True)[1].astype(np.int64) if groups else None
    return Pool(joined, owners, np.concatenate(roles))


def labels_only(loaded: LoadedTask) -> Pool:
    """The pool of a backbone that is trained on each split, whose features come with the split."""
    labels = torch.as_tensor(np.asarray(loaded.rows["label"][:]), dtype=torch.int64)
    empty = torch.empty(len(labels), 0)
    return Pool(Rows(empty, empty, labels), loaded.groups, loaded.roles)
