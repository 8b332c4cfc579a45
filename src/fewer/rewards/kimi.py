"""Kimi k1.5's length reward: within a group, short earns and long pays. arXiv:2501.12599, sec. 2.3.3."""

from __future__ import annotations

from dataclasses import dataclass

from .batch import Batch, Grouped, RewardError, Rewards, within


@dataclass(frozen=True)
class Kimi(Grouped):
    """A term to be added to being right, between -weight / 2 and weight / 2.

    With lam = 0.5 - (length - shortest) / (longest - shortest) within the group: a right answer gets weight * lam, a
    wrong one weight * min(0, lam), so that being brief never pays for it. 0 where all of a group are equally long.

    weight: against 1 for a right answer. warmup: optimiser steps without this term, by the trainer's state, for the
    paper found it to slow down the start.
    Source   Kimi k1.5, arXiv:2501.12599, sec. 2.3.3; from memory.
    """

    weight: float = 1.0
    warmup: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        within("weight", self.weight, 0, float("inf"), "a negative one would reward length; 0 leaves the term out")
        if not isinstance(self.warmup, int) or self.warmup < 0:
            raise RewardError(f"warmup={self.warmup!r}: needs a whole number of steps, from 0 up")

    def judge(self, batch: Batch) -> Rewards:
        grades, lengths = self.grades(batch), batch.lengths
        weight = 0.0 if self._warming(batch) else self.weight
        found: Rewards = [None] * len(batch)
        for group in batch.groups(self.num_generations):
            judged = [i for i in group if grades[i] is not None]
            if not judged:
                continue
            low, high = min(lengths[i] for i in judged), max(lengths[i] for i in judged)
            for i in judged:
                lam = 0.5 - (lengths[i] - low) / (high - low) if high > low else 0.0
                found[i] = weight * (lam if grades[i] else min(0.0, lam))
        return found

    def _warming(self, batch: Batch) -> bool:
        if not self.warmup:
            return False
        if batch.columns.get("trainer_state") is None:
            raise RewardError(
                f"warmup={self.warmup} counts steps, and no trainer_state says how many were made: TRL passes it; "
                "elsewhere pass one with global_step and max_steps, or warmup=0"
            )
        return batch.steps[0] < self.warmup
