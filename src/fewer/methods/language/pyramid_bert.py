"""Pyramid-BERT: in every block the tokens that cover all others best stay, a core-set. arXiv:2203.14380, sec. 4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer, select


@reducer("pyramid_bert", paper="arXiv:2203.14380", acts="prune", on="language", training="optional")
@dataclass(frozen=True)
class PyramidBert(Reducer):
    """Greedy k-centre selection: the class token is the first centre, then always the token farthest from all centres.

    Distances are Euclidean, between the features as they leave the block. No attention is looked at.

    budget: tokens that stay behind each block, the class token not counted: a share of those that are left, rounded
        up, so that lengths fall exponentially.
    block: tokens taken per round; more is faster and covers less evenly.
    """

    budget: Budget = KeepRatio(0.8, rounding="ceil")
    layers: tuple[int, ...] | None = None
    block: int = 1
    site: ClassVar[Site] = Site.AFTER_BLOCK

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block={self.block}: every round takes at least one token")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        return select.core_set(signals.hidden, self.budget, tokens, at=signals.at, block=self.block)
