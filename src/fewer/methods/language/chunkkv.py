"""ChunkKV: meaning sits in phrases, so keep the cache in chunks of neighbouring tokens. arXiv:2502.00299."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewer.core import Budget, Capacity, KeepRatio, Plan, Signals, Tokens, reducer
from fewer.core.budgets import BudgetError
from fewer.core.cache import CacheReducer, CacheSignals, Rows, check_window, pooled_votes, ragged


@reducer("chunkkv", paper="arXiv:2502.00299", acts="prune", on="kv-cache", training="free")
@dataclass(frozen=True)
class ChunkKV(CacheReducer):
    """SnapKV's votes, chunk by chunk: a chunk stays or goes as a whole, and for all heads of a layer.

    A chunk's score is the mean of its tokens' votes, summed over the KV heads. Chunks are counted from the first token;
    the one before the window may be short.

    budget    rows in all, the window included: as many whole chunks as fit beside it
    chunk     tokens of a chunk
    window    queries that vote and always stay
    kernel    odd width of the pooling of votes; the paper has none
    pool      "mean" or "max" over the kernel
    fidelity  "kvpress": chunks run through the window, whose tokens outvote the others; the share of *chunks* that
              stays is rounded down, at least one, so the number of rows is met to a chunk only. Takes keep= alone

    The reuse of one layer's choice by the next ones is left out.
    """

    budget: Budget = Capacity(1024)
    chunk: int = 10
    window: int = 32
    kernel: int = 1
    pool: Literal["mean", "max"] = "mean"
    layers: tuple[int, ...] | None = None
    fidelity: Literal["paper", "kvpress"] = "paper"

    def __post_init__(self) -> None:
        check_window(self.window, self.kernel, self.pool)
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk}: a chunk has at least one token")
        if self.fidelity not in ("paper", "kvpress"):
            raise ValueError(f"fidelity={self.fidelity!r} is neither 'paper' nor 'kvpress'")
        if self.fidelity == "kvpress" and not (
            isinstance(self.budget, KeepRatio) and isinstance(self.budget.ratio, float)
        ):
            raise BudgetError("fidelity=kvpress counts chunks by one share of them; give keep= a single number")

    @property
    def least(self) -> int:
        return self.window

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        assert isinstance(signals, CacheSignals) and isinstance(tokens, Rows)
        votes = pooled_votes(signals, tokens, self.window, self.kernel, self.pool)
        window = tokens.newest(self.window)
        real = torch.ones_like(votes[:, :1], dtype=torch.bool) if tokens.real is None else tokens.real
        rank = (real.cumsum(-1) - 1).clamp(min=0)
        if self.fidelity == "kvpress":
            assert isinstance(self.budget, KeepRatio) and isinstance(self.budget.ratio, float)
            votes, competes = torch.where(window, votes.max() + 1, votes), real
            most = [max(1, int(-(-n // self.chunk) * self.budget.ratio)) for n in tokens.totals]
        else:
            competes = real & ~window
            counts = tokens.counts(self.budget, signals.at, self.window)
            most = [max(k - self.window, 0) // self.chunk for k in counts]
        number = -(-tokens.n // self.chunk)
        kept = self._best(votes.sum(1, keepdim=True), rank // self.chunk, competes, number, most)
        if self.fidelity == "kvpress":
            width = max(most) * self.chunk
        else:  # a sample that holds no more than its budget loses nothing to the rounding of chunks
            fits = real.sum(-1, keepdim=True) <= torch.tensor(counts, device=votes.device)[:, None, None]
            kept, width = kept | window | (real & fits), max(counts)
        return ragged(kept.expand(tokens.batch, -1, -1), tokens.n, min(width, tokens.n))

    @staticmethod
    def _best(votes: Tensor, chunk: Tensor, competes: Tensor, number: int, most: list[int]) -> Tensor:
        """(B, 1, S) bool: rows of the `most` chunks with the highest mean, among rows that compete."""
        chunk = chunk.expand_as(votes)
        zero = votes.new_zeros(*votes.shape[:-1], number)
        total = zero.scatter_add(-1, chunk, votes * competes)
        size = zero.scatter_add(-1, chunk, competes.expand_as(votes).float())
        score = (total / size.clamp(min=1)).masked_fill(size == 0, float("-inf"))
        order = score.sort(dim=-1, descending=True, stable=True).indices
        limit = torch.tensor(most, device=votes.device)[:, None, None]
        stays = torch.zeros_like(score, dtype=torch.bool)
        stays.scatter_(-1, order, (torch.arange(number, device=votes.device) < limit).expand_as(order))
        return stays.gather(-1, chunk) & competes
