"""UTRC, unified token reduction by importance classification, for state-space models (Zhan et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewer.core import Budget, KeepRatio, Plan, Reducer, SignalError, Signals, Site, Tokens, match, reducer


@reducer("utrc", paper="arXiv:2410.14725", acts="prune+merge", on="language", training="free",
         exempt={"masked_equals_gathered": "a state-space model reads all rows; none can be masked"})  # fmt: skip
@dataclass(frozen=True)
class UTRC(Reducer):
    """Of a Mamba layer's tokens the less important half goes, the most similar first, dropped or merged.

    A token's importance is the mean of the positive part of what the mixer gave it. Each token of the less important
    half looks for its most similar one in the more important half; of the pairs with the strongest similarity a share
    is dropped, the others are averaged.

    budget: share of the free tokens that stays at each stage, rounded up; at most half can go. layers: by default four
    blocks at the depths the paper acts at in 64 layers: 20, 30, 40 and 50, as shares.
    pruned: share of the pairs that is dropped; 0 merges all, 1 drops all.

    The paper reduces the mixer's branch and the residual by one plan; their sum here is reduced by it, which is the
    same for one share in both. It allows two shares; which pairs are dropped first is not settled in it, here the
    most similar, whose loss costs least. Where its code sorts each channel for itself, this follows the paper.
    """

    budget: Budget = KeepRatio(0.925, rounding="ceil")
    layers: tuple[int, ...] | None = None
    pruned: float = 0.5
    site: ClassVar[Site] = Site.AFTER_BLOCK

    def __post_init__(self) -> None:
        if not 0 <= self.pruned <= 1:
            raise ValueError(f"pruned={self.pruned} is outside [0, 1]; 0 merges every pair, 1 drops every pair")

    def acts_at(self, depth: int) -> tuple[int, ...]:
        if self.layers is not None:
            return self.layers
        return tuple(sorted({depth * anchor // 64 for anchor in (20, 30, 40, 50)}))

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        if signals.branch is None:
            raise SignalError("utrc ranks tokens by the output of a state-space mixer; this model has none")
        importance = signals.branch.float().clamp(min=0).mean(-1)
        return match.ranked_bipartite(
            importance, signals.hidden, self.budget, tokens, at=signals.at, pruned=self.pruned
        )  # fmt: skip
