"""PyramidDrop (Xing et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewer.core import Budget, KeepRatio, Plan, Signals, Site, Tokens, VisualReducer, reducer, select
from fewer.core.visual import Scope


@reducer("pyramiddrop", paper="arXiv:2410.17247", acts="prune", on="multimodal", training="optional")
@dataclass(frozen=True)
class PyramidDrop(VisualReducer):
    """Visual tokens leave in three stages, half of the remaining ones each time (PyramidDrop).

    The score is the attention of the prompt's last token, computed with the projections of the block that comes next,
    softmax over the whole row, averaged over heads.

    budget: shares of the visual tokens the prompt began with, stage by stage, rounded down. layers: the blocks behind
    which tokens go; by default at a quarter, half and three quarters of the depth (inputs of blocks 8, 16 and 24 of
    32). In models of fewer than four blocks stages fall together.

    Departs from the paper's code, which numbers the remaining rows anew: here they keep their position ids, as in the
    other methods that act inside the language model, for published studies find that renumbering costs grounding.
    """

    budget: Budget = KeepRatio((0.5, 0.25, 0.125), of="start")
    layers: tuple[int, ...] | None = None
    site: ClassVar[Site] = Site.AFTER_BLOCK
    scope: ClassVar[Scope] = "prompt"

    def acts_at(self, depth: int) -> tuple[int, ...]:
        if self.layers is not None:
            return self.layers
        return tuple(sorted({max(1, depth * quarter // 4) - 1 for quarter in (1, 2, 3)}))

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        visual = signals.visual
        scores = visual.ahead(visual.last()).mean(dim=(1, 2))
        return select.top(scores, self.budget, tokens, at=signals.at)
