"""The package's model: what travels, and in addition it learns, forgets and gives reasons."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core import model as core
from ..core.config import KnnConfig
from ..core.lazy import Lock
from ..core.reading import PUSH_OPTIONS
from ..core.rows import Values
from ..store.backend import RowStore, SearchBackend
from ..store.hub import PushTarget
from ..store.remote import RemoteConsent
from . import backbones, teaching
from .card import publish
from .checkpoint import CheckpointReader, is_damage, write_checkpoint
from .classes import Classes, Label, label_maps
from .contents import Contents
from .explain import Calibration, Explanation, explain
from .memory import Memory
from .pictures import Thumbnails, features_of, thumbnails_of
from .receipts import Receipt, note_of_unanswered
from .stored import lesson_of

_PUSH_OPTIONS = (*PUSH_OPTIONS, "parent_commit", "license", "thumbnails", "endpoint")


class KnnForImageClassification(core.KnnForImageClassification):
    """An image classifier that also remembers.

    A backbone makes features, a head classifies them, a datastore of training features votes by its
    nearest neighbours, and `logits` is the blend of both. With no datastore, or an empty one, the
    model is its head alone.

    Rows in Milvus are changed there at once, for all who ask: a checkpoint that refers to them
    refuses to open until the model is saved over it. The commands (`hf-knn teach`, …) change rows
    and checkpoint as one.

    Attributes:
        image_processor: the image processor that goes with the backbone, or None.
        has_named_head: whether somebody chose the kind of its head; else a training may choose.
        origin: repository and commit that it was opened from or pushed to, or None.
        calibration: how near stored rows lie to one another, for p-values, if that was counted.
    """

    __getattr__ = PreTrainedModel.__getattr__  # there is nothing here that needs the package

    def __init__(self, config: KnnConfig) -> None:
        super().__init__(backbones.complete(config))
        self.once = Lock()
        self.calibration: Calibration | None = None
        self.has_named_head = True  # by the configuration
        self.origin: tuple[str, str] | None = None

    @property
    def memory(self) -> Memory:
        """What the model remembers now, as one value; a change of it is one assignment."""
        classes = Classes.of(self.config)
        kept = self.__dict__.get("_memory") or Memory(self.head, classes)  # while it is made
        return replace(kept, head=self.head, classes=classes)

    @memory.setter
    def memory(self, memory: Memory) -> None:
        if memory.head is not self.head:
            self.head = memory.head
        memory.classes.write(self.config)
        self._memory = memory

    @property  # type: ignore[override]
    def datastore(self) -> RowStore | None:
        """A `Datastore` or another `RowStore`, or None; no device move or cast touches it."""
        return self._memory.rows

    @datastore.setter
    def datastore(self, store: RowStore | None) -> None:
        self._memory = replace(self.memory, rows=store, tally=None)

    @property
    def changes(self) -> list[Receipt]:
        """Receipts of what was taught and forgotten since the training, oldest first; a copy."""
        return list(self._memory.receipts)

    @changes.setter
    def changes(self, receipts: Sequence[Receipt]) -> None:
        self._memory = replace(self._memory, receipts=tuple(receipts))

    @property
    def thumbnails(self) -> Thumbnails | None:
        """Small pictures of stored rows, saved with the model, or None; see `keep_thumbnails`."""
        return self._memory.thumbnails

    @property
    def measured(self) -> dict[str, Any] | None:
        """What was measured on pictures held out: `metrics`, `rows`, `dataset`, …; or None."""
        return self._memory.measured

    @measured.setter
    def measured(self, measured: dict[str, Any] | None) -> None:
        self._memory = replace(self._memory, measured=measured)

    @property
    def neighbor_picture(self) -> bytes | None:
        """A PNG for the model card, if one was asked for; it shows training pictures."""
        return self._memory.picture

    @neighbor_picture.setter
    def neighbor_picture(self, picture: bytes | None) -> None:
        self._memory = replace(self._memory, picture=picture)

    def _counted(self) -> Memory:
        """What is remembered, with sums over the rows, with which later changes go on."""
        with self.once:
            before, counted = self._memory, self.memory.counted(self.config)
            self._memory = counted if self._memory is before else self._memory  # a change stays
            return counted

    @classmethod
    def from_backbone(
        cls,
        backbone: str | Path | PreTrainedModel,
        labels: Sequence[str] | int,
        *,
        pooling: str | None = None,
        head: str | None = None,
        image_processor: Any = None,
        hub_options: dict[str, Any] | None = None,
        **config_values: Any,
    ) -> Self:
        """Puts a new head and no datastore on a pretrained backbone.

        Args:
            backbone: a short name (of `hf-knn backbones`), a Hub id, a local folder, a timm name,
                or a vision model; of a k-NN checkpoint its backbone is taken.
            labels: the class names, or how many classes there are.
            pooling: how the backbone's output becomes a feature; None chooses `cls` where there is
                a CLS token and `mean` elsewhere.
            head: see `KnnConfig`; None and `auto` leave it to the training, and until then to a
                linear one, see `KnnTrainingArguments`. `head_hidden_sizes` name an `mlp`.
            image_processor: None loads the one that comes with the backbone, if there is one.
            hub_options: `revision`, `token`, `cache_dir`, `trust_remote_code`, … for loading.
            config_values: further `KnnConfig` values (`k`, `knn_pooling`, `normalization`, …).

        Raises:
            ValueError: for doubled or empty class names, or a bad configuration value.
        """
        if isinstance(backbone, PreTrainedModel):
            source = backbone
        else:
            options = hub_options or {}
            source, image_processor, name = backbones.open_backbone(
                str(backbone), image_processor, **options
            )
            config_values |= {} if name is None else {"base_model": name}
        if isinstance(source, KnnForImageClassification):
            source = source.backbone
        named = backbones.named_head(head, config_values.get("head_hidden_sizes"))
        config_values |= {} if named is None else {"head": named}
        model = cls(backbones.config_for(source, pooling, **label_maps(labels), **config_values))
        model.has_named_head = named is not None
        nn.Module.to(model, dtype=source.dtype)
        backbones.copy_weights(source, model.backbone)
        model.image_processor = backbones.portable(image_processor)
        return model.eval()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *model_args: Any,
        load_datastore: bool = True,
        allow_stale: bool = False,
        trust_faiss_index: bool = False,
        trust_remote_datastore: bool = False,
        datastore_uri: str | None = None,
        datastore_token: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Opens a checkpoint with its datastore and image processor.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id.
            model_args: see `PreTrainedModel.from_pretrained`.
            load_datastore: False gives the plain classifier.
            allow_stale: True accepts, with a warning, a datastore whose features were made by other
                weights, processor settings or pooling, and files beside it that were changed.
            trust_faiss_index: True says that the files are your own, see `Datastore.load`.
            trust_remote_datastore: True asks the Milvus server that the checkpoint names, if its
                rows lie on one; without consent nobody is asked, and such a checkpoint is refused.
            datastore_uri: consent to this address instead of the one in the checkpoint; None takes
                that of the environment variable `HF_KNN_MILVUS_URI`, if it is set.
            datastore_token: of that server. None takes `MILVUS_TOKEN`, which is only ever sent to
                an address given here or in the environment.
            kwargs: see `PreTrainedModel.from_pretrained`; `revision`, `token`, `cache_dir`,
                `subfolder`, … hold for every file of the checkpoint.

        Raises:
            DatastoreError: for a damaged or incomplete datastore, naming the file.
            StaleDatastoreError: for a datastore of other weights, with both fingerprints.
            DatastoreConnectionError: for a server with the rows that does not answer.
            ValueError: for a server that may not be asked.
        """
        consent = RemoteConsent(trust_remote_datastore, datastore_uri, datastore_token)
        reader = CheckpointReader(pretrained_model_name_or_path, kwargs)
        kwargs["revision"] = reader.revision
        kwargs.setdefault("use_safetensors", True)  # a pickle is never opened
        for attempt in reader.attempts():
            try:
                reader.check_settings()
                if load_datastore:
                    attempt.verify(allow_stale)
                loaded = super().from_pretrained(
                    pretrained_model_name_or_path, *model_args, load_datastore=False, **kwargs
                )
                model = loaded[0] if isinstance(loaded, tuple) else loaded
                model.memory = reader.read_memory(model.memory)
                if reader.commit is not None:
                    model.origin = (reader.name, reader.commit)
                if load_datastore:
                    rows = attempt.read_datastore(model, trust_faiss_index, consent)
                    model.memory = attempt.read_pictures(replace(model.memory, rows=rows))
            except (OSError, ValueError, SafetensorError) as error:
                if attempt.was_replaced():
                    continue
                if is_damage(error) and reader.download_again():
                    kwargs["force_download"] = True
                    continue
                raise
            if not attempt.was_replaced():
                return loaded
        raise AssertionError("unreachable: attempts() ends with an error")

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        keep_replaced: int = False,
        **kwargs: Any,
    ) -> None:
        """Saves all as one version; a kill at any moment leaves the old version or the new one.

        Args:
            save_directory: the folder; other files in it are kept.
            is_main_process: False does nothing: only the main process saves.
            push_to_hub: also push, in one commit; `repo_id` (the folder's name if it is missing),
                `commit_message`, `private`, `token`, `create_pr`, `revision`, `parent_commit`
                and `thumbnails` go to `push_to_hub`.
            keep_replaced: how many versions to keep in `.before/` for `hf-knn undo`; True is 1.
            kwargs: see `PreTrainedModel.save_pretrained`.

        Raises:
            OSError: if something could not be written; the old version is intact.
        """
        if not is_main_process:
            return
        push_options = {name: kwargs.pop(name) for name in _PUSH_OPTIONS if name in kwargs}
        self.config.check()
        save_weights = super(core.KnnForImageClassification, self).save_pretrained
        write_checkpoint(self, Path(save_directory), save_weights, kwargs, keep_replaced)
        if push_to_hub:
            repo_id = push_options.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, **push_options)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        parent_commit: str | None = None,
        license: str | None = None,  # noqa: A002 - what the Hub calls it
        thumbnails: bool = False,
        endpoint: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Pushes weights, processor, datastore, code and card in one commit, without a pickle.

        What is there already is not sent again. The card is made anew; what users wrote stays.

        Args:
            repo_id: `org/name`, or a name in one's own space; made if it is not there.
            commit_message: of the commit.
            commit_description: likewise.
            private: whether a repository that is made is private.
            token: a token, or True for the one that is logged in.
            revision: a branch, made if it is not there.
            create_pr: open a pull request instead.
            parent_commit: where the branch must be. None is where the model was opened from or
                pushed to, if it was this repository; else where it is now.
            license: for the card, such as `apache-2.0`; None keeps what the card says.
            thumbnails: also push the small pictures that the model keeps, for all to see.
            endpoint: also a handler.py for Inference Endpoints; else one of an earlier push goes.
            kwargs: further options of `save_pretrained` (`max_shard_size`, …).

        Returns:
            `huggingface_hub.CommitInfo`.

        Raises:
            PushConflictError: if the branch has moved on; nothing was overwritten.
        """
        if parent_commit is None and self.origin is not None and self.origin[0] == repo_id:
            parent_commit = self.origin[1] if revision is None and not create_pr else None
        target = PushTarget(repo_id, private, token, revision, create_pr, parent_commit).open()
        about = (commit_message or "Upload model", commit_description, license, kwargs)
        commit = publish(self, target, *about, thumbnails=thumbnails, endpoint=endpoint)
        if revision is None and not create_pr:
            self.origin = (target.repo_id, commit.oid)
        return commit

    def keep_thumbnails(self, images: Mapping[int, Any] | None) -> None:
        """Keeps small pictures of stored rows in the model, for everybody who opens it to see.

        They are encoded anew, 192 pixels on the longer side, without metadata, and saved with the
        checkpoint. `forget` removes those of its rows; a push leaves them behind unless it is told.

        Args:
            images: row id to picture (path, file content, PIL image); they join those that are
                kept. None removes all.

        Raises:
            ValueError: for a picture that cannot be read, or an id that is not stored.
        """
        kept = None
        if images is not None:
            made = thumbnails_of(self.datastore, images)
            kept = made if self.thumbnails is None else self.thumbnails.joined(made)
        self._memory = replace(self._memory, thumbnails=kept)

    def fingerprint_rows(self) -> str:
        """A hash of all stored rows and their mean, whatever their order.

        Rows are counted once; copies made afterwards share the count.

        Returns:
            64 hexadecimal digits, as in a receipt.

        Raises:
            ValueError: without a datastore.
        """
        return self._counted().fingerprint

    def teach(
        self, images: Any = None, labels: Sequence[Label] = (), *,
        features: Tensor | None = None, contents: Tensor | None = None,
        ids: Values | None = None, paths: Sequence[str] | None = None,
        again: bool = False, relabel: bool = False,
    ) -> Receipt:  # fmt: skip
        """Adds labelled pictures to the datastore; no training, all or none.

        Pictures that are stored already (the same pixels, or the same features bit for bit) are
        left out where their label is the same, and refused where it is another one.

        The next answer knows them. A head in closed form is updated exactly, to what a fit of all
        rows with the same regulariser gives; other heads stay. Until the blend is tuned again, new
        classes keep the whole probability that the neighbours give them, see `blend_log_probs`. A
        model that keeps thumbnails keeps those of taught pictures too.

        Args:
            images: M pictures (paths, file contents, PIL images, arrays) or pixel values
                [M, 3, H, W].
            labels: M names or numbers of classes; a name that is new makes a class.
            features: [M, D] instead of images, as in `pooler_output`; all of them are added.
            contents: [M, 16] uint8, `ImageFeatures.contents` of the features: those are pictures.
            ids: [M] ids that the datastore does not have; None continues after the largest.
            paths: where each picture lies, relative to its dataset.
            again: add pictures that are stored with their label once more.
            relabel: give stored pictures that come with another label that one, and add the rest.

        Returns:
            The receipt, also kept in `changes` unless all pictures are stored already.

        Raises:
            ValueError: for pictures, labels or ids that cannot be used; nothing is changed.
        """
        lesson, names = lesson_of(self, images, labels, features, contents, ids, paths)
        if (again or relabel) and names is None:
            raise ValueError("Expected pictures, or `contents`, with `again` or `relabel`.")
        known = self._counted()
        self.memory, receipt = teaching.teach(known, self.config, lesson, names, again, relabel)
        if receipt.ids or not receipt.skipped:
            self._memory = self._memory.remarked(note_of_unanswered(self, lesson.features, receipt))
            receipt = self._memory.receipts[-1]
        return receipt

    def forget(
        self, ids: Values | None = None, *, label: Label | None = None, recenter: bool = False
    ) -> Receipt:
        """Removes rows from the datastore, all or none; the next save holds no byte of them.

        A head in closed form is what it would be had it never seen them, but for their part in mean
        and principal axes; other heads keep what they learned.

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
        known = self._counted()
        self.memory = teaching.forget(known, self.config, ids, label=label, recenter=recenter)
        return self._memory.receipts[-1]

    def relabel(self, ids: Values, labels: Sequence[Label]) -> Receipt:
        """Gives rows other labels, all or none; a head in closed form follows.

        Args:
            ids: [M] of the rows.
            labels: M names or numbers of classes; a name that is new makes a class.

        Raises:
            ValueError: for ids that are not there, or bad labels; nothing is changed.
        """
        self.memory = teaching.relabel(self._counted(), self.config, ids, labels)
        return self._memory.receipts[-1]

    def merge(
        self, other: SearchBackend, class_names: Sequence[str] | None = None,
        contents: Contents | None = None,
    ) -> Receipt:  # fmt: skip
        """Adds the rows of another datastore of the same backbone, all or none.

        Args:
            other: the rows; ids that exist here are numbered anew.
            class_names: what its label numbers mean; None is what they mean here.
            contents: prints of its pictures, as `memory.contents` of its model; None knows none.

        Raises:
            ValueError: for another backbone, width, metric or normalisation; nothing is changed.
        """
        self.memory = teaching.merge(self._counted(), self.config, other, class_names, contents)
        return self._memory.receipts[-1]

    def undo(self) -> Receipt:
        """Takes the last change back, also one from before the model was saved.

        Raises:
            ValueError: if there is none, or if its rows were forgotten for good: by a save.
        """
        self.memory = teaching.undo(self._counted(), self.config)
        return self._memory.receipts[-1]

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

    def train(self, mode: bool = True) -> Self:
        """Sets the mode; batch norms that are frozen keep their statistics in any case.

        Args:
            mode: True for training.
        """
        super().train(mode)
        backbones.freeze_statistics(self.backbone)
        return self
