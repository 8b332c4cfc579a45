"""LLMLingua (Jiang et al., EMNLP 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer
from fewer.core.written import Unit, goal, leading, plan, shares, stepwise


@reducer("llmlingua", paper="arXiv:2310.05736", acts="prune", on="text", training="free")
@dataclass(frozen=True)
class LLMLingua(Reducer):
    """Of every segment the tokens stay that surprise a small language model most, given what stayed before.

    Where there are several contexts, those of the highest perplexity come first, until they hold `slack` times the
    tokens that stay; the others leave as wholes.

    budget: share of the free tokens that stays. segment: tokens that are ranked together. slack: of the choice of
    contexts, the paper's k. unit: what stays or goes as one.
    """

    budget: Budget = KeepRatio(0.5)
    layers: tuple[int, ...] | None = None
    segment: int = 200
    slack: float = 2.0
    unit: Unit = "token"
    site: ClassVar[Site] = Site.TEXT

    def __post_init__(self) -> None:
        if self.segment < 1 or self.slack < 1:
            raise ValueError(f"segment={self.segment}, slack={self.slack}: both are 1 or more")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        written = signals.written
        count, free = goal(self.budget, tokens, signals.at)
        there = free
        if bool((written.context != 0).any()):
            surprisal, size = written.by_part(written.reader.surprisal, free)
            there = free & leading(surprisal, size, self.slack * count).gather(-1, written.context)
        share = shares(count, there, there.float())
        stays, score = stepwise(written, tokens, share, written.unit(self.unit), segment=self.segment)
        signals.memory["score"] = score
        return plan(stays, tokens)
