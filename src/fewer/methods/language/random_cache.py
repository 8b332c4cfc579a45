"""Random rows of a KV cache: the baseline every eviction method must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.core import Budget, KeepRatio, reducer
from fewer.core.budgets import BudgetError
from fewer.core.cache import CacheSignals, Ranker, Rows
from fewer.core.noise import noise


@reducer("random_cache", paper="baseline", acts="prune", on="kv-cache", training="free")
@dataclass(frozen=True)
class RandomCache(Ranker):
    """Sinks, the newest rows and a seeded draw of the others; the same rows for all heads, others in every layer.

    Sinks and newest rows are what every method keeps in the end, so a method that does not beat this row gained
    nothing from looking at keys or attention.

    budget   rows per KV head, sinks and newest included
    sinks    first tokens that never go
    recent   newest rows that always stay
    seed     of the draw. A row's number depends on the seed, the layer and its place in the text alone: neither the
             batch, nor padding, nor the device changes who stays, and a later eviction keeps a subset of what an
             earlier one kept
    decodes  whether rows go at every decoding step too, or only once a prompt is read
    """

    budget: Budget = KeepRatio(0.5)
    sinks: int = 4
    recent: int = 32
    seed: int = 0
    layers: tuple[int, ...] | None = None
    decodes: bool = False

    def __post_init__(self) -> None:
        for name in ("sinks", "recent"):
            if getattr(self, name) < 0:
                raise BudgetError(f"{name}={getattr(self, name)} is negative; 0 protects none")

    @property
    def least(self) -> int:
        return self.sinks + self.recent

    def ranks(self, signals: CacheSignals, rows: Rows) -> tuple[Tensor, Tensor]:
        assert rows.age is not None
        totals = torch.tensor(rows.totals, device=rows.age.device)[:, None, None]
        place = totals - rows.age  # in the sample's own text: padding on the left does not count
        return noise(place, self.seed, signals.at.layer), rows.sinks(self.sinks) | rows.newest(self.recent)
