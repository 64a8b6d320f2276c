"""Numbers of the caller's own."""

from typing import Any

from torch import Tensor
from transformers import Trainer
from transformers.trainer_pt_utils import nested_numpify
from transformers.trainer_utils import EvalPrediction, denumpify_detensorize


def own_metrics(trainer: Trainer, logits: Tensor, labels: Tensor, prefix: str) -> dict[str, float]:
    """What the caller's `compute_metrics` says of the blend.

    Args:
        trainer: that has it, or has none.
        logits: [N, C] of the blend.
        labels: [N] int64.
        prefix: of the names.
    """
    compute: Any = trainer.compute_metrics
    if compute is None:
        return {}
    if trainer.preprocess_logits_for_metrics is not None:
        logits = trainer.preprocess_logits_for_metrics(logits, labels)
    asked: Any = (logits, labels)
    if trainer.args.batch_eval_metrics:  # all rows are the last batch
        own = compute(EvalPrediction(*asked), compute_result=True)
    else:
        own = compute(EvalPrediction(*nested_numpify(asked)))
    own = denumpify_detensorize(own)
    return {n if n.startswith(f"{prefix}_") else f"{prefix}_{n}": own[n] for n in own}
