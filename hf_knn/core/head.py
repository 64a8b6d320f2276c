"""The classifier beside the datastore."""

from collections.abc import Sequence

import torch
import transformers.initialization as init
from torch import Tensor, nn
from torch.nn import functional

from .config import Head, KnnConfig, Normalization

_SMALLEST_LENGTH = 1e-30


class KnnHead(nn.Module):
    """A classifier on standardised features: linear, or with hidden layers.

    Args:
        dim: width of a feature.
        num_labels: number of classes.
        hidden_sizes: widths of hidden layers, each followed by a ReLU.
        unit_length: scale each feature to length 1, as a datastore does (closed-form heads).
    """

    def __init__(
        self,
        dim: int,
        num_labels: int,
        hidden_sizes: Sequence[int] = (),
        unit_length: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))
        self.unit_length = unit_length
        widths = [dim, *hidden_sizes]
        pairs = zip(widths, hidden_sizes, strict=False)
        self.hidden = nn.ModuleList(nn.Linear(width, out) for width, out in pairs)
        self.classifier = nn.Linear(widths[-1], num_labels)

    mean: Tensor
    scale: Tensor

    @classmethod
    def from_config(cls, config: KnnConfig) -> "KnnHead":
        """The head that a configuration asks for, with new weights."""
        is_ridge = config.head == Head.RIDGE
        return cls(
            config.feature_dim,
            config.head_classes,
            config.head_hidden_sizes if config.head == Head.MLP else (),
            unit_length=is_ridge and config.normalization != Normalization.NONE,
        )

    def standardize(self, features: Tensor) -> None:
        """Fixes what is subtracted and divided, so that learning rates mean the same everywhere.

        Args:
            features: [N, D] training features.
        """
        mean = features.double().mean(dim=0)
        deviation = (features.double() - mean).pow(2).mean().sqrt()
        self.mean.copy_(mean)
        self.scale.copy_(deviation if deviation > 0 else torch.ones(()))

    def prepared(self, features: Tensor) -> Tensor:
        """[B, D] features as the first layer sees them."""
        rows = (features - self.mean.to(features.dtype)) / self.scale.to(features.dtype)
        return (
            functional.normalize(rows, dim=-1, eps=_SMALLEST_LENGTH) if self.unit_length else rows
        )

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C_head] logits."""
        rows = self.prepared(features)
        for layer in self.hidden:
            rows = functional.relu(layer(rows))
        return self.classifier(rows)

    def soften(self, temperature: float) -> None:
        """Divides the logits by a temperature, for good.

        Args:
            temperature: > 0.
        """
        with torch.no_grad():
            self.classifier.weight.div_(temperature)
            self.classifier.bias.div_(temperature)

    def reset(self) -> None:
        """New buffers; called by the model when it initialises weights."""
        init.zeros_(self.mean)
        init.ones_(self.scale)
