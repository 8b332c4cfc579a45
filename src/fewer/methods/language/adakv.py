"""Ada-KV: heads differ in how widely they look; let them share one cache budget. arXiv:2407.11550."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fewer.core import Budget, Capacity, Plan, Signals, Tokens, reducer
from fewer.core.cache import CacheReducer, CacheSignals, Rows, check_alpha, check_window, pooled_votes, shared


@reducer("adakv", paper="arXiv:2407.11550", acts="prune", on="kv-cache", training="free")
@dataclass(frozen=True)
class AdaKV(CacheReducer):
    """SnapKV's votes, head-wise budgets: a layer's heads take from one pool what they need. Memory is truly freed.

    budget    rows per KV head on average, the window included
    alpha     share of the average that each head is sure of
    window   queries that vote and always stay
    kernel   odd width of the pooling
    pool     "mean" or "max" over the kernel
    """

    budget: Budget = Capacity(1024)
    alpha: float = 0.2
    window: int = 32
    kernel: int = 7
    pool: Literal["mean", "max"] = "max"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_window(self.window, self.kernel, self.pool)
        check_alpha(self.alpha)

    @property
    def least(self) -> int:
        return self.window

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        assert isinstance(signals, CacheSignals) and isinstance(tokens, Rows)
        votes = pooled_votes(signals, tokens, self.window, self.kernel, self.pool)
        window = tokens.newest(self.window)
        return shared(votes, self.budget, tokens, at=signals.at, alpha=self.alpha, protected=window, least=self.least)
