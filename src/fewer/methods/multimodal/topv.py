"""TopV, token pruning by optimal transport (Yang et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fewer.core import Budget, Capacity, Plan, PlanError, Signals, Site, Tokens, VisualReducer, reducer, select
from fewer.core.match import unit
from fewer.core.transport import sinkhorn

EQUAL = 2.0**-20  # costs, which lie in [0, 1], that differ by less are rounding noise: the earlier token goes first


@reducer("topv", paper="arXiv:2503.18278", acts="prune", on="multimodal", training="free")
@dataclass(frozen=True)
class TopV(VisualReducer):
    """Visual tokens that one block of the language model moves at little cost stay (TopV, CVPR 2025).

    An image's tokens as they enter a block are transported to its tokens as they leave it, all of the same mass. What
    it costs to take token i to token j is the mean of 1 - cosine of their features (halved), the distance of their
    cells and the distance of i to the centre of its image or tile, each from 0 to 1. A token is important if what it
    sends goes cheaply. Of the tokens that lose, an evenly spaced part comes back, so that no region goes dark.

    budget: how many stay, per image. layer: the block across which tokens are compared; those behind it see few tokens.
    recover: share of the budget that comes back by place. feature, distance, centre: weights of the three costs.
    blur: weight of the transport's entropy. iterations: of Sinkhorn's algorithm.

    A reconstruction: no code is public and the text leaves the weights, the blur, the share that comes back and what a
    token's contribution is open. The row sums of a plan with even masses are all the same and rank nothing; ours is the
    cost saved, sum_j P_ij (max C - C_ij). Memory is quadratic: some six matrices of N x N floats, 33 MB each at 2,880.
    Other frames and tiles count as farthest away.
    """

    budget: Budget = Capacity(64)
    layer: int = 2
    recover: float = 0.2
    feature: float = 1.0
    distance: float = 0.5
    centre: float = 0.5
    blur: float = 0.1
    iterations: int = 20
    site: ClassVar[Site] = Site.AFTER_BLOCK

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise ValueError(f"layer={self.layer}: a block in front of it must show what enters it; take 1 or more")
        if not 0 <= self.recover <= 1:
            raise ValueError(f"recover={self.recover} is outside [0, 1]; it is a share of the budget")
        if min(self.feature, self.distance, self.centre) < 0 or self.feature + self.distance + self.centre == 0:
            raise ValueError(
                f"feature={self.feature}, distance={self.distance}, centre={self.centre}: weights of costs are from 0 "
                "up, one of them above"
            )
        if not self.blur > 0 or self.iterations < 1:
            raise ValueError(f"blur={self.blur}, iterations={self.iterations}: above 0, and 1 or more")

    def acts_at(self, depth: int) -> tuple[int, ...]:
        return (self.layer - 1, self.layer)

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        if signals.at.stage == 0:
            signals.memory["entered"] = signals.hidden
            return Plan.identity((tokens.batch,), tokens.n, signals.device)
        entered = signals.memory.pop("entered", None)
        if entered is None:  # the budget lets all stay, and nobody asked in front of the block
            return Plan.identity((tokens.batch,), tokens.n, signals.device)
        if entered.shape[:2] != signals.hidden.shape[:2]:
            raise PlanError(
                f"{entered.shape[1]} visual tokens entered block {self.layer} and {tokens.n} left it: let no other "
                "method act there"
            )
        at = replace(signals.at, stage=0, stages=1)
        count, most = select.allowed(self.budget, tokens, at=at, device=signals.device)
        if tokens.valid is None and most == tokens.n:
            return Plan.identity((tokens.batch,), tokens.n, signals.device)
        real = tokens.unpadded
        with torch.no_grad():
            cost = self._cost(signals, entered, real)
            mass = real / real.sum(-1, keepdim=True).clamp(min=1)
            moved = sinkhorn(cost, mass, mass, blur=self.blur, iterations=self.iterations)
            signals.at.spend(tokens.n**2 * (2 * entered.shape[-1] + 4 * self.iterations))
            highest = cost.masked_fill(~(real[:, None] & real[..., None]), 0).amax((1, 2))[:, None, None]
            saved = (moved * (highest - cost)).sum(-1) / mass.clamp_min(1e-30)
            saved = (saved / EQUAL).round().masked_fill(~real, -torch.inf)
        back = (count * self.recover + 1e-6).floor().long()
        rank = select.rank_within(saved, torch.zeros_like(signals.plane))
        best = real & (rank < (count - back)[:, None])
        return select.counted(best | evenly(real & ~best, back), tokens, most)

    def _cost(self, signals: Signals, entered: Tensor, real: Tensor) -> Tensor:
        """(R, N, N) float32 in [0, 1]: what it costs to take each token to each."""
        view = signals.visual.view
        down, right = view.row.float(), view.column.float()
        high, wide = (extent(along, signals.plane, real) for along in (down, right))
        diagonal = (high.square() + wide.square()).sqrt().clamp(min=1)
        place = torch.stack([down / diagonal, right / diagonal], -1)
        apart = torch.cdist(place, place, compute_mode="donot_use_mm_for_euclid_dist")
        apart = apart.masked_fill(signals.plane[:, :, None] != signals.plane[:, None], 1).clamp(max=1)
        off = 2 * ((down - high / 2).square() + (right - wide / 2).square()).sqrt() / diagonal
        unlike = (1 - unit(entered) @ unit(signals.hidden).transpose(-1, -2)) / 2
        cost = self.feature * unlike + self.distance * apart + self.centre * off.clamp(max=1)[..., None]
        return cost / (self.feature + self.distance + self.centre)


def extent(along: Tensor, plane: Tensor, real: Tensor) -> Tensor:
    """(R, N): the last row or column of each token's image, tile or frame. along, plane, real: (R, N)."""
    along = along.masked_fill(~real, 0)
    return torch.zeros_like(along).scatter_reduce(-1, plane, along, "amax").gather(-1, plane)


def evenly(among: Tensor, number: Tensor) -> Tensor:
    """(R, N) bool: some of the marked tokens, evenly spaced among them. among: (R, N) bool; number: (R,) long, at most
    as many as are marked."""
    total, number = among.sum(-1, keepdim=True).clamp(min=1), number[:, None]
    step = among.cumsum(-1) * number + total // 2
    return among & (step // total > (step - number) // total)
