"""L1 / LCPO: answers of a length that the prompt asks for, exactly or at most. arXiv:2503.04697.

told(1024, "max")                # goes to the end of each prompt; the number itself into the column "num_tokens"
LCPO("max")
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from .batch import Batch, Graded, RewardError, Rewards, within

Mode = Literal["exact", "max"]


@dataclass(frozen=True)
class LCPO(Graded):
    """Right answers earn by how well their length fits the number of tokens that was asked for.

    mode      "exact": right - alpha * |asked - length|, and wrong answers are held to the length, too.
              "max": right * clip(alpha * (asked - length) + delta, 0, 1)
    alpha     how much a token counts. delta: what a right answer of just the length asked for earns ("max")
    asked     the column with the numbers of tokens
    fidelity  "paper", or "code": for "max" the authors have right * (clip(alpha * (asked - length), -1, 1) + 1) / 2
    Source    L1, arXiv:2503.04697.
    """

    mode: Mode = "exact"
    alpha: float = 3e-4
    delta: float = 0.5
    asked: str = "num_tokens"
    fidelity: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        _mode(self.mode)
        if self.fidelity not in ("paper", "code"):
            raise RewardError(f"fidelity={self.fidelity!r} is neither 'paper' nor 'code'")
        within("alpha", self.alpha, 0, math.inf, "a token must count something; the paper has 3e-4", open_low=True)
        within("delta", self.delta, 0, 1, "it is what a right answer of just the length asked for earns")

    def judge(self, batch: Batch) -> Rewards:
        asked = batch.column(self.asked)
        for i, n in enumerate(asked):
            if n is None or not n > 0:
                raise RewardError(f"{self.asked}[{i}]={n}: asks for no length; needs tokens, above 0 (use mode='max' "
                                  "for at most, never a negative number)")  # fmt: skip
        rows = zip(self.grades(batch), batch.lengths, asked, strict=True)
        return [None if right is None else self._one(right, n, wanted) for right, n, wanted in rows]

    def _one(self, right: bool, n: int, asked: float) -> float:
        if self.mode == "exact":
            return right - self.alpha * abs(asked - n)
        spare = self.alpha * (asked - n)
        if self.fidelity == "code":
            return right * (min(max(spare, -1.0), 1.0) + 1) / 2
        return right * min(max(spare + self.delta, 0.0), 1.0)


def draw(count: int, low: int = 100, high: int = 4000, *, generator: torch.Generator | None = None) -> list[int]:
    """Lengths to ask for: whole numbers of tokens, each from low to high with equal chances, as in the paper."""
    if not 0 < low <= high:
        raise RewardError(f"lengths from {low} to {high}: needs 0 < low <= high")
    return torch.randint(low, high + 1, (count,), generator=generator).tolist()


def told(asked: int, mode: Mode = "exact") -> str:
    """What a prompt says at its end about the length. Ours; the same words in training and use."""
    return f" Use {'exactly' if _mode(mode) == 'exact' else 'no more than'} {asked} tokens to think."


def _mode(mode: str) -> str:
    if mode not in ("exact", "max"):
        raise RewardError(f"mode={mode!r} is neither 'exact' nor 'max'")
    return mode
