"""The model: a vision backbone, a head and a datastore, with both voices blended."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, ModelOutput
from transformers.utils import IMAGE_PROCESSOR_NAME

from .backbone import KnnHead, build_backbone, extract, split_features
from .config import KnnConfig
from .frozen import FrozenDatastore
from .reading import (
    PUSH_OPTIONS,
    HubFiles,
    bind_again,
    read_datastore,
    refuse_other_rows,
    warn_of_dtype,
)
from .search import Neighbors
from .votes import blend_log_probs, floor_log_probs, knn_log_probs, soften

_METHODS = (
    "teach", "forget", "relabel", "merge", "undo", "explain", "keep_thumbnails", "fingerprint_rows",
)  # fmt: skip
_OPTIONS = ("trust_faiss_index", "trust_remote_datastore", "datastore_uri", "datastore_token")
"""Of the package's class, which are missed with a sentence."""

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
