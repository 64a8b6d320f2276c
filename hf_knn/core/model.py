"""The model: a vision backbone, a head and a datastore, with both voices blended."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import ModelOutput

from .search import Neighbors


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
