"""LLMLingua (Jiang et al., EMNLP 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer
from fewer.core.lingua import SPARE, coded
from fewer.core.written import Unit, goal, leading, plan, shares, stepwise


@reducer("llmlingua", paper="arXiv:2310.05736", acts="prune", on="text", training="free")
@dataclass(frozen=True)
class LLMLingua(Reducer):
    """Of every segment the tokens stay that surprise a small language model most, given what stayed before.

    Where there are several contexts, those of the highest perplexity come first, until they hold `slack` times the
    tokens that stay; the others leave as wholes.

    budget: share of the free tokens that stays. segment: tokens that are ranked together. slack: of the choice of
    contexts, the paper's k. unit: what stays or goes as one.
    fidelity: "paper"; or "code", in which a token stays for what the one behind it is worth, by a quantile of all
    scores so far, what is behind the last whole segment stays, and contexts are chosen up to a hundred tokens beyond
    the budget: the count is missed, by much in short texts, and tokens alone are units.
    """

    budget: Budget = KeepRatio(0.5)
    layers: tuple[int, ...] | None = None
    segment: int = 200
    slack: float = 2.0
    unit: Unit = "token"
    fidelity: Literal["paper", "code"] = "paper"
    site: ClassVar[Site] = Site.TEXT
    needs_reader: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.segment < 1 or self.slack < 1:
            raise ValueError(f"segment={self.segment}, slack={self.slack}: both are 1 or more")
        if self.fidelity not in ("paper", "code"):
            raise ValueError(f"fidelity={self.fidelity!r}: choose 'paper' or 'code'")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        written = signals.written
        count, free = goal(self.budget, tokens, signals.at)
        there = free
        if bool((written.context != 0).any()):
            surprisal, size = written.by_part(written.reader.apart(written.part), free)
            there = free & leading(surprisal, size, self._limit(count)).gather(-1, written.context)
        if self.fidelity == "code":
            return plan(coded(written, tokens, there, count, segment=self.segment), tokens)
        share = shares(count, there, there.float())
        stays, score = stepwise(written, tokens, share, written.unit(self.unit), segment=self.segment)
        signals.memory["score"] = score
        return plan(stays, tokens)

    def _limit(self, count: Tensor) -> Tensor:
        """Tokens that contexts are taken up to."""
        return count + SPARE if self.fidelity == "code" else self.slack * count
