"""Factors of the loss per row against those of `functional`."""

import torch
from support.probe_rows import clusters, votes

from hf_knn.fit.grids import ProbeConfig, ProbeSettings
from hf_knn.fit.weights import focal_loss_weights, knn_loss_weights, loss_factors


def test_factors_are_those_of_functional() -> None:
    _, labels = clusters()
    log_probs = votes(labels)
    column, only = log_probs.unsqueeze(1), torch.zeros_like(labels)
    for normalize in ("none", "mean"):
        settings = ProbeSettings(knn_loss_normalize=normalize, knn_loss_clamp=7.0)
        found = loss_factors(log_probs, ProbeConfig(1.0, alpha=0.2), settings)
        wanted = knn_loss_weights(column, only, 0.2, 7.0, normalize=normalize)
        assert torch.equal(found, wanted)
    found = loss_factors(log_probs, ProbeConfig(1.0, gamma=2.0), ProbeSettings())
    assert torch.equal(found, focal_loss_weights(column, only, 2.0))
    # nothing is surprising: the mean is 0 and all rows are alike
    certain, settings = torch.zeros(5), ProbeSettings(knn_loss_normalize="mean")
    assert loss_factors(certain, ProbeConfig(1.0, gamma=1.0), settings).tolist() == [1] * 5
