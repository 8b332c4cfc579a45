"""ToCa: between full steps only the tokens that matter, or have grown old, are computed again. arXiv:2410.05317."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fewer.core import BudgetError, KeepRatio, Plan, Signals, Tokens, reducer, select
from fewer.core.denoising import Moment, StepReducer, best_of_cells, none, shared


@reducer("toca", paper="arXiv:2410.05317", acts="reuse", on="diffusion", training="free")
@dataclass(frozen=True)
class ToCa(StepReducer):
    """Attention is reused between full steps; of an MLP the tokens with the highest score are computed again.

    every: evaluations from one full step to the next, more of them early than late, and two in the second fifth from
    the end; where nobody says how many evaluations there are, always as many.
    ratio: share of the tokens an MLP computes in between, times factors of depth and time (below), rounded down.
    module: factor of the MLP's share; depth, time: weights w of the factors 1 - w + 2 w x, where x is the layer's depth
    from 0 to 1, and 1 + 2 w (1 - 2 l), where l is the share of the run that lies ahead.
    age, bonus, cell: weight of the evaluations since a token was computed; what the best of each cell of so many by so
    many tokens gets on top, as a share of its score.

    Score: the attention a token received at the last full step, where a block has cross-attention instead how widely it
    looked over the words; the same tokens for both branches of guidance.
    """

    every: int = 3
    ratio: float = 0.07
    module: float = 2.5
    depth: float = 0.2
    time: float = 1.0
    age: float = 0.25
    bonus: float = 0.6
    cell: int = 2
    layers: tuple[int, ...] | None = None

    attends = True

    def __post_init__(self) -> None:
        if self.every < 1 or self.cell < 1:
            raise BudgetError(f"every={self.every}, cell={self.cell}: both are at least one")
        if not 0 <= self.ratio <= 1:
            raise BudgetError(
                f"ratio={self.ratio} is outside [0, 1]; it is the share of the tokens computed in between"
            )

    def renews(self, moment: Moment, memory: dict[str, Any]) -> bool:
        if moment.evaluation == 0:
            memory["period"] = self._period(moment)
            return True
        if moment.evaluations is None:
            return moment.evaluation % self.every == 0
        left = moment.evaluations - 1 - moment.evaluation
        period = memory["period"]
        if self.every > 1 and 0.2 * moment.evaluations <= left < 0.4 * moment.evaluations:
            period = 2
        if left % period:
            return False
        memory["period"] = self._period(moment)
        return True

    def _period(self, moment: Moment) -> int:
        if moment.evaluations is None:
            return self.every
        left = (moment.evaluations - 1 - moment.evaluation) / moment.evaluations
        return max(1, round(self.every / (1.4 - 0.8 * left)))

    def share(self, moment: Moment, layer: int, layers: int) -> float:
        """Of the tokens that an MLP computes in between, in [0, 1]."""
        deep = layer / max(layers - 1, 1)
        factor = (1 - self.depth + 2 * self.depth * deep) * (1 + 2 * self.time * (1 - 2 * self._ahead(moment)))
        return min(max(self.ratio * self.module * factor, 0.0), 1.0)

    @staticmethod
    def _ahead(moment: Moment) -> float:
        """The paper's i / S; a half, which makes the factor of time one, where the end is not known."""
        return 0.5 if moment.evaluations is None else (moment.evaluations - 1 - moment.evaluation) / moment.evaluations

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        moment, memory = signals.moment, signals.memory
        if moment.operation == "attention":
            return none(tokens, signals)
        share = self.share(moment, signals.at.layer, signals.at.layers)
        count = int(share * tokens.n)
        age = memory.get("age")
        age = torch.ones(tokens.batch, tokens.n, device=signals.device) if age is None else age + 1
        memory["age"] = age
        if moment.operation == "cross" or not count:
            return none(tokens, signals)
        score = self._score(signals, memory, age)
        plan = select.top(score, KeepRatio(count / tokens.n, rounding="round"), tokens, at=signals.at)
        memory["age"] = age.scatter(1, plan.position, 0.0)
        return plan

    def _score(self, signals: Signals, memory: dict[str, Any], age: Tensor) -> Tensor:
        if "spread" in memory:
            score = F.normalize(1 + memory["spread"], dim=-1)
        elif "received" in memory:
            score = F.normalize(memory["received"], dim=-1)
        else:
            score = F.normalize(signals.hidden.float().norm(dim=-1), dim=-1)
        score = score + self.age * age / self.every
        score = shared(score, signals.moment.branches)
        if self.bonus and signals.grid is not None and min(signals.grid) >= self.cell > 1:
            score = score + self.bonus * score * best_of_cells(score, signals.grid, self.cell)
        return score
