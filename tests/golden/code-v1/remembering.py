"""What a model with a memory can do besides answering: learn, forget, and give reasons."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .explaining import Calibration, Explanation, explain
from .following import Follower
from .receipts import Receipt
from .row_fingerprint import StoredRows
from .rows import Values
from .search_backend import SearchBackend
from .teaching import (
    Label,
    features_of,
    fingerprint_rows,
    forget,
    merge,
    relabel,
    small_pictures,
    teach,
    thumbnails_of,
    undo,
)
from .thumbnails import Thumbnails


class Remembering:
    """The part of `KnnForImageClassification` that changes and explains what it remembers.

    Rows in Milvus are changed there at once, for all who ask: a checkpoint that refers to them
    refuses to open until the model is saved over it. The commands (`hf-knn teach`, …) change rows
    and checkpoint as one.

    Attributes:
        changes: receipts of what was taught and forgotten since the training, oldest first.
        forgotten: the rows of the last change, if it was `forget`, for `undo`; never saved.
        follower: what is kept in step with the datastore while rows come and go.
        calibration: how near stored rows lie to one another, for p-values.
        thumbnails: small pictures of stored rows, saved with the model, or None; see
            `keep_thumbnails`.
        forgotten_mean: [D], what centred rows when they were there; never saved.
        forgotten_thumbnails: those of `forgotten`; never saved.
        forgotten_picture: the picture of neighbours that there was before them; never saved.
    """

    changes: list[Receipt]
    forgotten: StoredRows | None
    forgotten_mean: Tensor | None
    follower: Follower | None
    calibration: Calibration | None
    thumbnails: Thumbnails | None
    forgotten_thumbnails: Thumbnails | None
    forgotten_picture: bytes | None

    def start_remembering(self) -> None:
        """Nothing was changed yet; called when a model, or its datastore from training, is made."""
        self.changes = []
        self.forgotten = self.forgotten_mean = self.follower = self.calibration = None
        self.thumbnails = self.forgotten_thumbnails = self.forgotten_picture = None

    def keep_thumbnails(self, images: Mapping[int, Any] | None) -> None:
        """Keeps small pictures of stored rows in the model, for everybody who opens it to see.

        They are encoded anew, 192 pixels on the longer side, without metadata, and saved with the
        checkpoint. `forget` removes those of its rows.

        Args:
            images: row id to picture (path, file content, PIL image); they join those that are
                kept. None removes all.

        Raises:
            ValueError: for a picture that cannot be read, or an id that is not stored; nothing is
                changed.
        """
        if images is None:
            self.thumbnails = None
            return
        made = thumbnails_of(self, images)
        self.thumbnails = made if self.thumbnails is None else self.thumbnails.joined(made)

    def fingerprint_rows(self) -> str:
        """A hash of all stored rows and their mean, whatever their order.

        Rows are counted once; copies made afterwards (`copy.deepcopy`) share the count, so that the
        first change of each is as fast as later ones.

        Returns:
            64 hexadecimal digits, as in a receipt.

        Raises:
            ValueError: without a datastore.
        """
        return fingerprint_rows(self)

    def teach(
        self,
        images: Any = None,
        labels: Sequence[Label] = (),
        *,
        features: Tensor | None = None,
        ids: Values | None = None,
        paths: Sequence[str] | None = None,
    ) -> Receipt:
        """Adds labelled pictures to the datastore; no training, all or none.

        The next answer knows them. A ridge head is updated exactly, to what a fit of all rows with
        the same regulariser gives; other heads stay. Until the blend is tuned again, new classes
        keep the whole probability that the neighbours give them, see `blend_log_probs`. A model
        that keeps thumbnails keeps those of taught pictures too.

        Args:
            images: M pictures (paths, file contents, PIL images, arrays) or pixel values
                [M, 3, H, W].
            labels: M names or numbers of classes; a name that is new makes a class.
            features: [M, D] instead of images, as in `pooler_output`.
            ids: [M] ids that the datastore does not have; None continues after the largest.
            paths: where each picture lies, relative to its dataset.

        Returns:
            The receipt, also kept in `changes`.

        Raises:
            ValueError: for pictures, labels or ids that cannot be used; nothing is changed.
        """
        if (images is None) == (features is None):
            raise ValueError("Expected exactly one of `images` and `features`.")
        found = features_of(self, images) if features is None else features
        keeps = self.thumbnails is not None and images is not None
        small = small_pictures(images) if keeps else []
        receipt = teach(self, found, labels, ids, paths)
        if small and self.thumbnails is not None:
            added = Thumbnails(dict(zip(receipt.ids, small, strict=True)))
            self.thumbnails = self.thumbnails.joined(added)
        return receipt

    def forget(
        self,
        ids: Values | None = None,
        *,
        label: Label | None = None,
        recenter: bool = False,
    ) -> Receipt:
        """Removes rows from the datastore, all or none; the next save holds no byte of them.

        A ridge head is what it would be had it never seen them; other heads keep what they learned.

        Args:
            ids: of the rows.
            label: instead of ids: every row of that class, which stays as a name without rows.
            recenter: also make the mean anew that centres rows, which changes all similarities a
                little.

        Returns:
            The receipt, which says what was not reached.

        Raises:
            ValueError: for ids or a class that are not there; nothing is changed.
        """
        return forget(self, ids, label=label, recenter=recenter)

    def relabel(self, ids: Values, labels: Sequence[Label]) -> Receipt:
        """Gives rows other labels, all or none; a ridge head follows.

        Args:
            ids: [M] of the rows.
            labels: M names or numbers of classes; a name that is new makes a class.

        Raises:
            ValueError: for ids that are not there, or bad labels; nothing is changed.
        """
        return relabel(self, ids, labels)

    def merge(self, other: SearchBackend, class_names: Sequence[str] | None = None) -> Receipt:
        """Adds the rows of another datastore of the same backbone, all or none.

        Args:
            other: the rows; ids that exist here are numbered anew.
            class_names: what its label numbers mean; None is what they mean here.

        Raises:
            ValueError: for another backbone, width, metric or normalisation; nothing is changed.
        """
        return merge(self, other, class_names)

    def undo(self) -> Receipt:
        """Takes the last change back, also one from before the model was saved.

        Raises:
            ValueError: if there is none, or if its rows were forgotten for good: by a save.
        """
        return undo(self)

    def explain(
        self,
        images: Any = None,
        *,
        features: Tensor | None = None,
        sample_ids: Tensor | None = None,
        level: float = 0.05,
        max_error: float | None = None,
    ) -> Explanation | list[Explanation]:
        """Says why an answer is what it is, and what would change it.

        Args:
            images: one picture (path, file content, PIL image, array), several in a list, or pixel
                values [B, 3, H, W].
            features: [B, D] instead of images, as in `pooler_output`.
            sample_ids: [B] int64, rows that are no neighbours, -1 for none.
            level: pictures with a p-value below it are unlike anything seen.
            max_error: an error rate of `config.answer_thresholds`: `answers` is False below the
                confidence that it asks for. None always answers.

        Returns:
            One explanation for one picture, else a list.

        Raises:
            ValueError: for a picture that cannot be read, or an error rate without a threshold.
        """
        if (images is None) == (features is None):
            raise ValueError("Expected exactly one of `images` and `features`.")
        is_one = images is not None and not isinstance(images, list | tuple | Tensor)
        if features is None:
            features = features_of(self, [images] if is_one else images)
        found = explain(self, features, sample_ids, level=level, max_error=max_error)
        return found[0] if is_one else found
