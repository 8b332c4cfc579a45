"""ATS: sample tokens by the inverse of their score distribution; each image keeps its own number. arXiv:2111.15667."""

from __future__ import annotations

from dataclasses import dataclass

from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Tokens, match, reducer, select


@reducer("ats", paper="arXiv:2111.15667", acts="prune", on="vision", training="optional")
@dataclass(frozen=True)
class ATS(Reducer):
    """Adaptive token sampling: fixed points are pushed through the inverse of the cumulated scores.

    budget: points sampled at each layer, the most that can stay. Tokens hit more than once stay once, so images with
    peaked scores keep fewer. As many points as there were tokens in the input ask for nothing and change nothing. The
    default share is ours: the paper sets the number by the cost it aims at.
    layers: the paper's, 3 and all that follow, of 12.
    fidelity: of the points, "paper" or "code"; see `select.sampled`.

    The score is the class token's attention times the norm of the value, all heads together. A model without a class
    token is scored by the attention each token receives from all queries; the paper says nothing about such models.
    """

    budget: Budget = KeepRatio((0.7,), of="start")
    layers: tuple[int, ...] | None = tuple(range(3, 12))
    fidelity: match.Fidelity = "paper"

    @property
    def adaptive(self) -> bool:
        return True

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        at = signals.at
        if not self.budget.adaptive and at.starts is None and self.budget.keep(at.start, at) == at.start:
            return tokens.unchanged(signals.device)
        score = signals.saliency * signals.value_norm
        whole = None
        if not self.budget.adaptive and at.starts is not None:
            whole = self.budget.granted(at.starts, at.start, at) == at.starts
        return select.sampled(score, self.budget, tokens, at=at, fidelity=self.fidelity, whole=whole)
