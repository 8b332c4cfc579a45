"""SDTP, saliency-driven dynamic token pruning (Tao et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer, select
from fewer.core.learned import gumbel, keep_decision, remember, training_policy


class Judge(nn.Module):
    """How salient a token is, from its own features alone: Linear, GELU, Linear to the logits of keep and drop."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, 2)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, 2) float32 log-probabilities, 0 = keep."""
        return F.log_softmax(self.second(F.gelu(self.first(self.norm(x)))).float(), dim=-1)

    def flops(self, n: int) -> int:
        return 2 * n * (self.first.weight.numel() + self.second.weight.numel())


@reducer("sdtp", paper="arXiv:2504.04514", acts="prune", on="language", training="required")
@dataclass(frozen=True)
class SDTP(Reducer):
    """Small predictors, trained to rank tokens as gradients do, say which of a prompt's tokens go on.

    Before each of its blocks the least salient tokens leave; the first `sinks` and the last one stay. A token is judged
    by its own features, so a prompt may come in chunks. Positions are kept.

    budget: share of the tokens present that stays at each stage. layers: by default seven blocks, evenly spread behind
    the first quarter of the depth: .9 each leaves 48 %. hidden: width of the predictors. sinks: first tokens that stay.

    The order of the losses' terms, the schedule and what is protected are ours; the paper's code is not public. The
    norm in front of the predictor is ours too: features of a frozen model grow with depth.
    """

    budget: Budget = KeepRatio(0.9)
    layers: tuple[int, ...] | None = None
    hidden: int = 64
    sinks: int = 4
    site: ClassVar[Site] = Site.BEFORE_BLOCK

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.hidden < 1:
            raise ValueError(f"sinks={self.sinks}, hidden={self.hidden}: sinks from 0 up, hidden from 1 up")

    def acts_at(self, depth: int) -> tuple[int, ...]:
        if self.layers is not None:
            return self.layers
        first = max(1, depth // 4)
        return tuple(sorted({first + (depth - first) * i // 7 for i in range(7)}))

    def modules(self, width: int, heads: int, stages: int, free: int) -> dict[str, nn.Module]:
        return {"judge": Judge(width, self.hidden)}

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        judge = signals.module("judge")
        logp = judge(signals.hidden)
        signals.at.spend(judge.flops(tokens.n))
        remember(signals, "score", logp[..., 0] - logp[..., 1])
        tokens = tokens.protect(tokens.first(min(self.sinks, tokens.n - 1)))
        if signals.training:
            decision = keep_decision(logp[:, tokens.prefix :], gumbel(logp[:, tokens.prefix :]))
            return Plan.mask(training_policy(signals, tokens, self.budget, decision))
        return select.top(logp[..., 0], self.budget, tokens, at=signals.at)
