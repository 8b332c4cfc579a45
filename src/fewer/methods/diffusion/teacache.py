"""TeaCache: the stack is run again when what enters it has moved far enough. arXiv:2411.19108."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewer.core import BudgetError, Signals, reducer
from fewer.core.denoising import StepReducer, near


@reducer("teacache", paper="arXiv:2411.19108", acts="reuse", on="diffusion", training="free")
@dataclass(frozen=True)
class TeaCache(StepReducer):
    """What the first block's attention is given is compared with that of the evaluation before; while the sum of its
    moves stays below a threshold, what the whole stack added at the last full evaluation is added again.

    threshold: of that sum; 0 computes always.
    scale: the coefficients of a polynomial in the move, the highest power first, that a model was calibrated with; by
    default the move itself.

    The first evaluation is full, and the last where it is known. Each evaluation reads one number from the device, one
    for the whole batch.
    """

    threshold: float = 0.25
    scale: tuple[float, ...] = (1.0, 0.0)

    whole: ClassVar[bool] = True
    early: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise BudgetError(f"threshold={self.threshold} is negative; it is a sum of shares, 0.25 for a quarter")

    def holds(self, signals: Signals) -> bool:
        memory, moment = signals.memory, signals.moment
        before, memory["entered"] = memory.get("entered"), signals.hidden.detach()
        ends = moment.evaluation == 0 or moment.evaluation + 1 == moment.evaluations
        if ends or before is None or before.shape != signals.hidden.shape:
            memory["moved"] = 0.0
            return False
        move = float(near(signals.hidden.float(), before.float()))
        moved = 0.0
        for coefficient in self.scale:
            moved = moved * move + coefficient
        memory["moved"] = memory.get("moved", 0.0) + moved
        if memory["moved"] < self.threshold:
            return True
        memory["moved"] = 0.0
        return False
