"""ATC: agglomerative clustering of the keys, bottom up. arXiv:2409.11923."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Tokens, cluster, reducer


@reducer("atc", paper="arXiv:2409.11923", acts="merge", on="vision", training="optional")
@dataclass(frozen=True)
class ATC(Reducer):
    """Agglomerative token clustering: the two closest clusters become one until the budget is met.

    budget: share of the first free tokens that stays, to the power of the stage (1, 2, 3), rounded down.
    linkage: distance of two clusters, from 1 - cosine of their members' keys: "average" (mean of all pairs),
    "complete" (farthest pair) or "single" (nearest pair).
    proportional: later blocks add log(size) to their attention logits.
    fidelity: "paper", or "code": there, without proportional attention sizes are forgotten between layers, so that
    later averages are unweighted.

    More than 3,072 free tokens are cut into even runs, each of which merges its share of the pairs by itself: an
    approximation, which the ledger notes.
    """

    budget: Budget = KeepRatio(0.7, of="start")
    layers: tuple[int, ...] | None = (3, 6, 9)
    linkage: cluster.Linkage = "average"
    proportional: bool = True
    fidelity: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        if self.linkage not in cluster.LINKAGES:
            raise ValueError(f"ATC(linkage={self.linkage!r}): choose one of {', '.join(cluster.LINKAGES)}")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        if self.fidelity == "code" and not self.proportional:
            tokens = tokens.unsized()
        return cluster.agglomerative(signals.key, self.budget, tokens, at=signals.at, linkage=self.linkage)
