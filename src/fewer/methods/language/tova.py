"""TOVA: a cache is a multi-state memory; drop the state the newest token attends to least. arXiv:2401.06104."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewer.core import Budget, Capacity, reducer
from fewer.core.cache import CacheSignals, Ranker, Rows


@reducer("tova", paper="arXiv:2401.06104", acts="prune", on="kv-cache", training="free")
@dataclass(frozen=True)
class TOVA(Ranker):
    """Rank rows by the last query's attention, averaged over all heads of the layer; all KV heads keep the same rows.

    budget   rows in all
    recent   newest rows that always stay; the paper protects none, so the newest token itself may go
    decodes  whether a row goes at every decoding step too, as in the paper, or only once a prompt is read
    """

    budget: Budget = Capacity(1024)
    recent: int = 0
    layers: tuple[int, ...] | None = None
    decodes: bool = True
    weighs: ClassVar[bool] = True
    together: ClassVar[bool] = True

    @property
    def least(self) -> int:
        return self.recent

    def ranks(self, signals: CacheSignals, rows: Rows) -> tuple[Tensor, Tensor | None]:
        seen = signals.window_mass(1).mean(1, keepdim=True)  # (B, 1, S)
        return seen, rows.newest(self.recent) if self.recent else None
