"""KeyDiff: keys unlike the others matter, keep those farthest from the mean direction. arXiv:2504.15364."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from fewer.core import Budget, KeepRatio, Plan, Signals, Tokens, reducer
from fewer.core.cached import CacheReducer, Rows, top


@reducer("keydiff", paper="arXiv:2504.15364", acts="prune", on="kv-cache", training="free")
@dataclass(frozen=True)
class KeyDiff(CacheReducer):
    """Keep the keys with the lowest cosine to the anchor, the mean of all keys brought to length one; per KV head.

    budget: share or number of rows per KV head. A prompt read in chunks is pruned after each chunk, the paper's
    block-wise form; padding never enters the anchor.
    """

    budget: Budget = KeepRatio(0.5)
    layers: tuple[int, ...] | None = None

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        assert isinstance(tokens, Rows)
        unit = F.normalize(signals.k.float(), dim=-1)
        if tokens.real is None:
            anchor = unit.mean(2, keepdim=True)
        else:  # a sum has the direction of the mean
            anchor = (unit * tokens.real[..., None]).sum(2, keepdim=True)
        return top(-F.cosine_similarity(unit, anchor, dim=-1), self.budget, tokens, at=signals.at)
