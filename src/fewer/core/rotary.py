"""What each rotary pair adds to an attention logit, and which pairs are too slow to tell near from far.

A rotary embedding turns the channels of a head in pairs; pair j turns by theta_j a token, and theta_j falls with j.
The logit of query m and key n is a sum over the pairs, c_j = |q_j| |k_j| cos(phi_j + (m - n) theta_j), q_j and k_j the
two-channel parts and phi_j the angle from k_j to q_j before the rotation.
"""

from __future__ import annotations

import math

from torch import Tensor

from .plan import PlanError


def pair_logits(q: Tensor, k: Tensor, scale: float = 1.0) -> Tensor:
    """Contribution of each rotary pair to the logits of (query, key) pairs; the sum over the last axis is the logit.

    Shapes   q, k: (..., d), *after* the rotation, broadcastable; half-split layout: pair j is the channels j and
             j + d / 2. Returns (..., d / 2), float32. Positions and frequencies are inside the rotated vectors
             already, and so are query and key norms and scaled frequencies: the identity holds for all of them.
    scale    the factor on q k^T.
    Raises   PlanError for channels that cannot be split into pairs.
    Source   Token distance modelling, Hong et al., EMNLP Findings 2024, the sum the paper starts from.
    """
    if q.shape[-1] != k.shape[-1] or q.shape[-1] % 2:
        raise PlanError(f"q has {q.shape[-1]} channels, k {k.shape[-1]}; a rotary head has an even number, both alike")
    return (q.float() * k.float()).unflatten(-1, (2, -1)).sum(-2) * scale


def slow_pairs(frequencies: Tensor, length: int) -> Tensor:
    """(d / 2,) bool: pairs that do not come around once within `length` tokens, so that distance shows in their angle.

    frequencies: (d / 2,) radians per token, as the layer really uses them (scaled ones for NTK, YaRN and the like).
    """
    return frequencies * length < 2 * math.pi
