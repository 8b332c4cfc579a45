"""M3, Matryoshka multimodal models (Cai et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewer.core import Budget, Capacity, KeepRatio, Plan, Signals, Tokens, VisualReducer, reducer
from fewer.core.visual.regions import Regions, granted


@reducer("m3", paper="arXiv:2405.17430", acts="pool", on="multimodal", training="optional")
@dataclass(frozen=True)
class M3(VisualReducer):
    """Visual tokens are averaged over square regions, and a model tuned to it reads any number (M3, ICLR 2025).

    On a model that never saw pooled tokens this is the pooling baseline. The model itself is what training changes:
    the projector and the language model learn from all of `scales` at once, with equal weight.

    budget: rows of a picture. 24 x 24 tokens pooled to 576, 144, 36, 9 or 1 are the paper's nested scales. Any other
    count is met too: regions then differ by a row or a column of cells, and so they do on grids that do not divide.

    Every tile of a cut-up picture and every frame of a video is pooled by itself, as long as there are rows enough. A
    token belongs to one region only, where adaptive pooling as libraries know it lets regions overlap.
    """

    budget: Budget = Capacity(36)
    scales: ClassVar[tuple[Budget, ...]] = (
        KeepRatio(1.0), KeepRatio(1 / 4), KeepRatio(1 / 16), KeepRatio(1 / 64), Capacity(1),
    )  # fmt: skip

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        m, lengths = granted(self.budget, tokens, signals.at)
        return Regions.cut(signals.visual.view, m, lengths).averaged()
