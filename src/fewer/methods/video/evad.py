"""EVAD: the key frame stays whole, of the others what it and they attend to. arXiv:2304.08451, sec. 3.2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fewer.core import Budget, Group, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer, select

ALWAYS = 1e9  # above any attention


@reducer("evad", paper="arXiv:2304.08451", acts="prune", on="video", training="optional")
@dataclass(frozen=True)
class EVAD(Reducer):
    """Efficient video action detection: tokens outside the key frame leave by the attention they receive.

    budget: share of the tokens that stays, those of the key frame among them, rounded up; at least the key frame while
        the budget reaches that far.
    key: the frame of patches that stays whole; None = the middle one, T // 2.
    weight: how often a row of the attention counts whose query is in the key frame; the others count once.

    The decoder that puts pruned tokens' context back for boxes is a detection head and no part of this.
    """

    budget: Budget = KeepRatio(0.7, rounding="ceil")
    layers: tuple[int, ...] | None = (3, 6, 9)
    key: int | None = None
    weight: float = 1.0
    site: ClassVar[Site] = Site.MID_BLOCK

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight={self.weight}: queries of the key frame count 0 times or more")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        frames, height, width = signals.space
        key = frames // 2 if self.key is None else self.key
        if not 0 <= key < frames:
            raise ValueError(f"evad:key={key}: the clip has frames of patches 0 to {frames - 1}")
        mine = (signals.plane == key) & (tokens.ordinal() >= signals.prefix)
        score = signals.attention_mass().mean(1)
        if self.weight != 1 and frames > 1:
            if tokens.irregular:
                raise ValueError("evad:weight takes samples of one length; leave it at 1 behind ragged reductions")
            cells = height * width  # all of them are there, side by side
            first = mine.to(score.dtype).argmax(-1, keepdim=True)
            place = first + torch.arange(cells, device=score.device)
            score = score + (self.weight - 1) * signals.attention_mass(Group(index=place)).mean(1)
        if frames > 1:
            score = score.masked_fill(mine, ALWAYS)
        return select.top(score, self.budget, tokens, at=signals.at)
