"""A task with its pictures, however they came here."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    Value,
    concatenate_datasets,
)
from numpy.typing import NDArray

from catalog.splits import Parts, split_pool
from catalog.tasks import Task

CHUNK_ROWS = 2_048
"""Pictures of a stream that are held at once."""

Pictures: TypeAlias = Dataset | IterableDataset


@dataclass(frozen=True)
class LoadedTask:
    """A task with its pictures.

    Attributes:
        entry: what is known of it.
        revision: commit, folder or package versions that the pictures are of.
        label_names: the classes in the order of their numbers.
        sources: pictures with `image`, `label` and perhaps `group`, by what they are for.
    """

    entry: Task
    revision: str
    label_names: list[str]
    sources: dict[int, Pictures]

    @property
    def is_streamed(self) -> bool:
        """Whether pictures come one after the other and are not kept."""
        return any(isinstance(rows, IterableDataset) for rows in self.sources.values())

    @property
    def rows(self) -> Dataset:
        """All pictures, numbered as the pool of features is.

        Raises:
            ValueError: for a stream.
        """
        if self.is_streamed:
            raise ValueError(
                f"Expected the pictures of {self.entry.name} on the disk, but they are streamed; "
                "do leave streaming out for protocols that need pictures again."
            )
        return concatenate_datasets(list(self.sources.values()))

    @property
    def roles(self) -> NDArray[np.int8]:
        """[N] what the source says each picture is for."""
        sizes = {role: len(rows) for role, rows in self.sources.items()}
        return np.repeat(np.array(list(sizes), np.int8), list(sizes.values()))

    @property
    def groups(self) -> NDArray[np.int64] | None:
        """[N] which pictures belong together; None: each is its own."""
        rows = self.rows
        if "group" not in rows.column_names:
            return None
        return np.unique(rows["group"][:], return_inverse=True)[1].astype(np.int64)

    def parts(self, seed: int = 0) -> Parts:
        """Row numbers of the split of a seed."""
        return split_pool(np.asarray(self.rows["label"][:]), self.groups, self.roles, seed)

    def chunks(self) -> Iterator[tuple[int, Dataset]]:
        """What pictures are for, and some of them; all at once where they are on the disk."""
        for role, rows in self.sources.items():
            if isinstance(rows, Dataset):
                yield role, rows
                continue
            held: list[dict[str, Any]] = []
            for row in rows:
                held.append(row)
                if len(held) == CHUNK_ROWS:
                    yield role, self._chunk(held)
                    held = []
            if held:
                yield role, self._chunk(held)

    def _chunk(self, held: list[dict[str, Any]]) -> Dataset:
        kinds: dict[str, Any] = {"image": Image(), "label": ClassLabel(names=self.label_names)}
        if "group" in held[0]:
            kinds["group"] = Value("string")
            held = [row | {"group": str(row["group"])} for row in held]
        return Dataset.from_list(held, features=Features(kinds))

    def part(self, name: str, seed: int = 0) -> Dataset:
        """The pictures of `train`, `validation` or `test` of a seed's split."""
        return self.rows.select(getattr(self.parts(seed), name))

    @property
    def train(self) -> Dataset:
        """The training pictures of seed 0."""
        return self.part("train")

    @property
    def validation(self) -> Dataset:
        """The validation pictures of seed 0."""
        return self.part("validation")

    @property
    def test(self) -> Dataset:
        """The test pictures of seed 0."""
        return self.part("test")
