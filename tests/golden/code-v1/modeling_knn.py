"""The model: a vision backbone, a head and a datastore, with both voices blended."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, ModelOutput

from .backbone import (
    build_backbone,
    default_pooling,
    detached_config,
    extract,
    freeze_statistics,
    load_backbone,
    measure_width,
    split_features,
)
from .checkpoint import CheckpointReader, write_checkpoint
from .configuration_knn import KnnConfig
from .datastore_reference import RemoteConsent
from .functional import blend_log_probs, floor_log_probs, knn_log_probs, soften
from .heads import KnnHead
from .manifest import DatastoreError
from .model_card import draw_reliability, make_card
from .processors import load_processor, portable
from .publishing import CARD_NAME, PushTarget
from .remembering import Remembering
from .search_backend import Neighbors, SearchBackend

_PUSH_OPTIONS = (
    "repo_id", "commit_message", "commit_description", "private", "token", "create_pr", "revision",
    "parent_commit", "license",
)  # fmt: skip


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


class KnnForImageClassification(Remembering, PreTrainedModel):
    """An image classifier that also remembers.

    A backbone makes features, a head classifies them, a datastore of training features votes by its
    nearest neighbours, and `logits` is the blend of both. With no datastore, or an empty one, the
    model is its head alone.

    Attributes:
        datastore: a `Datastore` or another `SearchBackend`, or None; a plain attribute that no
            device move, cast or distributed wrapper touches.
        image_processor: the image processor that goes with the backbone, or None.
        measured: what was measured on pictures held out, which the model card is made from:
            `metrics` (`eval_…`), `rows`, and `dataset`, `split`, `note` where known; or None.
        neighbor_picture: a PNG for the model card, if one was asked for; it shows training
            pictures.
        changes: receipts of what was taught and forgotten since the training, oldest first.
        origin: repository and commit that it was opened from or pushed to, or None.
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
        self.datastore: SearchBackend | None = None
        self.image_processor: Any = None
        self.measured: dict[str, Any] | None = None
        self.neighbor_picture: bytes | None = None
        self.origin: tuple[str, str] | None = None
        self.start_remembering()
        self.post_init()

    @classmethod
    def from_backbone(
        cls,
        backbone: str | Path | PreTrainedModel,
        labels: Sequence[str] | int,
        *,
        pooling: str | None = None,
        image_processor: Any = None,
        hub_options: dict[str, Any] | None = None,
        **config_values: Any,
    ) -> Self:
        """Puts a new head and no datastore on a pretrained backbone.

        Args:
            backbone: a Hub id, a local folder, the name of a timm model, or a vision model; of a
                k-NN checkpoint its backbone is taken.
            labels: the class names, or how many classes there are.
            pooling: how the backbone's output becomes a feature; None chooses `cls` where there is
                a CLS token and `mean` elsewhere.
            image_processor: None loads the one that comes with the backbone, if there is one.
            hub_options: `revision`, `token`, `cache_dir`, `trust_remote_code`, … for loading.
            config_values: further `KnnConfig` values (`k`, `knn_pooling`, `normalization`, …).

        Raises:
            ValueError: for doubled or empty class names, or a bad configuration value.
        """
        options = hub_options or {}
        source = backbone
        if not isinstance(backbone, PreTrainedModel):
            name = str(backbone)
            if "/" not in name and not Path(name).exists():
                name = f"timm/{name}"
            source = load_backbone(name, **options)
            if image_processor is None:
                image_processor = load_processor(name, source.config, **options)
            if not Path(name).exists():
                config_values["base_model"] = name
        if isinstance(source, KnnForImageClassification):
            source = source.backbone
        assert isinstance(source, PreTrainedModel)
        backbone_config = detached_config(source.config)
        pooling = pooling or default_pooling(source)
        knn_pooling = config_values.get("knn_pooling")
        config = KnnConfig(
            backbone_config=backbone_config,
            feature_dim=measure_width(source, pooling),
            knn_feature_dim=None if knn_pooling is None else measure_width(source, knn_pooling),
            pooling=pooling,
            **_label_maps(labels),
            **config_values,
        )
        model = cls(config)
        nn.Module.to(model, dtype=source.dtype)
        _copy_weights(source, model.backbone)
        model.image_processor = portable(image_processor)
        return model.eval()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
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
            trust_faiss_index: True lets faiss parse `datastore.faiss`, see `Datastore.load`; for
                files of your own only.
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
                if load_datastore:
                    attempt.verify(allow_stale)
                loaded = super().from_pretrained(
                    pretrained_model_name_or_path, *model_args, **kwargs
                )
                model = loaded[0] if isinstance(loaded, tuple) else loaded
                model.image_processor = reader.read_processor()
                model.measured = reader.read_measured()
                model.changes = reader.read_changes()
                model.neighbor_picture = reader.read_neighbor_picture()
                if reader.commit is not None:
                    model.origin = (reader.name, reader.commit)
                if load_datastore:
                    model.thumbnails = attempt.read_thumbnails()
                    model.datastore = attempt.read_datastore(model, trust_faiss_index, consent)
            except (OSError, ValueError, SafetensorError) as error:
                if attempt.was_replaced():
                    continue
                if _is_damage(error) and reader.download_again():
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
        **kwargs: Any,
    ) -> None:
        """Saves weights, configuration, processor, datastore and code as one version.

        The folder is built beside and put in place in one step: a kill at any moment leaves the old
        version or the new one.

        Args:
            save_directory: the folder; other files in it are kept.
            is_main_process: False does nothing: only the main process saves.
            push_to_hub: also push, in one commit; `repo_id` (the folder's name if it is missing),
                `commit_message`, `private`, `token`, `create_pr`, `revision` and `parent_commit`
                go to `push_to_hub`.
            kwargs: see `PreTrainedModel.save_pretrained`.

        Raises:
            OSError: if something could not be written; the old version is intact.
        """
        if not is_main_process:
            return
        push_options = {name: kwargs.pop(name) for name in _PUSH_OPTIONS if name in kwargs}
        self.config.check()
        write_checkpoint(self, Path(save_directory), super().save_pretrained, kwargs)
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
        **kwargs: Any,
    ) -> Any:
        """Pushes weights, processor, datastore, code and card in one commit, without a pickle.

        What the repository has already is not sent again. The card is made anew from what was
        measured; what users wrote around it stays.

        Args:
            repo_id: `org/name`, or a name in one's own space; made if it is not there.
            commit_message: of the commit.
            commit_description: of the commit.
            private: whether a repository that is made is private.
            token: a token, or True for the one that is logged in.
            revision: a branch, made if it is not there.
            create_pr: open a pull request instead.
            parent_commit: the commit that the branch must be at. None is the one that the model
                was opened from or pushed as, if it was this repository; else where it is now.
            license: for the card, such as `apache-2.0`; None keeps what the card says.
            kwargs: further options of `save_pretrained` (`max_shard_size`, …).

        Returns:
            `huggingface_hub.CommitInfo`.

        Raises:
            PushConflictError: if the branch has moved on; nothing was overwritten.
        """
        if parent_commit is None and self.origin is not None and self.origin[0] == repo_id:
            parent_commit = self.origin[1] if revision is None and not create_pr else None
        target = PushTarget(repo_id, private, token, revision, create_pr, parent_commit).open()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            self.save_pretrained(folder, **kwargs)
            draw_reliability(self, folder)
            card = make_card(self, target.repo_id, target.read_card(), folder, license)
            (folder / CARD_NAME).write_text(card, encoding="utf-8")
            commit = target.push(folder, commit_message or "Upload model", commit_description)
        if revision is None and not create_pr:
            self.origin = (target.repo_id, commit.oid)
        return commit

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

    def train(self, mode: bool = True) -> Self:
        """Sets the mode; batch norms that are frozen keep their statistics in any case.

        Args:
            mode: True for training.
        """
        super().train(mode)
        freeze_statistics(self.backbone)
        return self

    def weigh(
        self, features: Tensor, neighbors: Neighbors | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the head says, what the neighbours vote, and the blend of both.

        Args:
            features: [B, D] the part of the features that the head sees.
            neighbors: [B, k'] the rows that vote; None asks the head alone.

        Returns:
            `logits`, `head_logits` and `knn_log_probs` of `KnnImageClassifierOutput`.
        """
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

    def _find_neighbors(self, features: Tensor, sample_ids: Tensor | None) -> Neighbors | None:
        if self.datastore is None or len(self.datastore) == 0:
            return None
        return self.datastore.search(features.float(), self.config.k, sample_ids)

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


def _is_damage(error: Exception) -> bool:
    """Whether a file was not what it should be, rather than refused for what it says."""
    return isinstance(error, DatastoreError | SafetensorError) or isinstance(
        error.__context__, JSONDecodeError | UnicodeDecodeError
    )


def _label_maps(labels: Sequence[str] | int) -> dict[str, Any]:
    if isinstance(labels, str):
        raise ValueError(f"Expected `labels` to be a list of names, but got the text {labels!r}.")
    names = [f"LABEL_{i}" for i in range(labels)] if isinstance(labels, int) else list(labels)
    if not names:
        raise ValueError("Expected `labels` to name at least one class, but got none.")
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError("Expected `labels` to be names, but got an empty one or a number.")
    doubled = sorted(name for name, count in Counter(names).items() if count > 1)
    if doubled:
        raise ValueError(f"Expected `labels` to be unique, but got some twice: {doubled[:10]}.")
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _copy_weights(source: PreTrainedModel, target: PreTrainedModel) -> None:
    report = target.load_state_dict(source.state_dict(), strict=False)
    unexpected = [key for key in report.unexpected_keys if "pooler" not in key]
    if report.missing_keys or unexpected:
        raise ValueError(
            f"Expected the backbone's weights to fit {type(target).__name__}, but "
            f"{report.missing_keys[:5]} are missing and {unexpected[:5]} are too many."
        )
