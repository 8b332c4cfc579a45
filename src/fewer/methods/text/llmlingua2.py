"""LLMLingua-2 (Pan et al., ACL Findings 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer
from fewer.core.written import Unit, fill, goal, plan, pooled, share_of


@reducer("llmlingua2", paper="arXiv:2403.12968", acts="prune", on="text", training="required")
@dataclass(frozen=True)
class LLMLingua2(Reducer):
    """Words stay that an encoder, trained on what a large model left of texts, wants to keep.

    budget: share of the free tokens that stays. unit: what stays or goes as one; its score is the mean over its tokens.
    fidelity: "paper", by rank; or "code", in which units stay that are above a percentile of the scores, whose number
    is cut to a whole one: with ties and long units the count is missed.
    """

    budget: Budget = KeepRatio(0.5)
    layers: tuple[int, ...] | None = None
    unit: Unit = "word"
    fidelity: Literal["paper", "code"] = "paper"
    site: ClassVar[Site] = Site.TEXT
    needs_reader: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.fidelity not in ("paper", "code"):
            raise ValueError(f"fidelity={self.fidelity!r}: choose 'paper' or 'code'")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        written = signals.written
        count, free = goal(self.budget, tokens, signals.at)
        unit = written.unit(self.unit)
        score = signals.memory["score"] = pooled(written.reader.wanted, unit, free)
        if self.fidelity == "code":
            stays = torch.zeros_like(free)
            for row, share in enumerate(share_of(self.budget, count, free).tolist()):
                stays[row, free[row]] = above(score[row, free[row]], share)
            return plan(stays, tokens)
        return plan(fill(score, unit, count, free), tokens)


def above(scores: Tensor, share: float) -> Tensor:
    """(n,) bool: which scores, one for each token, are above the percentile that the code takes for a share."""
    number = min(100, int(100 * (1 - share) + 1))
    return scores > scores.double().quantile(number / 100)
