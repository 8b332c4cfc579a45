"""Frames: keep some whole frames, evenly spread. The baseline that watches fewer moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer
from fewer.core.spacetime import Rectangle, spread


@reducer("frames", paper="baseline", acts="prune", on="video", training="optional",
         exempt={"budget_is_met": "whole frames stay: at most what the budget grants",
                 "padding_changes_nothing": "it keeps whole frames, so ragged input is refused"})  # fmt: skip
@dataclass(frozen=True)
class Frames(Reducer):
    """Uniform sampling of frames, before the first block.

    budget: share of the tokens that stays, rounded down to whole frames of patches, at least one.
    """

    budget: Budget = KeepRatio(0.5)
    layers: tuple[int, ...] | None = (0,)
    site: ClassVar[Site] = Site.BEFORE_BLOCK

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        shape = Rectangle.of(signals, tokens, "frames")
        k = max(1, self.budget.keep(tokens.free_count, signals.at) // shape.cells)
        kept = spread(shape.frames, k, signals.device).expand(tokens.batch, -1)
        Rectangle(k, shape.cells, shape.prefix).keep_in(signals)
        return shape.of_frames(Plan.keep(kept, shape.frames))
