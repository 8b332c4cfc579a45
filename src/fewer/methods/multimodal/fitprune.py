"""FitPrune (Ye et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewer.core import Budget, KeepRatio, Plan, Signals, Site, Tokens, VisualReducer, reducer, select
from fewer.core.visual import Scope
from fewer.core.visual.attention import strongest


@reducer("fitprune", paper="arXiv:2409.10197", acts="prune", on="multimodal", training="free")
@dataclass(frozen=True)
class FitPrune(VisualReducer):
    """In every layer as many visual tokens leave as a schedule fitted to some prompts says (FitPrune).

    Between attention and MLP those go whose two averages have the smallest product: the attention they receive from
    visual tokens, and from text, the largest over the heads each.

    budget: what stays behind each layer, of the visual tokens the prompt began with.
    `fewer.recipes.fit.fit_schedule` fits it to a target of FLOPs in some seconds; unfitted, a geometric decay to about
    a tenth stands in for the authors' schedules, which belong to their models. layers: by default all.

    It needs the attention of all rows in every layer. Rows are taken in chunks, so memory stays linear, but the
    arithmetic is that of the attention itself.
    """

    budget: Budget = KeepRatio(0.93, of="start")
    layers: tuple[int, ...] | None = None
    site: ClassVar[Site] = Site.MID_BLOCK
    scope: ClassVar[Scope] = "prompt"

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        own, cross = strongest(signals.visual)
        return select.top(own * cross, self.budget, tokens, at=signals.at)
