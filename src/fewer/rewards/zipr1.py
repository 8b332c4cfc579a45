"""ZipR1: answers of one prompt, each given under another budget of attention; the right one that read less wins.

Reinforcement learning after ZipR1 (later named Sparsity Forcing, arXiv:2504.18579): a prompt is answered several times,
each time with another share of the attention that is kept. A right answer earns more the fewer tokens it read, a wrong
one earns nothing; each answer is judged against its group.

    keep = smallest(attention, shares)                       # what each rollout reads, at one layer
    ratio = kept_share([keep, ...])                          # over the layers
    advantages = grpo.advantages(zipped(right, ratio, weight=0.5), group=8)

`ZipR1` is the same as a reward for a trainer: the ratio of each completion is a column, which TRL takes from what a
`rollout_func` returns beside the completions.

The paper's code is not public: the probe queries, the shares and the exact form of the reward are ours. What a rollout
read must be read in the update, too, or the ratios of probabilities are those of two different models: keep the sets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.core import Mass, Place, Tokens, select

from .batch import Batch, Graded, RewardError, Rewards, within


def smallest(attention: Tensor, shares: Sequence[float], valid: Tensor | None = None) -> Tensor:
    """The fewest tokens that hold a share of the attention, each sample with a share of its own.

    attention: (B, N), non-negative, from a few probe queries; shares: B numbers in (0, 1]; valid: (B, N) bool, False =
    padding. Returns (B, N) bool; at least one token of each sample. Raises ValueError for another number of shares.
    """
    if len(shares) != len(attention):
        raise ValueError(f"{len(shares)} shares for {len(attention)} samples; give each its own")
    n, device = attention.shape[1], attention.device
    kept = torch.zeros(attention.shape, dtype=torch.bool, device=device)
    for share in sorted(set(shares)):
        own = torch.tensor([i for i, s in enumerate(shares) if s == share], device=device)
        tokens = Tokens.plain(len(own), n, valid=None if valid is None else valid[own], device=device)
        kept[own] = select.top(attention[own].detach(), Mass(share), tokens, at=Place(start=n)).row >= 0
    return kept


def kept_share(keeps: Sequence[Tensor], valid: Tensor | None = None) -> Tensor:
    """Kept keys over all keys, counted over the layers. (B,) float32 in [0, 1].

    keeps: (B, N) bool for each layer; valid: (B, N) bool, False = padding, which counts nowhere.
    """
    real = torch.ones_like(keeps[0], dtype=torch.bool) if valid is None else valid.bool()
    kept = torch.stack([(keep.bool() & real).sum(1) for keep in keeps]).sum(0)
    return kept.float() / (len(keeps) * real.sum(1)).clamp_min(1)


def zipped(right: Tensor, ratio: Tensor, weight: float, form: Tensor | None = None) -> Tensor:
    """What each answer earns: 1 and weight * (1 - ratio) if it is right, nothing if it is wrong; and its form.

    right: (B,) bool or 0 and 1; ratio: (B,) share of the tokens that was read, in [0, 1]; form: (B,) further reward
    that does not depend on being right, such as for a well-formed answer. Returns (B,) float32.
    A reward for sparsity on wrong answers would end at no tokens at all.
    """
    if weight < 0:
        raise RewardError(f"weight={weight} is negative: it would reward reading more; 0 leaves sparsity out")
    reward = right.float() * (1 + weight * (1 - ratio.float()))
    return reward if form is None else reward + form.float()


@dataclass(frozen=True)
class ZipR1(Graded):
    """right + weight * (1 - ratio), the second term for right answers only, unless `gated` is False.

    weight: of reading nothing against being right. ratio: the column with the share of tokens that each completion
    read, in [0, 1]. gated: without it wrong answers that read nothing earn, too, and the policy ends there.
    Source   after ZipR1, arXiv:2504.18579; the gate is ours.
    """

    weight: float = 0.5
    ratio: str = "token_ratio"
    gated: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        within("weight", self.weight, 0, math.inf, "it would reward reading more; 0 leaves sparsity out")

    def judge(self, batch: Batch) -> Rewards:
        found: Rewards = []
        for i, (right, ratio) in enumerate(zip(self.grades(batch), batch.column(self.ratio), strict=True)):
            within(f"{self.ratio}[{i}]", float(ratio), 0, 1, "it is the share of tokens that was read")
            sparse = self.weight * (1 - float(ratio))
            found.append(None if right is None else float(right) + (sparse if right or not self.gated else 0.0))
        return found
