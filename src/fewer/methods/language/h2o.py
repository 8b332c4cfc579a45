"""H2O: a few keys gather most of the attention over time; keep these heavy hitters and the newest. arXiv:2306.14048."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fewer.core import Budget, KeepRatio, Plan, Signals, Tokens, reducer
from fewer.core.budgets import BudgetError
from fewer.core.cached import CacheReducer, CacheSignals, Rows, top


@reducer("h2o", paper="arXiv:2306.14048", acts="prune", on="kv-cache", training="free")
@dataclass(frozen=True)
class H2O(CacheReducer):
    """Rank rows by the attention they have received since they came, prompt and writing alike, per KV head.

    budget   rows per KV head, heavy hitters and newest together: a share of all tokens so far (the authors fix it when
             the prompt is read: pass tokens= for that)
    recent   share of the budget that goes to the newest rows, rounded down
    average  divide by the number of queries that could see a row, which takes the advantage from early tokens
    decodes  whether rows go at every decoding step too, as in the paper, or only once a prompt is read
    The mass of a long prompt needs every query once more: chunked, memory linear in its length.
    """

    budget: Budget = KeepRatio(0.2)
    recent: float = 0.5
    average: bool = False
    decodes: bool = True
    layers: tuple[int, ...] | None = None
    accumulates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.recent <= 1:
            raise BudgetError(f"recent={self.recent} is outside [0, 1]; it is a share of the budget")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        assert isinstance(signals, CacheSignals) and isinstance(tokens, Rows) and signals.received is not None
        mass = signals.received if not self.average or tokens.age is None else signals.received / tokens.age
        widths = [int(self.recent * k) for k in tokens.counts(self.budget, signals.at)]
        newest = tokens.newest(widths[0] if tokens.even else torch.tensor(widths, device=mass.device)[:, None, None])
        return top(mass, self.budget, tokens, at=signals.at, protected=newest)
