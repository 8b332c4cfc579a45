"""K-norm: keys of small norm draw the attention, keep those. arXiv:2406.11430."""

from __future__ import annotations

from dataclasses import dataclass

from fewer.core import Budget, KeepRatio, Plan, Signals, Tokens, reducer
from fewer.core.cached import CacheReducer, Rows, top


@reducer("knorm", paper="arXiv:2406.11430", acts="prune", on="kv-cache", training="free")
@dataclass(frozen=True)
class KNorm(CacheReducer):
    """Keep the keys with the smallest L2 norm, per KV head. Asks for no attention at all.

    budget: share or number of rows per KV head. layers: where it acts; the paper spares the first two of Llama 2.
    """

    budget: Budget = KeepRatio(0.5)
    layers: tuple[int, ...] | None = None

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        assert isinstance(tokens, Rows)
        return top(-signals.k.float().norm(dim=-1), self.budget, tokens, at=signals.at)
