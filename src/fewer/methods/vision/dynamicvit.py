"""DynamicViT: small predictors say which patches are worth computing on. arXiv:2106.02034, sec. 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import nn

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer, select
from fewer.core.learned import Predictor, keep_decision, present, training_policy


@reducer("dynamicvit", paper="arXiv:2106.02034", acts="prune", on="vision", training="required")
@dataclass(frozen=True)
class DynamicViT(Reducer):
    """A predictor scores the patches from their own features and their mean; the best stay.

    budget: share of the free tokens that entered the model, to the power of the stage, rounded down.
    layers: the predictors stand before these blocks, 0-based; the paper's three stages of a model with 12 blocks.

    In training every decision is sampled (Gumbel-softmax, straight-through) and no row goes: the dropped are masked.
    """

    budget: Budget = KeepRatio(0.7, of="start")
    layers: tuple[int, ...] | None = (3, 6, 9)
    site: ClassVar[Site] = Site.BEFORE_BLOCK

    def modules(self, width: int, heads: int, stages: int, free: int) -> dict[str, nn.Module]:
        return {"predictor": Predictor(width)}

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        predictor = signals.module("predictor")
        logp = predictor(tokens.free.of(signals.hidden), present(tokens))
        signals.at.spend(predictor.flops(len(tokens.free)))
        if signals.training:
            decision = keep_decision(logp, predictor.noise(logp))
            return Plan.mask(training_policy(signals, tokens, self.budget, decision))
        scores = F.pad(logp[..., 0], (tokens.prefix, 0))
        return select.top(scores, self.budget, tokens, at=signals.at)
