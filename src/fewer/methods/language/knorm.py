"""K-norm: keys of small norm draw the attention, keep those. arXiv:2406.11430."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from fewer.core import Budget, KeepRatio, Plan, Signals, Tokens, reducer
from fewer.core.cache import CacheReducer, Rows, top


@reducer("knorm", paper="arXiv:2406.11430", acts="prune", on="kv-cache", training="free")
@dataclass(frozen=True)
class KNorm(CacheReducer):
    """Keep the keys with the smallest L2 norm, per KV head. Asks for no attention at all.

    budget     share or number of rows per KV head
    layers     where it acts; the paper spares the first two of Llama 2
    positions  "original": rows keep the distance they had in the text, as in the paper. "cache": keys are turned on so
               that the rows that are left follow one another without gaps
    """

    budget: Budget = KeepRatio(0.5)
    layers: tuple[int, ...] | None = None
    positions: Literal["original", "cache"] = "original"

    def __post_init__(self) -> None:
        if self.positions not in ("cache", "original"):
            raise ValueError(f"positions={self.positions!r} is neither 'cache' nor 'original'")

    @property
    def travelling(self) -> int:
        return sys.maxsize if self.positions == "cache" else 0

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        assert isinstance(tokens, Rows)
        return top(-signals.k.float().norm(dim=-1), self.budget, tokens, at=signals.at)
