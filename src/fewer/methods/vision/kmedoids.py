"""K-Medoids (Token Pooling): cluster centres weighted by attention stand for their clusters. arXiv:2110.03860."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Tokens, cluster, reducer


@reducer("kmedoids", paper="arXiv:2110.03860", acts="merge", on="vision", training="optional")
@dataclass(frozen=True)
class KMedoids(Reducer):
    """Weighted k-medoids of the features; the tokens that attention favours start as centres.

    budget: share of the first free tokens that stays, to the power of the stage (1, 2, 3), rounded down.
    weight: "mass" = attention received from all queries, the paper's significance; "cls" = from the class token only
    (without one: from all queries). Ranks the first centres and weighs distances and averages.
    iterations: rounds of assigning and choosing new centres.
    output: "mean" = a row is the weighted mean of its cluster; "medoid" = its centre as it is.
    """

    budget: Budget = KeepRatio(0.7, of="start")
    layers: tuple[int, ...] | None = (3, 6, 9)
    weight: Literal["mass", "cls"] = "mass"
    iterations: int = 3
    output: Literal["mean", "medoid"] = "mean"

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"KMedoids(iterations={self.iterations}): at least one round is needed")
        if self.weight not in ("mass", "cls"):
            raise ValueError(f"KMedoids(weight={self.weight!r}): choose mass or cls")
        if self.output not in ("mean", "medoid"):
            raise ValueError(f"KMedoids(output={self.output!r}): choose mean or medoid")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        weight = signals.attention_mass().mean(dim=1) if self.weight == "mass" else signals.saliency
        return cluster.kmedoids(
            signals.hidden, self.budget, tokens, at=signals.at, weight=weight, iterations=self.iterations,
            output=self.output,
        )  # fmt: skip
