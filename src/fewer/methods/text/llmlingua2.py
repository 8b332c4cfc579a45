"""LLMLingua-2 (Pan et al., ACL Findings 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer
from fewer.core.written import Unit, fill, goal, plan, pooled


@reducer("llmlingua2", paper="arXiv:2403.12968", acts="prune", on="text", training="required")
@dataclass(frozen=True)
class LLMLingua2(Reducer):
    """Words stay that an encoder, trained on what a large model left of texts, wants to keep.

    budget: share of the free tokens that stays. unit: what stays or goes as one; its score is the mean over its tokens.
    """

    budget: Budget = KeepRatio(0.5)
    layers: tuple[int, ...] | None = None
    unit: Unit = "word"
    site: ClassVar[Site] = Site.TEXT

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        written = signals.written
        count, free = goal(self.budget, tokens, signals.at)
        unit = written.unit(self.unit)
        score = signals.memory["score"] = pooled(written.reader.wanted, unit, free)
        return plan(fill(score, unit, count, free), tokens)
