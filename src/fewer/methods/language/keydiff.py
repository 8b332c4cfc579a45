"""KeyDiff: keys unlike the others matter, keep those farthest from the mean direction. arXiv:2504.15364."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fewer.core import Budget, KeepRatio, Plan, Signals, Tokens, reducer
from fewer.core.cache import CacheReducer, Rows, top


@reducer("keydiff", paper="arXiv:2504.15364", acts="prune", on="kv-cache", training="free")
@dataclass(frozen=True)
class KeyDiff(CacheReducer):
    """Keep the keys with the lowest cosine to the anchor, the mean of all keys brought to length one; per KV head.

    budget  share or number of rows per KV head
    block   None: all rows are ranked at once. Else the first rows fill the budget and the others come this many at a
            time, each block followed by a cut back to the budget with an anchor of what is there: what a prompt read in
            chunks comes to, and what decides when memory for the whole prompt is not to be had. One pass over the
            keys for each block

    A prompt read in chunks is pruned after each chunk. Padding never enters the anchor.
    """

    budget: Budget = KeepRatio(0.5)
    block: int | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.block is not None and self.block < 1:
            raise ValueError(f"block={self.block}: a block has at least one row; none ranks all rows at once")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        assert isinstance(tokens, Rows)
        unit = F.normalize(signals.k.float(), dim=-1)
        if self.block is None:
            return top(self._scores(unit, tokens.real), self.budget, tokens, at=signals.at)
        counts = tokens.counts(self.budget, signals.at)
        limit = torch.tensor(counts, device=unit.device)[:, None, None]
        real = torch.ones(1, 1, 1, dtype=torch.bool, device=unit.device) if tokens.real is None else tokens.real
        rank = real.expand(*unit.shape[:3]).cumsum(-1) - 1
        kept = (rank < limit) & real
        steps = max(total - k for total, k in zip(tokens.totals, counts, strict=True))
        for start in range(0, steps, self.block):
            come = (rank >= limit + start) & (rank < limit + start + self.block) & real
            there = kept | come
            order = (
                self._scores(unit, there)
                .masked_fill(~there, float("-inf"))
                .argsort(dim=-1, descending=True, stable=True)
            )
            first = (torch.arange(tokens.n, device=unit.device) < limit).expand_as(order)
            kept = torch.zeros_like(there).scatter(-1, order, first) & there
        return top(kept.float(), self.budget, tokens, at=signals.at)

    @staticmethod
    def _scores(unit: Tensor, there: Tensor | None) -> Tensor:
        """(B, G, S): minus the cosine to the anchor of the rows that are there."""
        present = unit if there is None else unit * there[..., None]
        anchor = present.mean(2, keepdim=True)  # what is missing shortens the mean and leaves its direction
        return -F.cosine_similarity(unit, anchor, dim=-1)
