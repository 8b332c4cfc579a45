"""DuCa: between full steps those that compute a few tokens and those that compute none take turns. arXiv:2412.18911."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.nn import functional as F

from fewer.core import BudgetError, KeepRatio, Plan, Signals, Tokens, reducer, select
from fewer.core.denoising import Moment, StepReducer, best_of_cells, none, shared


@reducer("duca", paper="arXiv:2412.18911", acts="reuse", on="diffusion", training="free")
@dataclass(frozen=True)
class DuCa(StepReducer):
    """Behind a full step the first reuses everything, the next computes the MLPs of some tokens, and so on in turn.

    every: evaluations from one full step to the next.
    ratio: share of the tokens that the MLPs compute at every second step in between, rounded down.
    bonus, cell: what the best token of each cell gets on top, as a share of its score.

    Score: the shorter a row that enters the MLP, the higher, so that no map of attention is asked and fused attention
    stays; the same tokens for both branches of guidance.
    """

    every: int = 3
    ratio: float = 0.2
    bonus: float = 0.8
    cell: int = 2
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or self.cell < 1:
            raise BudgetError(f"every={self.every}, cell={self.cell}: both are at least one")
        if not 0 <= self.ratio <= 1:
            raise BudgetError(
                f"ratio={self.ratio} is outside [0, 1]; it is the share of the tokens computed in between"
            )

    def renews(self, moment: Moment, memory: dict[str, Any]) -> bool:
        return moment.evaluation % self.every == 0

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        moment = signals.moment
        count = int(self.ratio * tokens.n)
        if moment.operation != "mlp" or (moment.evaluation % self.every) % 2 or not count:
            return none(tokens, signals)
        score = shared(1 - F.normalize(signals.hidden.float().norm(dim=-1), dim=-1), moment.branches)
        if signals.grid is not None and min(signals.grid) >= self.cell > 1:
            score = score + self.bonus * score * best_of_cells(score, signals.grid, self.cell)
        return select.top(score, KeepRatio(count / tokens.n, rounding="round"), tokens, at=signals.at)
