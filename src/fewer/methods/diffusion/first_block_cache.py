"""First-block cache: the first block tells whether the others need to run. ParaAttention, 2024; also in diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewer.core import BudgetError, Signals, reducer
from fewer.core.denoising import StepReducer, near


@reducer("first_block_cache", paper="github.com/chengzeyi/ParaAttention", acts="reuse", on="diffusion", training="free")
@dataclass(frozen=True)
class FirstBlockCache(StepReducer):
    """Where what the first block adds is near to what it added at the last full evaluation, what the others added then
    is added again.

    threshold: of the move, as a share; 0 computes always.

    Each evaluation reads one number from the device, one for the whole batch.
    """

    threshold: float = 0.05

    whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise BudgetError(f"threshold={self.threshold} is negative; it is a share, 0.05 for a twentieth")

    def holds(self, signals: Signals) -> bool:
        before = signals.memory.get("first")
        if before is None or before.shape != signals.hidden.shape or not self.threshold:
            return False
        return bool(near(signals.hidden.float(), before.float()) <= self.threshold)

    def renewed(self, signals: Signals) -> None:
        signals.memory["first"] = signals.hidden.detach()
