"""LongLLMLingua (Jiang et al., ACL 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer
from fewer.core.written import BEHIND, Unit, goal, leading, plan, shares, stepwise

Order = Literal["best", "ends", "original"]


@reducer("longllmlingua", paper="arXiv:2310.06839", acts="prune", on="text", training="free")
@dataclass(frozen=True)
class LongLLMLingua(Reducer):
    """Documents by how well they foretell the question, and in them the tokens that it makes less surprising.

    budget: share of the free tokens that stays. segment: tokens that are ranked together. slack: documents come in,
    best first, until they hold so many times the tokens that stay. ramp: how much more of the best document stays than
    of the middle one, and of the worst less. order: of the documents that stay: the best first; the best at both ends;
    or as they stood. unit: what stays or goes as one.
    """

    budget: Budget = KeepRatio(0.5)
    layers: tuple[int, ...] | None = None
    segment: int = 200
    slack: float = 2.0
    ramp: float = 0.3
    order: Order = "best"
    unit: Unit = "token"
    site: ClassVar[Site] = Site.TEXT

    def __post_init__(self) -> None:
        if self.segment < 1 or self.slack < 1:
            raise ValueError(f"segment={self.segment}, slack={self.slack}: both are 1 or more")
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp={self.ramp} is outside [0, 1]; 0 keeps the same share of each document")
        if self.order not in ("best", "ends", "original"):
            raise ValueError(f"order={self.order!r}: choose best, ends or original")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        written = signals.written
        count, free = goal(self.budget, tokens, signals.at)
        relevance = written.reader.relevance
        _, size = written.by_part(free.float(), free)
        chosen = leading(relevance, size, self.slack * count)
        rank = relevance.masked_fill(~chosen, -float("inf")).argsort(dim=-1, descending=True, stable=True).argsort(-1)
        there = free & chosen.gather(-1, written.context)
        among = chosen.sum(-1, keepdim=True)
        base = count[:, None] / (size * chosen).sum(-1, keepdim=True).clamp(min=1)
        weight = (base + self.ramp * (1 - 2 * rank / among.clamp(min=1))).clamp(1e-3, 1)
        share = shares(count, there, weight.gather(-1, written.context) * there)
        stays, score = stepwise(written, tokens, share, written.unit(self.unit), segment=self.segment, asked=True)
        signals.memory["score"] = score
        return plan(stays, tokens, self._places(written.part, rank, among))

    def _places(self, part: Tensor, rank: Tensor, among: Tensor) -> Tensor | None:
        """(B, N) long: where each token's document shall stand."""
        if self.order == "original":
            return None
        place = rank if self.order == "best" else torch.where(rank % 2 == 0, rank // 2, 2 * among - rank)
        inside = (part >= 0) & (part < BEHIND)
        return torch.where(inside, place.gather(-1, part.clamp(0, place.shape[-1] - 1)), part)
