"""The few statistics a benchmark needs: intervals for shares, paired differences, spreads of ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

Z = 1.959964  # two-sided 95 %


@dataclass(frozen=True)
class Interval:
    """A value with its low and high end."""

    value: float
    low: float
    high: float


def share(hits: np.ndarray) -> Interval:
    """A share and its 95 % interval (Wilson's score interval, 1927). hits: (N,) bool.

    Raises   ValueError for no observations.

    >>> share(np.array([True] * 9 + [False]))
    Interval(value=0.9, low=0.59584..., high=0.98212...)
    """
    n, p = _count(hits), float(np.mean(hits))
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * (p * (1 - p) / n + Z * Z / (4 * n * n)) ** 0.5
    return Interval(p, min(middle - half, p), max(middle + half, p))  # at 0 and 1 the ends meet, but for rounding


def paired_difference(hits: np.ndarray, reference: np.ndarray, *, among: int = 1) -> Interval:
    """share(hits) - share(reference) on the same items, with a 95 % interval. hits, reference: (N,) bool.

    among: how many such intervals are to hold at once with 95 % (Bonferroni): what the best of many needs.

    Only items the two disagree on carry information, so the interval is far narrower than that of two independent
    shares. Bonett and Price (2012): Wald's interval after one imagined item was added to either kind of
    disagreement, which keeps it honest where few or none were seen.
    Raises   ValueError where the two are not about the same items.
    """
    if hits.shape != reference.shape:
        raise ValueError(f"a paired difference needs the same items, got {hits.shape} and {reference.shape}")
    n, z = _count(hits), Z if among == 1 else NormalDist().inv_cdf(1 - 0.025 / among)
    gained, lost = int(np.sum(hits & ~reference)), int(np.sum(reference & ~hits))
    a, b = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = z * ((a + b - (a - b) ** 2) / (n + 2)) ** 0.5
    return Interval((gained - lost) / n, a - b - half, a - b + half)


def ratios(numerator: list[float], denominator: list[float]) -> Interval:
    """The median of pairwise ratios and their quartiles: what interleaved timings say about a speed-up.

    >>> ratios([2.0, 3.0, 4.2], [1.0, 1.0, 1.0])
    Interval(value=3.0, low=2.5, high=3.6)
    """
    r = np.asarray(numerator) / np.asarray(denominator)
    low, middle, high = np.quantile(r, (0.25, 0.5, 0.75)).tolist()
    return Interval(middle, low, high)


def mean(values: Sequence[float] | np.ndarray, *, draws: int = 2000, seed: int = 0) -> Interval:
    """A mean and its 95 % percentile bootstrap interval over the items. values: (N,).

    Raises   ValueError for no observations.

    >>> mean([2.0, 2.0, 2.0])
    Interval(value=2.0, low=2.0, high=2.0)
    """
    x = np.asarray(values, float)
    n = _count(x)
    drawn = x[np.random.default_rng(seed).integers(n, size=(draws, n))].mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
    return Interval(float(x.mean()), low, high)


def clustered(
    values: Sequence[float] | np.ndarray, group: Sequence[int], *, draws: int = 4000, seed: int = 0
) -> Interval:
    """A mean and its 95 % percentile bootstrap interval where items of one group depend on each other: groups are
    drawn, with all their items. values: (N,); group: (N,), equal numbers belong together.

    Raises   ValueError for no observations, or values and groups of different lengths.

    >>> clustered([1.0, 1.0, 0.0, 0.0], [0, 0, 1, 1])
    Interval(value=0.5, low=0.0, high=1.0)
    """
    x, (_, where) = np.asarray(values, float), np.unique(np.asarray(group), return_inverse=True)
    _count(x)
    if x.shape != where.shape:
        raise ValueError(f"{x.size} values and {where.size} groups: give each value its group")
    total, size = np.bincount(where, x), np.bincount(where)
    drawn = np.random.default_rng(seed).integers(len(size), size=(draws, len(size)))
    low, high = np.quantile(total[drawn].sum(1) / size[drawn].sum(1), (0.025, 0.975)).tolist()
    return Interval(float(x.mean()), low, high)


def agreement(logits: Tensor, reference: Tensor) -> float:
    """Share of items whose best class is the reference's. logits, reference: (N, classes)."""
    return (logits.argmax(-1) == reference.argmax(-1)).double().mean().item()


def kl(reference: Tensor, logits: Tensor) -> float:
    """KL(reference || logits) of the class probabilities, in nats, averaged over items. Both (N, classes)."""
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return max((p.exp() * (p - q)).sum(-1).mean().item(), 0.0)


def movement(features: Tensor, reference: Tensor) -> float:
    """How far features moved: 1 - cosine, averaged over items. Both (N, C)."""
    cosine = torch.nn.functional.cosine_similarity(features.double(), reference.double(), dim=-1)
    return max((1 - cosine).mean().item(), 0.0)


def pack_hits(hits: np.ndarray) -> str:
    """Booleans as hexadecimal text, eight to two characters."""
    return np.packbits(hits).tobytes().hex()


def unpack_hits(packed: str, n: int) -> np.ndarray:
    """The first n booleans of `pack_hits`.

    >>> unpack_hits(pack_hits(np.array([True, False, True])), 3).tolist()
    [True, False, True]
    """
    return np.unpackbits(np.frombuffer(bytes.fromhex(packed), np.uint8))[:n].astype(bool)


def _count(hits: np.ndarray) -> int:
    if hits.size == 0:
        raise ValueError("no observations: a share of nothing has no interval")
    return int(hits.size)
