"""What each rotary pair adds to an attention logit, and which pairs are too slow to tell near from far.

A rotary embedding turns the channels of a head in pairs; pair j turns by theta_j a token, and theta_j falls with j.
The logit of query m and key n is a sum over the pairs, c_j = |q_j| |k_j| cos(phi_j + (m - n) theta_j), q_j and k_j the
two-channel parts and phi_j the angle from k_j to q_j before the rotation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .attention import Seen
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


def gain(distance: Tensor, frequencies: Tensor) -> Tensor:
    """What rotation alone makes of the logit of an all-ones query and an all-ones key, 1 / sqrt(d) applied.

    distance: (...), tokens between the two; frequencies: (d / 2,) radians per token. Returns (...), float32:
    b(delta) = 2 / sqrt(d) times the sum of cos(delta theta_i); sqrt(d) at distance 0, falling, and at last around zero.
    Source   the correction of SparseVLM's second version, after Hong et al., EMNLP Findings 2024.
    """
    angle = distance.float()[..., None] * frequencies.float()
    return angle.cos().sum(-1) * 2 / math.sqrt(2 * frequencies.shape[-1])


def gain_between(queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor]) -> Tensor:
    """The same gain from the tables that rotated queries and keys, whatever turned them (sections, scaled frequencies).

    Shapes   (cos, sin) of the queries, (..., Q, d) each, and of the keys, (..., S, d). Returns (..., Q, S), float32.
    A factor that the model multiplies its tables with cancels out.
    """
    (qc, qs), (kc, ks) = (tuple(t.float() for t in pair) for pair in (queries, keys))
    product = qc @ kc.transpose(-1, -2) + qs @ ks.transpose(-1, -2)
    size = torch.sqrt(
        (qc.square() + qs.square()).mean(-1)[..., None] * (kc.square() + ks.square()).mean(-1)[..., None, :]
    )
    return product / size.clamp_min(1e-12) / math.sqrt(qc.shape[-1])


def unrotated(seen: Seen, cos: Tensor, sin: Tensor) -> Seen:
    """An attention call as it would be without rotary positions; masks stay.

    cos, sin: (B or 1, S, d), the tables that rotated queries and keys; half-split layout. A factor in the tables that
    stretches the vectors is taken out too.
    """
    c, s = cos.float()[:, None], sin.float()[:, None]
    size = (c.square() + s.square()).clamp_min(1e-12)

    def back(x: Tensor) -> Tensor:
        x = x.float()
        a, b = x.chunk(2, dim=-1)
        return (x * c + torch.cat([b, -a], -1) * s) / size

    return replace(seen, q=back(seen.q), k=back(seen.k))


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of one layer: x -> rotation of x by its position times the frequencies, half-split layout.

    frequencies: (d / 2,) float32, radians per position; scale: what the model multiplies rotated vectors with.
    """

    frequencies: Tensor
    scale: float = 1.0
    _steps: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def tables(self, at: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine as a model hands them to its attention. at: (B, N) positions. Returns (B, N, d) each."""
        angle = at.float()[..., None] * self.frequencies
        angle = torch.cat([angle, angle], -1)
        return (angle.cos() * self.scale).to(dtype), (angle.sin() * self.scale).to(dtype)

    def turn(self, x: Tensor, by: Tensor) -> Tensor:
        """x rotated by `by` positions (negative turns back), in float32, x's dtype. x: (..., S, d), by: (..., S)."""
        return self.turn_by(x, *self.angles(by))

    def angles(self, by: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of a rotation by so many positions, each (..., S, d / 2), float32."""
        angle = by.float()[..., None] * self.frequencies
        return angle.cos(), angle.sin()

    def step(self, by: int) -> tuple[Tensor, Tensor]:
        """The same where all rows are turned alike, (d / 2,) each; kept until another number is asked for: a cache that
        gives up a row for each new one asks for one position again and again."""
        if by not in self._steps:
            self._steps.clear()
            self._steps[by] = self.angles(torch.tensor(by, device=self.frequencies.device))
        return self._steps[by]

    @staticmethod
    def turn_by(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`turn` by angles that are known."""
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)], -1).to(x.dtype)
