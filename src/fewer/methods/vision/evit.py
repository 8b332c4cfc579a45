"""EViT: keep what the CLS token attends to, melt the rest into one token. arXiv:2202.07800, sec. 3."""

from __future__ import annotations

from dataclasses import dataclass

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Tokens, reducer, select


@reducer("evit", paper="arXiv:2202.07800", acts="prune+merge", on="vision", training="optional")
@dataclass(frozen=True)
class EViT(Reducer):
    """Attentive tokens stay; the others become a single, attention-weighted token.

    budget: share of the current free tokens, rounded up (fused tokens of earlier layers count and compete).
    fuse: add sum_j a_j x_j over the dropped j. The a_j are the attention values as they are; they do not sum to one.
    normalise: divide the a_j by their sum first. Not what the paper does.

    Without a class token tokens are ranked and weighted by the attention they receive from all queries.
    """

    budget: Budget = KeepRatio(0.7, rounding="ceil")
    layers: tuple[int, ...] | None = (3, 6, 9)
    fuse: bool = True
    normalise: bool = False

    @property
    def extra(self) -> int:
        return int(self.fuse)

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        attention = signals.saliency
        plan = select.top(attention, self.budget, tokens, at=signals.at)
        return plan.fuse_rest(attention, normalise=self.normalise, valid=tokens.valid) if self.fuse else plan
