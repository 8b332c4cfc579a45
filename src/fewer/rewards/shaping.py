"""Rewards beside a method's own: being right, not running over, not repeating, and weighted sums of several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .batch import Batch, Graded, Reward, RewardError, Rewards, within


@dataclass(frozen=True)
class Correct(Graded):
    """1 for a right answer, 0 for a wrong one: what the length terms are added to."""

    def judge(self, batch: Batch) -> Rewards:
        return [None if right is None else float(right) for right in self.grades(batch)]


@dataclass(frozen=True)
class Overlong(Reward):
    """Soft punishment of running over: 0 up to longest - cache tokens, falling in a line to -1 at `longest`, -1 beyond.

    longest, cache: tokens; the trainer should let at least `longest` of them be written.
    Source   DAPO, arXiv:2503.14476, eq. 13.
    """

    longest: int
    cache: int

    def __post_init__(self) -> None:
        if not 0 < self.cache <= self.longest:
            raise RewardError(
                f"cache={self.cache} is outside (0, {self.longest}]: it is the part of longest={self.longest} tokens "
                "in which the punishment grows"
            )

    def judge(self, batch: Batch) -> Rewards:
        free = self.longest - self.cache
        return [-min(max(n - free, 0) / self.cache, 1.0) for n in batch.lengths]


@dataclass(frozen=True)
class Repetition(Reward):
    """Punishment of repeated token n-grams: `most` times the share of n-grams that stood in the completion before.

    n: tokens of an n-gram; shorter completions get 0. most: what a completion of nothing but repeats tends to, <= 0.
    Source   Demystifying Long Chain-of-Thought Reasoning, arXiv:2502.03373, app. C.2.
    """

    n: int = 3
    most: float = -1.0

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or self.n < 1:
            raise RewardError(f"n={self.n!r}: an n-gram has a whole number of tokens, from 1 up")
        within("most", self.most, -math.inf, 0, "a positive one would reward repeating; give it a minus sign")

    def judge(self, batch: Batch) -> Rewards:
        _ = batch.lengths  # says so where there are no tokens
        assert batch.ids is not None
        return [self.most * repeated(ids, self.n) for ids in batch.ids]


def repeated(ids: Sequence[int], n: int) -> float:
    """The share of a sequence's n-grams that are not the first of their kind; 0 where it has none."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class Cosine(Graded):
    """A reward that moves along half a cosine with the length: right answers lose by it, wrong ones gain.

    longest: tokens at which the far end is reached. right, wrong: reward of an empty answer, and of one of `longest`
    tokens. over: reward of a longer one, right or wrong.
    Source   Demystifying Long Chain-of-Thought Reasoning, arXiv:2502.03373, sec. 4; the defaults are the paper's, from
             memory.
    """

    longest: int
    right: tuple[float, float] = (2.0, 1.0)
    wrong: tuple[float, float] = (-10.0, 0.0)
    over: float = -10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        within("longest", self.longest, 1, math.inf, "it is a number of tokens")
        if self.right[0] < self.right[1]:
            raise RewardError(f"right={self.right} rewards long right answers: the first number is that of a short one")
        if self.wrong[0] > self.wrong[1]:
            raise RewardError(f"wrong={self.wrong} rewards giving up early: the first number is that of a short answer")

    def judge(self, batch: Batch) -> Rewards:
        return [
            None if right is None else self._one(right, n)
            for right, n in zip(self.grades(batch), batch.lengths, strict=True)
        ]

    def _one(self, right: bool, n: int) -> float:
        if n > self.longest:
            return self.over
        start, end = self.right if right else self.wrong
        return end + (start - end) * (1 + math.cos(math.pi * n / self.longest)) / 2


@dataclass(frozen=True)
class Sum(Reward):
    """A weighted sum of rewards, as one: summed first, compared within the group afterwards.

    parts: rewards of this package, or any callables of TRL's kind. weights: one each; None: 1 each.
    A part that does not judge an answer adds nothing; where none does, neither does the sum.

    The order matters: see `fewer.rewards.grpo.normalised_each`, which compares first.
    """

    parts: tuple[Callable[..., Rewards], ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            raise RewardError("a sum of no rewards: give at least one part")
        if self.weights is not None and len(self.weights) != len(self.parts):
            raise RewardError(f"{len(self.weights)} weights for {len(self.parts)} parts: give one for each, or None")

    @property
    def __name__(self) -> str:
        return "+".join(getattr(part, "__name__", type(part).__name__) for part in self.parts)

    def __call__(
        self, prompts: Sequence[Any] | None = None, completions: Sequence[Any] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None, **columns: Any,
    ) -> Rewards:  # fmt: skip
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        return self._add([list(part(**given)) for part in self.parts])

    def _add(self, judged: list[Rewards]) -> Rewards:
        weights = self.weights or (1.0,) * len(self.parts)
        total: Rewards = []
        for row in zip(*judged, strict=True):
            told = [weight * value for weight, value in zip(weights, row, strict=True) if value is not None]
            total.append(sum(told) if told else None)
        return total
