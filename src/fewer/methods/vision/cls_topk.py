"""Top-K: keep what the class token attends to and drop the rest. A baseline; EViT without its fused token."""

from __future__ import annotations

from dataclasses import dataclass

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Tokens, reducer, select


@reducer("cls_topk", paper="arXiv:2308.04657", acts="prune", on="vision", training="optional")
@dataclass(frozen=True)
class ClsTopK(Reducer):
    """Attentive tokens stay, the others are dropped.

    budget: share of the first free tokens that stays, to the power of the stage (1, 2, 3), rounded down.
    Without a class token tokens are ranked by the attention they receive from all queries.
    """

    budget: Budget = KeepRatio(0.7, of="start")
    layers: tuple[int, ...] | None = (3, 6, 9)

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        return select.top(signals.saliency, self.budget, tokens, at=signals.at)
