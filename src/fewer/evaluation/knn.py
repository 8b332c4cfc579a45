"""How well frozen features group by class, without training anything."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def knn_accuracy(features: Tensor, labels: Tensor, k: int = 3) -> float:
    """Leave-one-out k-nearest-neighbour accuracy by cosine similarity, in [0, 1]: the mean of `knn_hits`."""
    return knn_hits(features, labels, k).double().mean().item()


def knn_hits(features: Tensor, labels: Tensor, k: int = 3) -> Tensor:
    """Which rows their nearest neighbours classify rightly. Returns (N,) bool.

    features: (N, D), any floating type. labels: (N,) integers. k: neighbours that vote, at most N - 1.
    Each row is classified by the other N - 1: most votes win, and among equals the larger summed similarity
    (then the lower label). A row of zeros is equally far from everything.
    Raises ValueError if the shapes or k do not fit, or a feature is not finite.
    """
    n = len(labels)
    if features.ndim != 2 or len(features) != n:
        raise ValueError(f"k-NN takes features (N, D) and labels (N,), not {tuple(features.shape)} and ({n},)")
    if not 1 <= k <= n - 1:
        raise ValueError(f"k-NN with k={k}: {n} rows leave {n - 1} neighbours; k must lie in 1..{n - 1}")
    if not features.isfinite().all():
        raise ValueError("k-NN: the features hold inf or nan; use float32, or a model that does not overflow")
    unit = F.normalize(features.double(), dim=1)
    similarity = unit @ unit.T
    similarity.fill_diagonal_(-torch.inf)
    closeness, neighbours = similarity.topk(k, dim=1)
    kinds, known = labels.unique(return_inverse=True)
    ballots = F.one_hot(known[neighbours], len(kinds)).double()  # (N, k, classes)
    tie_break = (ballots * closeness[..., None]).sum(dim=1) / (2 * k + 1)  # under half a vote
    votes = ballots.sum(dim=1) + tie_break
    return votes.argmax(dim=1) == known
