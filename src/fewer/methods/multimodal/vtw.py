"""VTW, visual tokens withdrawal (Lin et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fewer.core import Budget, Plan, Signals, Site, Tokens, VisualReducer, reducer
from fewer.core.place import Place
from fewer.core.visual import Scope


@dataclass(frozen=True)
class Nothing(Budget):
    """No token stays."""

    def keep(self, free: int, at: Place) -> int:
        return 0


@reducer("vtw", paper="arXiv:2405.05803", acts="prune", on="multimodal", training="free")
@dataclass(frozen=True)
class VTW(VisualReducer):
    """From one layer on, no visual token is there any more (VTW, visual tokens withdrawal).

    By then the text has taken up what it needs. The caches of deeper layers hold text only. Text keeps its position
    ids. `fewer.recipes.withdraw.search_layer` finds the layer as the paper does, from some prompts.

    k: blocks that see the visual tokens; by default half of the depth (the paper finds 15 or 16 of 32). Tasks that
    read details late, such as text in images, need more. k equal to the depth changes nothing in the answer.
    """

    k: int | None = None
    budget: ClassVar[Budget] = Nothing()
    site: ClassVar[Site] = Site.AFTER_BLOCK
    scope: ClassVar[Scope] = "prompt"

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 1:
            raise ValueError(f"k={self.k}: at least one block must see the visual tokens; k counts from 1")

    def acts_at(self, depth: int) -> tuple[int, ...]:
        return (max(1, depth // 2) - 1 if self.k is None else self.k - 1,)

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        nobody = torch.zeros(tokens.batch, 0, dtype=torch.long, device=signals.device)
        return Plan.keep(nobody, tokens.n)
