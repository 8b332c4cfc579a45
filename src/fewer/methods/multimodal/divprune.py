"""DivPrune (Alvar et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from fewer.core import Budget, KeepRatio, Plan, Signals, Tokens, VisualReducer, reducer, select


@reducer("divprune", paper="arXiv:2503.02175", acts="prune", on="multimodal", training="free")
@dataclass(frozen=True)
class DivPrune(VisualReducer):
    """The projected tokens that differ most from each other stay, whatever the question (DivPrune, CVPR 2025).

    Greedy max-min: first the token whose nearest neighbour is farthest, then always the one farthest from all that were
    chosen, by 1 - cosine in float32. The smallest distance within the choice is at least half of the best there is.
    Of equal tokens the earlier one is chosen.

    budget: share of an image's tokens that stays, rounded half to even: 56 of 576. tokens= names a number instead.
    """

    budget: Budget = KeepRatio(0.098, rounding="round")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        return select.maxmin(signals.hidden, self.budget, tokens, at=signals.at)
