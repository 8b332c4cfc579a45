"""DAST: a token budget by how hard a question is, and preferences for answers that keep to it. arXiv:2503.04472.

`DAST` is the score as a reward; `budget`, `score` and `pairs` are its parts, for data for SimPO as in the paper:

    scores = [score(right, n, budget(rights, lengths, longest=4096)) for right, n in zip(rights, lengths)]
    pairs(scores, rights, gap=0.3)     # [(better, worse), ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .batch import Batch, Grouped, RewardError, Rewards, within


def budget(rights: Sequence[bool], lengths: Sequence[int], longest: int) -> float:
    """How many tokens a question deserves: p * (mean length of the right answers) + (1 - p) * longest, p = share right.

    rights, lengths: of the answers to one question; lengths and longest in tokens.
    Source   DAST, arXiv:2503.04472.
    """
    if not rights or len(rights) != len(lengths):
        raise RewardError(f"{len(rights)} grades and {len(lengths)} lengths: needs one of each, of one answer or more")
    own = [n for right, n in zip(rights, lengths, strict=True) if right]
    p = len(own) / len(rights)
    return (p * sum(own) / len(own) if own else 0.0) + (1 - p) * longest


def score(right: bool, length: int, deserved: float) -> float:
    """What an answer is worth. With lam = (length - deserved) / deserved: right max(0.5 - 0.5 lam, 0.1), wrong
    min(0.9 lam - 0.1, -0.1). Every right answer is worth more than every wrong one; wrong ones may take their budget.

    Source   DAST, arXiv:2503.04472; the constants from memory.
    """
    lam = (length - deserved) / deserved
    return max(0.5 - 0.5 * lam, 0.1) if right else min(0.9 * lam - 0.1, -0.1)


def pairs(scores: Sequence[float], rights: Sequence[bool], gap: float) -> list[tuple[int, int]]:
    """Preference pairs (better, worse) among the right answers, and among the wrong ones, of one question: the two that
    lie furthest apart in score, if by at least `gap`; of equal ones the earlier."""
    within("gap", gap, 0, float("inf"), "equal answers are no preference", open_low=True)
    found = []
    for kind in (True, False):
        own = [i for i, right in enumerate(rights) if bool(right) == kind]
        if own:
            best, worst = max(own, key=lambda i: scores[i]), min(own, key=lambda i: scores[i])
            if scores[best] - scores[worst] >= gap:
                found.append((best, worst))
    return found


@dataclass(frozen=True)
class DAST(Grouped):
    """DAST's score as a reward: right answers earn by staying below what their question deserves, wrong ones lose.

    longest: tokens a hopeless question deserves, the most that may be written. The share right and the length of the
    right answers are those of the group. Departs from the paper, which trains on pairs.
    """

    longest: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.longest, int) or self.longest < 1:
            raise RewardError(f"longest={self.longest!r}: needs a whole number of tokens, from 1 up")

    def judge(self, batch: Batch) -> Rewards:
        grades, lengths = self.grades(batch), batch.lengths
        found: Rewards = [None] * len(batch)
        for group in batch.groups(self.num_generations):
            judged = [i for i in group if grades[i] is not None]
            if judged:
                deserved = budget([bool(grades[i]) for i in judged], [lengths[i] for i in judged], self.longest)
                for i in judged:
                    found[i] = score(bool(grades[i]), lengths[i], max(deserved, 1.0))
        return found
