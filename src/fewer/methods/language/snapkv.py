"""SnapKV: the last queries of a prompt vote for the keys worth caching. arXiv:2404.14469."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fewer.core import Budget, Capacity, Plan, Signals, Tokens, reducer
from fewer.core.cache import CacheReducer, CacheSignals, Rows, check_window, pooled_votes, top


@reducer("snapkv", paper="arXiv:2404.14469", acts="prune", on="kv-cache", training="free")
@dataclass(frozen=True)
class SnapKV(CacheReducer):
    """Votes of an observation window, smoothed so that neighbours survive together.

    budget   rows per KV head, the window included; a prompt that fits is left as it is
    window   queries that vote and always stay; a shorter prompt votes with all it has, and stays
    kernel   odd width of the pooling; zeros beyond the ends count in the mean
    pool     "mean" or "max" over the kernel

    The votes of the query heads of a group are averaged: one choice per *KV* head; the authors' code repeats keys.
    """

    budget: Budget = Capacity(1024)
    window: int = 32
    kernel: int = 5
    pool: Literal["mean", "max"] = "mean"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_window(self.window, self.kernel, self.pool)

    @property
    def least(self) -> int:
        return self.window

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        assert isinstance(signals, CacheSignals) and isinstance(tokens, Rows)
        votes = pooled_votes(signals, tokens, self.window, self.kernel, self.pool)
        return top(votes, self.budget, tokens, at=signals.at, protected=tokens.newest(self.window), least=self.window)
