"""CoT-Influx (Huang et al., EMNLP 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer
from fewer.core.written import Unit, Written, fill, goal, leading, plan, pooled


@reducer("influx", paper="arXiv:2312.08901", acts="prune", on="text", training="required")
@dataclass(frozen=True)
class Influx(Reducer):
    """Whole examples leave a prompt, then tokens of those that stay, by a policy that learned from rewards.

    Each context is an example. They come in by their probability of staying, until as many of their tokens stay, as
    the policy expects, as shall be left; tokens of these follow by theirs. An example that stays keeps its first tokens
    and its last line, which holds the answer.

    budget: share of the free tokens that stays. first: tokens at the start of an example that stay with it. line:
    whether its last line, or sentence, does. unit: what stays or goes as one; its score is the mean over its tokens.

    The reader is an `ExemplarPruner`, as `fewer train influx` makes it: its two policies see the examples alone, not
    the question. The authors' code draws the actions; here the probabilities rank, so that a prompt comes out the same.
    """

    budget: Budget = KeepRatio(0.5)
    layers: tuple[int, ...] | None = None
    first: int = 3
    line: bool = True
    unit: Unit = "token"
    site: ClassVar[Site] = Site.TEXT
    needs_reader: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.first < 0:
            raise ValueError(f"first={self.first}: so many tokens of an example stay with it, 0 or more")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        written = signals.written
        count, free = goal(self.budget, tokens, signals.at)
        unit = written.unit(self.unit)
        score = pooled(written.reader.wanted, unit, free)
        example = written.reader.relevance
        belongs = free & framed(written, free, self.first, self.line)
        mean, number = written.by_part(torch.where(belongs, 1.0, score), free)
        size = (mean * number).nan_to_num(0.0)  # of an example, the tokens that the policy would draw, on average
        there = free & leading(example, size, count).gather(-1, written.context)
        rank = torch.where(belongs, 2.0, score)  # above any probability
        signals.memory["score"] = rank.masked_fill(~there, float("nan"))
        return plan(fill(rank, unit, count, there), tokens)


def framed(written: Written, free: Tensor, first: int, line: bool) -> Tensor:
    """(B, N) bool: the first tokens of each context, and its last sentence. free: (B, N) bool, tokens of contexts."""
    context = written.context
    found = torch.zeros_like(free)
    sentence = written.unit("sentence") if line else None
    for part in range(int(context.masked_fill(~free, 0).amax()) + 1):
        mine = free & (context == part)
        found |= mine & (mine.long().cumsum(-1) <= first)
        if sentence is not None:
            last = sentence.masked_fill(~mine, -1).amax(-1, keepdim=True)
            found |= mine & (sentence == last)
    return found
