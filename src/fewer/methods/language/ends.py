"""Ends: keep the beginning and the end of a text. The baseline every look at its meaning must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Tokens, reducer, select


@reducer("ends", paper="baseline", acts="prune", on="language", training="free")
@dataclass(frozen=True)
class Ends(Reducer):
    """The first tokens and the last ones stay, the middle goes: StreamingLLM's choice, for encoders.

    budget: share of the first free tokens that stays, to the power of the stage (1, 2, 3), rounded down.
    first: tokens at the beginning that stay before any other, the class token not counted; the rest of the budget
        goes to the end of the text.
    """

    budget: Budget = KeepRatio(0.7, of="start")
    layers: tuple[int, ...] | None = None
    first: int = 4

    def __post_init__(self) -> None:
        if self.first < 0:
            raise ValueError(f"first={self.first}: it counts tokens at the beginning, from 0 up")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        place = tokens.ordinal()
        early = place < signals.prefix + self.first
        score = torch.where(early, float(torch.finfo(torch.float32).max), place.float())
        return select.top(score, self.budget, tokens, at=signals.at)
