"""ToMe: in every block, fold the r most similar token pairs into one. arXiv:2210.09461, sec. 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fewer.core import Budget, Plan, Reducer, Remove, Signals, Tokens, match, reducer


@reducer("tome", paper="arXiv:2210.09461", acts="merge", on="vision", training="optional")
@dataclass(frozen=True)
class ToMe(Reducer):
    """Token merging by bipartite soft matching.

    budget: `Remove(r)` tokens per block, the paper's constant schedule; at most half of the free ones go.
    proportional: later blocks add log(size) to their attention logits, so a row standing for s patches counts s times.
    fidelity: "paper", or "code": without a class token the authors' code leaves the unmerged half in order of
    similarity, which changes who can pair in the next block.
    """

    budget: Budget = Remove(8)
    layers: tuple[int, ...] | None = None
    proportional: bool = True
    fidelity: Literal["paper", "code"] = "paper"

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        order: match.Order = "ranked" if self.fidelity == "code" and not tokens.has_cls else "halves"
        return match.bipartite(signals.key, self.budget, tokens, at=signals.at, order=order)
