"""Rows of a dataset to a batch of tensors."""

from typing import Any

import torch
from torch import Tensor

from .augmentation import Augment
from .reading import LABEL, SAMPLE_ID, process_rows


class KnnCollator:
    """Makes batches of rows of pictures, or of rows of features.

    Args:
        processor: the image processor.
        on_bad_image: `fail` or `skip` at pictures that cannot be decoded.
        augment: what training pictures go through, or None; rows then know their `epoch`.
    """

    def __init__(
        self, processor: Any, on_bad_image: str = "fail", augment: Augment | None = None
    ) -> None:
        self.processor, self.on_bad_image, self.augment = processor, on_bad_image, augment

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Rows to `features` or `pixel_values`, `labels`, `sample_ids` and maybe `knn_log_probs`.

        Raises:
            ValueError: at a picture that cannot be decoded, or a batch without any.
        """
        if "features" in rows[0]:
            return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        pixel_values, good, bad = process_rows(rows, self.processor, self.augment)
        if bad and (self.on_bad_image == "fail" or not good):
            raise ValueError(
                f"Expected pictures that can be decoded, but {bad[0].path or 'a picture'} "
                f"(sample id {bad[0].sample_id}) cannot: {bad[0].reason}; repair or remove it, or "
                "pass on_bad_image='skip'."
            )
        labels = torch.tensor([rows[i][LABEL] for i in good])
        sample_ids = torch.tensor([rows[i][SAMPLE_ID] for i in good])
        assert pixel_values is not None
        return {"pixel_values": pixel_values, "labels": labels, "sample_ids": sample_ids}
