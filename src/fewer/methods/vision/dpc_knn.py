"""DPC-KNN: density peaks are the centres, the others join the nearest. TCFormer, arXiv:2204.08680, sec. 3.2."""

from __future__ import annotations

from dataclasses import dataclass

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Tokens, cluster, reducer


@reducer("dpc_knn", paper="arXiv:2204.08680", acts="merge", on="vision", training="optional")
@dataclass(frozen=True)
class DPCKNN(Reducer):
    """Density-peak clustering of the features, merged with weights exp(attention).

    budget: share of the first free tokens that stays, to the power of the stage (1, 2, 3), rounded down.
    neighbours: how many nearest tokens, itself included, give a token its density.

    The paper learns the score of the weights; without training it is the class token's attention, and without a class
    token the attention received from all queries. No noise is added to the densities: ties go to the earlier token.
    """

    budget: Budget = KeepRatio(0.7, of="start")
    layers: tuple[int, ...] | None = (3, 6, 9)
    neighbours: int = 5

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise ValueError(f"DPCKNN(neighbours={self.neighbours}): a density needs at least one neighbour")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        weight = signals.saliency.exp()
        return cluster.dpc_knn(
            signals.hidden, self.budget, tokens, at=signals.at, neighbours=self.neighbours, weight=weight
        )
