"""FORA: what attention and MLPs gave is used again for a few steps. arXiv:2407.01425."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fewer.core import BudgetError, reducer
from fewer.core.denoising import Moment, StepReducer


@reducer("fora", paper="arXiv:2407.01425", acts="reuse", on="diffusion", training="free")
@dataclass(frozen=True)
class FORA(StepReducer):
    """Every so many evaluations all is computed; in between every operation gives what it gave then.

    every: evaluations from one that computes to the next; 1 computes always. What is reused stands in front of the
    block's own gates, which go with the time.
    """

    every: int = 3
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise BudgetError(f"every={self.every}: an evaluation in so many computes, at least one in one")

    def renews(self, moment: Moment, memory: dict[str, Any]) -> bool:
        return moment.evaluation % self.every == 0
