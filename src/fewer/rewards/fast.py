"""FAST: think fast where it is easy, slowly where it is hard. arXiv:2504.18458.

Three parts of a GRPO loop: `FAST`, the reward; `betas`, how tightly each group is held to the reference model; `worth`,
which groups are learnt from at all. TRL takes the reward; `FAST(sampling=True)` leaves out groups that are not worth
it, and `grpo.loss` takes the betas.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .answers import boxed
from .batch import Batch, Grouped, RewardError, Rewards, within

AROUND = re.compile(r"\s*([<>/])\s*")


def thought(text: str) -> bool:
    r"""Whether a text is of the form `<think>...</think>...\boxed{...}`: what FAST asks for."""
    thinking, closed, rest = text.partition("</think>")
    return bool(closed) and thinking.startswith("<think>") and boxed(rest) is not None


def ranked(complexity: Sequence[float]) -> list[float]:
    """Complexities as ranks from 0 to 1, ties in the middle of their ranks; 0.5 each where all are equal."""
    if len(set(complexity)) < 2:
        return [0.5] * len(complexity)
    ordered = sorted(complexity)
    last = len(ordered) - 1
    return [(ordered.index(c) + (ordered.count(c) - 1) / 2) / last for c in complexity]


def betas(passed: Sequence[float], group: int, low: float = 1e-3, high: float = 1e-2) -> Tensor:
    """How much the KL term counts for each completion: low + (high - low) * (1 - share right), group by group.

    passed: the share of right answers of each group, G; group: completions of each. Returns (G * group,) float32, for
    `grpo.loss(beta=...)`. The paper's text lets it fall with difficulty, its code, which this follows, lets it rise.
    Source   FAST, arXiv:2504.18458, and the authors' code.
    """
    if not 0 <= low <= high:
        raise RewardError(f"low={low}, high={high}: needs 0 <= low <= high")
    share = torch.tensor([float(p) for p in passed])
    if not ((share >= 0) & (share <= 1)).all():
        raise RewardError(f"passed={list(passed)}: needs the share of right answers of each group, in [0, 1]")
    return (low + (high - low) * (1 - share)).repeat_interleave(group)


def worth(
    passed: float, progress: float, slow: tuple[float, float] = (0.3, 0.99), fast: tuple[float, float] = (0.01, 0.7)
) -> bool:
    """Whether a group is learnt from: its share of right answers lies between the bounds of the phase, both excluded.

    passed: that share; progress: of the training, in [0, 1]; slow, fast: bounds in its first and its second half. First
    what can mostly be done, to learn to think; then what is hard and not yet safe.
    """
    within("progress", progress, 0, 1, "it is the share of the training that is over")
    low, high = slow if progress < 0.5 else fast
    return low < passed < high


@dataclass(frozen=True)
class FAST(Grouped):
    """right + 0.5 * form + 0.5 * thinking. With x = length / mean length - 1, thinking is -x for a right answer to an
    easy question, min(x, 1) for a wrong one to a hard question, and 0 otherwise.

    Difficulty is (share wrong in the group) * complexity; hard are questions above the `hard` quantile of the batch.

    form        text -> bool; the default is `thought`. form_weight, thinking_weight: what both count
    complexity  a column, of anything that orders questions (their ranks are taken); None: all alike
    hard        quantile of the difficulties. quota: at most this share of the batch's completions gets the term for
                easy questions
    average     lengths are compared with the mean of the "group" or of the "batch"
    sampling    groups that `worth` refuses are not judged (None), by the trainer's state
    fidelity    "paper": lengths in tokens, and within the quota the shortest (relative to their mean) come first, those
                that tie at its end all or none: the order of a batch changes nothing. "code": as the authors' code:
                characters, white space around <, > and / left out, the mean of the batch, first come, first served
    Source      FAST, arXiv:2504.18458, sec. 3.2; numbers by the authors' code.
    """

    form: Callable[[str], bool] = thought
    form_weight: float = 0.5
    thinking_weight: float = 0.5
    complexity: str | None = None
    hard: float = 0.8
    quota: float = 0.8
    average: Literal["group", "batch"] = "group"
    sampling: bool = False
    fidelity: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        within("hard", self.hard, 0, 1, "it is a quantile of the difficulties")
        within("quota", self.quota, 0, 1, "it is a share of the completions")
        for name in ("form_weight", "thinking_weight"):
            within(name, getattr(self, name), 0, float("inf"), "a negative one would turn the term round")
        if self.average not in ("group", "batch"):
            raise RewardError(f"average={self.average!r} is neither 'group' nor 'batch'")
        if self.fidelity not in ("paper", "code"):
            raise RewardError(f"fidelity={self.fidelity!r} is neither 'paper' nor 'code'")

    def judge(self, batch: Batch) -> Rewards:
        grades = self.grades(batch)
        texts = [AROUND.sub(r"\1", text) for text in batch.texts] if self.fidelity == "code" else batch.texts
        groups = [[i for i in g if grades[i] is not None] for g in batch.groups(self.num_generations)]
        groups = [g for g in groups if g]
        passed = [sum(bool(grades[i]) for i in g) / len(g) for g in groups]
        lengths = [len(text) for text in texts] if self.fidelity == "code" else batch.lengths
        thinking = self._thinking(
            groups, passed, grades, self._excess(groups, lengths), self._complexity(batch, groups)
        )
        found: Rewards = [None] * len(batch)
        for group, share in zip(groups, passed, strict=True):
            if not self.sampling or worth(share, _progress(batch)):
                for i in group:
                    form = self.form_weight * bool(self.form(texts[i]))
                    found[i] = float(bool(grades[i])) + form + self.thinking_weight * thinking[i]
        return found

    def _excess(self, groups: list[list[int]], lengths: list[int]) -> dict[int, float]:
        """length / mean - 1 of each."""
        together = self.average == "batch" or self.fidelity == "code"
        found: dict[int, float] = {}
        for pool in [[i for g in groups for i in g]] if together else groups:
            mean = sum(lengths[i] for i in pool) / max(len(pool), 1)
            found |= {i: lengths[i] / mean - 1 if mean else 0.0 for i in pool}
        return found

    def _complexity(self, batch: Batch, groups: list[list[int]]) -> list[float]:
        if self.complexity is None:
            return [0.5] * len(groups)
        values = batch.column(self.complexity)
        return ranked([float(values[g[0]]) for g in groups])

    def _thinking(
        self, groups: list[list[int]], passed: list[float], grades: list[bool | None], excess: dict[int, float],
        complexity: list[float],
    ) -> dict[int, float]:  # fmt: skip
        difficulty = torch.tensor([(1 - p) * c for p, c in zip(passed, complexity, strict=True)], dtype=torch.float64)
        edge = difficulty.quantile(self.hard).item() if groups else 0.0
        hard = {i for g, d in zip(groups, difficulty.tolist(), strict=True) if d > edge for i in g}
        brief = [i for i in excess if grades[i] and i not in hard]
        found = {i: 0.0 if grades[i] or i not in hard else min(x, 1.0) for i, x in excess.items()}
        return found | {i: -excess[i] for i in self._within_quota(brief, excess)}

    def _within_quota(self, brief: list[int], excess: dict[int, float]) -> list[int]:
        room = self.quota * len(excess)
        if self.fidelity == "code":
            return [i for taken, i in enumerate(sorted(brief)) if taken < room]
        return [i for i in brief if sum(excess[j] <= excess[i] for j in brief) <= room]


def _progress(batch: Batch) -> float:
    done, all_of_them = batch.steps
    if not all_of_them:
        raise RewardError(
            "sampling=True goes by how far the training is, and no trainer_state with global_step and max_steps says "
            "so: TRL passes it; elsewhere pass one, or sampling=False"
        )
    return min(done / all_of_them, 1.0)
