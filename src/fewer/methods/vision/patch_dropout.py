"""PatchDropout (Liu et al., WACV 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer, select


@reducer("patch_dropout", paper="arXiv:2208.07220", acts="prune", on="vision", training="free",
         exempt={"budget_is_met": "it acts while a model is trained and at no other time"})  # fmt: skip
@dataclass(frozen=True)
class PatchDropout(Reducer):
    """While a model is trained it sees some patches of each picture, drawn anew; later it sees all.

    budget: share of the patches that stays. In evaluation mode nothing leaves: the saving is in training. The draw is
    torch's own, so its seed is set with `torch.manual_seed`.
    """

    budget: Budget = KeepRatio(0.5)
    layers: tuple[int, ...] | None = (0,)
    site: ClassVar[Site] = Site.BEFORE_BLOCK

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        if not signals.training:
            return tokens.unchanged(signals.device)
        draw = torch.rand(tokens.batch, tokens.n, device=signals.device)
        return select.top(draw, self.budget, tokens, at=signals.at)
