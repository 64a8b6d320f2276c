"""The memory of the classifier: rows of (features, label, id) that are searched by similarity."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.utils import CONFIG_NAME

from .datastore_files import DatastoreFiles
from .hub_files import HubFiles
from .indexing import AUTO, MIN_RECALL
from .manifest import MANIFEST_NAME, Manifest
from .publishing import PushTarget
from .rows import Values, as_features, as_whole_numbers, check_row_numbers, to_storage
from .search_backend import Neighbors as Neighbors


class Datastore(DatastoreFiles):
    """Rows of (features, label, id) that are searched by similarity.

    Rows are raw features, cast once on entry to the storage dtype; normalisation is applied to
    stored rows and queries alike when they are compared. The constructor takes checked parts: build
    with `from_features` or `load`.

    Args:
        features: [N, D] float16 or float32, CPU.
        labels: [N] int64, >= 0.
        ids: [N] int64, unique, >= 0.
        mean: [D] float32, subtracted by `l2_centered`.
        metric: `cosine` or `l2`.
        normalization: `l2_centered`, `l2` or `none`.
        index: `auto`, `flat` or a faiss factory string.
        paths: where each row's picture lies, relative to its dataset, if known.
        max_memory: what the index may take, such as `"2GB"`; None for no limit.
        min_recall: recall at 20 that an approximate index is set to reach.

    Attributes:
        mean: [D] float32.
        manifest: what was read from disk; None for a datastore built in memory.
        digest: fingerprint of the in-memory backbone that made the features, if known.
        source: dataset id, revision and split of the rows, as far as known.
        home: a folder whose files the next save hard-links where they did not change; None if there
            is none.

    Raises:
        ValueError: for parts that do not fit, with both numbers.
    """

    @classmethod
    def from_features(
        cls,
        features: Tensor | NDArray,
        labels: Values,
        ids: Values | None = None,
        metric: str = "cosine",
        normalization: str = "l2_centered",
        index: str = AUTO,
        paths: Sequence[str] | None = None,
        max_memory: str | int | None = None,
        min_recall: float = MIN_RECALL,
    ) -> Self:
        """Builds a datastore; fixes the mean that centring uses.

        Args:
            features: [N, D] raw features of any float dtype and device; stored as float16, or as
                float32 where float16 would lose too much (a message says so).
            labels: [N] whole numbers >= 0.
            ids: [N] unique whole numbers >= 0; None numbers the rows.
            metric: `cosine` (inner product of unit vectors) or `l2` (negative squared distance).
            normalization: `l2_centered` (subtract the mean of these rows, then length 1), `l2`
                (length 1) or `none`.
            index: `flat` searches exactly, `auto` does up to 100,000 rows and uses an inverted
                file above; or any faiss factory string.
            paths: [N] where each row's picture lies, relative to its dataset.
            max_memory: what the index may take, such as `"2GB"`; `auto` quantises to keep to it.
            min_recall: recall at 20 that an approximate index is set to reach, by measurement.

        Raises:
            ValueError: for NaN or infinite features (with the row numbers), shapes that disagree,
                negative, float or doubled ids or labels, or a bad option.
            ImportError: for a faiss index without faiss.
        """
        stored = to_storage(as_features(features, "features"), torch.float16)
        numbers = torch.arange(len(stored)) if ids is None else as_whole_numbers(ids, "ids")
        wanted, numbers = check_row_numbers(
            as_whole_numbers(labels, "labels"), numbers, len(stored)
        )
        store = cls(
            stored, wanted, numbers, torch.zeros(stored.shape[1]), metric=metric,
            normalization=normalization, index=index, paths=paths, max_memory=max_memory,
            min_recall=min_recall,
        )  # fmt: skip
        store.recenter()
        return store

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload datastore",
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        parent_commit: str | None = None,
    ) -> Any:
        """Pushes the datastore in one commit; files that did not change are not sent again.

        Args:
            repo_id: `org/name` of a repository of its own; made if it is not there. A datastore
                that belongs to a model goes with `model.push_to_hub`.
            commit_message: of the commit.
            private: whether a repository that is made is private.
            token: a token, or True for the one that is logged in.
            revision: a branch, made if it is not there.
            create_pr: open a pull request instead.
            parent_commit: the commit that the branch must be at; None is where it is now.

        Returns:
            `huggingface_hub.CommitInfo`.

        Raises:
            PushConflictError: if the branch moved on meanwhile; nothing was overwritten.
            ValueError: for the repository of a model.
        """
        target = PushTarget(repo_id, private, token, revision, create_pr, parent_commit).open()
        if target.holds(CONFIG_NAME):
            raise ValueError(
                f"Expected {target.repo_id} to be a repository of its own, but it holds a model; "
                "push the model with model.push_to_hub."
            )
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "store"
            self.save(folder)
            return target.push(folder, commit_message)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str = "",
        trust_faiss_index: bool = False,
    ) -> Self:
        """Opens the datastore of a folder or of a repository on the Hub, all of one revision.

        Args:
            name: a folder, or the Hub id of a datastore or of a model that has one.
            revision: a branch, tag or commit.
            token: a token, or True for the one that is logged in.
            cache_dir: where downloads are kept; None is the Hub's own cache.
            local_files_only: ask nobody, use what was downloaded.
            force_download: download again.
            subfolder: of the repository or folder.
            trust_faiss_index: see `load`.

        Raises:
            FileNotFoundError: if there is no datastore.
            DatastoreError: if a file is missing, damaged, or disagrees with the manifest.
            OSError: if there is no such repository or revision, or the download failed.
        """
        if Path(name).is_dir():
            return cls.load(Path(name) / subfolder, trust_faiss_index=trust_faiss_index)
        options = {
            "revision": revision, "token": token, "cache_dir": cache_dir, "subfolder": subfolder,
            "local_files_only": local_files_only, "force_download": force_download,
        }  # fmt: skip
        files = HubFiles(name, options)
        manifest = files.resolve(MANIFEST_NAME)
        if manifest is None:
            raise FileNotFoundError(
                f"Expected {name} to hold a datastore, but it has no {MANIFEST_NAME}."
            )
        return cls.from_manifest(
            Manifest.read(manifest), files.resolve, verify="full",
            trust_faiss_index=trust_faiss_index,
        )  # fmt: skip
