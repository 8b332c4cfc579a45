"""O1-Pruner: be shorter than the model you came from, and no less right. arXiv:2501.12570.

`O1Pruner` is the weight as a reward. Off policy, as in the paper, on answers sampled once from the reference model:

    w = standardised(torch.tensor([weight(n, right, mean_length, accuracy) for ...]))     # over the whole data set
    loss = objective(logps, reference, w, mask)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import Batch, Grouped, RewardError, Rewards, within

CLIP = (-2.0, 4.0)


def weight(length: float, right: bool, mean_length: float, accuracy: float, lam: float = 2.0) -> float:
    """mean_length / length - 1 + lam * (right - accuracy), clipped to [-2, 4].

    mean_length, accuracy: of the reference model's answers to the question. An empty answer counts as one token.
    lam: how much being right counts; large enough, no short wrong answer outweighs a long right one.
    Source   O1-Pruner, arXiv:2501.12570, and its code for the clip.
    """
    shorter = mean_length / max(length, 1) - 1
    return min(max(shorter + lam * (right - accuracy), CLIP[0]), CLIP[1])


def standardised(weights: Tensor) -> Tensor:
    """Weights (D,) of a whole data set, clipped before, with mean 0 and deviation 1; zeros where all are equal."""
    apart = weights.float() - weights.float().mean()
    spread = apart.square().sum().div(max(len(weights) - 1, 1)).sqrt()
    return torch.where(spread > 1e-8, apart / spread.clamp_min(1e-8), torch.zeros_like(apart))


def objective(logps: Tensor, reference: Tensor, weights: Tensor, mask: Tensor, clip: float = 0.2) -> Tensor:
    """mean over answers of max(-w rho, -w clip(rho, 1 - clip, 1 + clip)), rho the geometric mean of the tokens' ratios.

    logps, reference: (B, T) log-probabilities of the tokens, the first with gradient; weights: (B,); mask: (B, T),
    True or 1 up to and including the end token. Scalar, float32.
    Source   the authors' trainer.
    """
    within("clip", clip, 0, 1, "it is how far a ratio may go from 1", open_low=True)
    real = mask.bool()
    apart = (logps.float() - reference.detach().float()).masked_fill(~real, 0)
    rho = (apart.sum(1) / real.sum(1).clamp_min(1)).exp()
    w = weights.detach().float()
    return torch.maximum(-w * rho, -w * rho.clamp(1 - clip, 1 + clip)).mean()


@dataclass(frozen=True)
class O1Pruner(Grouped):
    """O1-Pruner's weight as a reward: shorter than the mean, and right more often.

    lam: how much being right counts: 2 in the paper, 5 in the authors' example for QwQ.
    reference: columns of the reference model's mean length and accuracy for each question. None: those of the group
    itself, which departs from the paper: then nothing keeps the policy at the accuracy it came from.
    """

    lam: float = 2.0
    reference: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        within("lam", self.lam, 0, math.inf, "a negative one would reward wrong answers")
        if self.reference is not None and len(self.reference) != 2:
            raise RewardError(f"reference={self.reference}: needs two columns, of mean lengths and of accuracies")

    def judge(self, batch: Batch) -> Rewards:
        grades, lengths = self.grades(batch), batch.lengths
        means, accuracies = self._reference(batch, grades, lengths)
        return [
            None if right is None else weight(n, right, mean, accuracy, self.lam)
            for right, n, mean, accuracy in zip(grades, lengths, means, accuracies, strict=True)
        ]

    def _reference(
        self, batch: Batch, grades: list[bool | None], lengths: list[int]
    ) -> tuple[list[float], list[float]]:
        if self.reference is not None:
            return batch.column(self.reference[0]), batch.column(self.reference[1])
        means, accuracies = [0.0] * len(batch), [0.0] * len(batch)
        for group in batch.groups(self.num_generations):
            judged = [i for i in group if grades[i] is not None]
            for i in judged:
                means[i] = sum(lengths[j] for j in judged) / len(judged)
                accuracies[i] = sum(bool(grades[j]) for j in judged) / len(judged)
        return means, accuracies
