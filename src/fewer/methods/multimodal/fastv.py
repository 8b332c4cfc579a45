"""FastV (Chen et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewer.core import Budget, KeepRatio, Plan, Signals, Site, Tokens, VisualReducer, reducer, select
from fewer.core.visual import Scope
from fewer.core.visual.attention import Score, attended, check_score


@reducer("fastv", paper="arXiv:2403.06764", acts="prune", on="multimodal", training="free")
@dataclass(frozen=True)
class FastV(VisualReducer):
    """Behind the first blocks, visual tokens that the prompt's last token does not look at go (FastV).

    The score is the last token's attention in the block before the cut, averaged over heads. The paper speaks of the
    attention a token receives; its code reads the last row only, and so do we. Rows keep their position ids, and the
    tokens written later see the set chosen here.

    budget: share of the visual tokens that stays; half, rounded half to even. The paper's R is the share that goes.
    k: blocks that see everything; by default a sixteenth of the depth (2 of 32), at least one, for attention must
    exist. layers: instead of k, the blocks behind which tokens go (k - 1); several cut several times.
    score: "rotated", as published; "unrotated", of queries and keys before rotary positions, or "corrected", divided by
    what rotation alone gives at that distance. The last two are for the bias to the image's last rows, which stand
    nearest to the text.

    At few tokens it loses to a random choice on several published benchmarks; compare before using it.
    """

    budget: Budget = KeepRatio(0.5, rounding="round")
    k: int | None = None
    layers: tuple[int, ...] | None = None
    score: Score = "rotated"
    site: ClassVar[Site] = Site.AFTER_BLOCK
    scope: ClassVar[Scope] = "prompt"

    def __post_init__(self) -> None:
        check_score(self.score)
        if self.k is not None and self.k < 1:
            raise ValueError(f"k={self.k}: at least one block must see all tokens, or there is no attention to rank by")
        if self.k is not None and self.layers is not None:
            raise ValueError(f"k={self.k} and layers={self.layers} both say where tokens go; give one (layers = k - 1)")

    def acts_at(self, depth: int) -> tuple[int, ...]:
        if self.layers is not None:
            return self.layers
        return (max(1, round(depth / 16)) - 1 if self.k is None else self.k - 1,)

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        visual = signals.visual
        scores = attended(visual, visual.last(), self.score).mean(dim=(1, 2))
        return select.top(scores, self.budget, tokens, at=signals.at)
