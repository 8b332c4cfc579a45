"""PPT: per image, pool where attention is flat, prune where it is peaked. arXiv:2310.01812."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewer.core import Budget, Hard, Place, Plan, Reducer, Remove, Signals, Tokens, match, reducer, select


@dataclass(frozen=True)
class _Paired(Budget):
    """Another budget, but at most half of the tokens go: what a pairing can do, so that both branches end equal."""

    wanted: Budget

    def keep(self, free: int, at: Place) -> int:
        return max(self.wanted.keep(free, at), free - free // 2)

    def granted(self, real: Tensor, free: int, at: Place, *, least: int = 0) -> Tensor:
        return torch.maximum(self.wanted.granted(real, free, at, least=least), real - real // 2)


@reducer("ppt", paper="arXiv:2310.01812", acts="prune+merge", on="vision", training="optional")
@dataclass(frozen=True)
class PPT(Reducer):
    """Token pruning and pooling: each image chooses at each layer.

    budget: tokens that go at each layer; at most half of the free ones.
    tau: an image whose scores have a variance (unbiased, over its free tokens, scores summing to one) below tau looks
    redundant and is pooled as in ToMe; the others are pruned.
    scale_free: compare N^2 times the variance instead, which does not shrink with the number N of free tokens. The
    default tau is 2.7 on that scale for 196 patches.
    proportional: later blocks add log(size) to their attention logits. Pruned tokens take their size with them.
    fidelity: "paper", or "code": there, pruned images keep their tokens in order of falling score, and without
    proportional attention sizes are forgotten between layers.

    The score is the class token's attention times the norm of the value, all heads together. A model without a class
    token is scored by the attention each token receives from all queries; the paper says nothing about such models.
    """

    budget: Budget = Remove(50)
    layers: tuple[int, ...] | None = (3, 6, 9)
    tau: float = 7e-5
    scale_free: bool = False
    proportional: bool = True
    fidelity: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        if self.tau < 0:
            raise ValueError(f"PPT(tau={self.tau}): tau bounds a variance and cannot be negative; 0 always prunes")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        code = self.fidelity == "code"
        if code and not self.proportional:
            tokens = tokens.unsized()
        score = self.score(signals, tokens)
        pool = match.bipartite(signals.key, self.budget, tokens, at=signals.at, order="halves")
        prune = select.top(score, _Paired(self.budget), tokens, at=signals.at)
        if code:
            prune = self._by_score(prune, score, tokens)
        return Plan.where(self.flat(score, tokens), pool, prune)

    def score(self, signals: Signals, tokens: Tokens) -> Tensor:
        """(B, N), summing to one over the tokens that may go; zero at the others."""
        score = signals.saliency * signals.value_norm
        if tokens.movable is not None:
            score = score.masked_fill(~tokens.movable, 0)
        return score / score.sum(-1, keepdim=True).clamp_min(1e-30)

    def flat(self, score: Tensor, tokens: Tokens) -> Tensor:
        """(B,) bool: whose scores hardly differ."""
        movable = tokens.movable
        count = score.new_full((1, 1), score.shape[-1]) if movable is None else movable.sum(-1, keepdim=True).float()
        off = score - 1 / count  # the mean of n scores that sum to one
        if movable is not None:
            off = off.masked_fill(~movable, 0)
        variance = off.square().sum(-1) / (count[:, 0] - 1).clamp_min(1)
        return (variance * count[:, 0] ** 2 if self.scale_free else variance) < self.tau

    @staticmethod
    def _by_score(plan: Hard, score: Tensor, tokens: Tokens) -> Hard:
        rank = score.gather(-1, plan.anchor)
        rank = rank.masked_fill(plan.anchor < tokens.prefix, float("inf"))
        if plan.valid is not None:
            rank = rank.masked_fill(~plan.valid, float("-inf"))
        return plan.arranged(rank.argsort(dim=-1, descending=True, stable=True))
