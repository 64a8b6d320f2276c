"""A study of made-up features around four centres, without pictures and a backbone."""

from types import SimpleNamespace

import numpy as np
import torch

from catalog.splits import TEST, TRAIN
from study.phases import Phases
from study.pool import Pool, Rows
from study.study import Study

CLASSES, TRAINING, TESTED = 4, 64, 200


def study_of(
    spread: float, *, shuffle_test: bool = False, shuffle_train: bool = False, size: float = 1.0
) -> Study:
    """Features around four centres; labels dealt out anew where asked."""
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.eye(CLASSES, 16)
    labels = torch.arange(TRAINING + TESTED) % CLASSES
    features = (centres[labels] + spread * torch.randn(len(labels), 16, generator=generator)).relu()
    for part, dealt in ((slice(0, TRAINING), shuffle_train), (slice(TRAINING, None), shuffle_test)):
        if dealt:
            own = labels[part]
            labels[part] = own[torch.randperm(len(own), generator=generator)]
    features = size * features
    roles = np.repeat(np.array([TRAIN, TEST], np.int8), [TRAINING, TESTED])
    loaded = SimpleNamespace(label_names=list("abcd"))
    backbone = SimpleNamespace(is_scratch=False, phases=Phases())
    return Study(loaded, backbone, Pool(Rows(features, features, labels), None, roles))  # type: ignore[arg-type]
