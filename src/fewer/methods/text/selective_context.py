"""Selective Context (Li et al., EMNLP 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, reducer
from fewer.core.written import Unit, fill, goal, plan, pooled, share_of


@reducer("selective_context", paper="arXiv:2310.06201", acts="prune", on="text", training="free")
@dataclass(frozen=True)
class SelectiveContext(Reducer):
    """The phrases of the least self-information leave.

    budget: share of the free tokens that stays. unit: what stays or goes as one; its score is the mean over its tokens.
    context: what a token's information is taken given: its own "sentence" so far (the paper), or the "text" so far,
    which also sees that a sentence says what another has said.

    fidelity: "paper", by rank, so that many equal units cannot miss the share, which is one of tokens; or "code", in
    which units leave that are below a percentile of the scores of all units.
    """

    budget: Budget = KeepRatio(0.65)
    layers: tuple[int, ...] | None = None
    unit: Unit = "phrase"
    context: Literal["sentence", "text"] = "sentence"
    fidelity: Literal["paper", "code"] = "paper"
    site: ClassVar[Site] = Site.TEXT
    needs_reader: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.context not in ("sentence", "text"):
            raise ValueError(f"context={self.context!r}: choose 'sentence' or 'text'")
        if self.fidelity not in ("paper", "code"):
            raise ValueError(f"fidelity={self.fidelity!r}: choose 'paper' or 'code'")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        written = signals.written
        count, free = goal(self.budget, tokens, signals.at)
        reader, unit = written.reader, written.unit(self.unit)
        information = reader.surprisal if self.context == "text" else reader.apart(written.unit("sentence"))
        score = signals.memory["score"] = pooled(information, unit, free)
        if self.fidelity == "code":
            stays = torch.zeros_like(free)
            for row, share in enumerate(share_of(self.budget, count, free).tolist()):
                stays[row, free[row]] = not_below(score[row, free[row]], unit[row, free[row]], share)
            return plan(stays, tokens)
        return plan(fill(score, unit, count, free), tokens)


def not_below(scores: Tensor, unit: Tensor, share: float) -> Tensor:
    """(n,) bool: which tokens are of units that the code keeps. scores, unit: (n,), of tokens, ascending."""
    first = torch.cat([torch.ones_like(unit[:1], dtype=torch.bool), unit[1:] != unit[:-1]])
    return scores.double() >= scores[first].double().nanquantile(1 - share)
