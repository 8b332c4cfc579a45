"""H2O: a few keys gather most of the attention over time; keep these heavy hitters and the newest. arXiv:2306.14048."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewer.core import Budget, KeepRatio, reducer
from fewer.core.budgets import BudgetError
from fewer.core.cache import CacheSignals, Ranker, Rows


@reducer("h2o", paper="arXiv:2306.14048", acts="prune", on="kv-cache", training="free")
@dataclass(frozen=True)
class H2O(Ranker):
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
    weighs: ClassVar[bool] = True
    together: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.recent <= 1:
            raise BudgetError(f"recent={self.recent} is outside [0, 1]; it is a share of the budget")

    def ranks(self, signals: CacheSignals, rows: Rows) -> tuple[Tensor, Tensor]:
        assert signals.received is not None
        mass = signals.received if not self.average or rows.age is None else signals.received / rows.age
        widths = [int(self.recent * k) for k in rows.counts(self.budget, signals.at)]
        width = widths[0] if rows.even else torch.tensor(widths, device=mass.device)[:, None, None]
        return mass, rows.newest(width)
