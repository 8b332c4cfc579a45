"""Selective Context (Li et al., EMNLP 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer
from fewer.core.written import Unit, fill, goal, plan, pooled


@reducer("selective_context", paper="arXiv:2310.06201", acts="prune", on="text", training="free")
@dataclass(frozen=True)
class SelectiveContext(Reducer):
    """The phrases of the least self-information leave.

    budget: share of the free tokens that stays. unit: what stays or goes as one; its score is the mean over its tokens.
    context: what a token's information is taken given: its own "sentence" so far (the paper), or the "text" so far,
    which also sees that a sentence says what another has said.

    The paper's threshold is a percentile of the values; here units leave by rank, so that many equal ones cannot miss
    the share, and the share is one of tokens, not of units.
    """

    budget: Budget = KeepRatio(0.65)
    layers: tuple[int, ...] | None = None
    unit: Unit = "phrase"
    context: Literal["sentence", "text"] = "sentence"
    site: ClassVar[Site] = Site.TEXT

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        written = signals.written
        count, free = goal(self.budget, tokens, signals.at)
        reader, unit = written.reader, written.unit(self.unit)
        information = reader.surprisal if self.context == "text" else reader.apart(written.sentence)
        score = signals.memory["score"] = pooled(information, unit, free)
        return plan(fill(score, unit, count, free), tokens)
