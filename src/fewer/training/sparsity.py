"""A reward for reading fewer tokens: answers of one prompt under several budgets compete, and the short right one wins.

Reinforcement learning after ZipR1 (later named Sparsity Forcing, arXiv:2504.18579): a prompt is answered several times,
each time with another share of the attention that is kept. A right answer earns more the fewer tokens it read, a wrong
one earns nothing; each answer is judged against its group.

    keep = smallest(attention, shares)                       # what each rollout reads
    reward = rewards(right, keep.float().mean(-1), weight=0.5)
    loss = objective(logp, old, advantages(reward, group=8), reference=reference)

The paper's code is not public: the probe queries, the shares and the exact form of the reward are ours. The operator
that decides what is read must be the same in training and in use: `Mass`, by `select.top`, in both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewer.core import Mass, Place, Tokens, select


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


def rewards(right: Tensor, ratio: Tensor, weight: float, form: Tensor | None = None) -> Tensor:
    """What each answer earns: 1 and weight * (1 - ratio) if it is right, nothing if it is wrong; and its form.

    right: (B,) bool or 0 and 1; ratio: (B,) share of the tokens that was read, in [0, 1]; form: (B,) further reward
    that does not depend on being right, such as for a well-formed answer. Returns (B,) float32.
    A reward for sparsity on wrong answers would end at no tokens at all.
    """
    if weight < 0:
        raise ValueError(f"weight={weight} is negative: it would reward reading more; 0 leaves sparsity out")
    reward = right.float() * (1 + weight * (1 - ratio.float()))
    return reward if form is None else reward + form.float()


def advantages(reward: Tensor, group: int, *, scaled: bool = True) -> Tensor:
    """How far each reward lies from its group's mean, in the group's standard deviations; 0 where all are equal.

    reward: (B,), the answers to one prompt side by side, `group` of them each. Returns (B,), no gradient.
    scaled: divide by the standard deviation. Where all answers of a group are right, only sparsity tells them apart,
    and divided by its own deviation it pulls as hard for any weight above 0; False keeps the weight's say.
    Source   GRPO, arXiv:2402.03300, sec. 4.1.
    """
    if group < 2 or reward.shape[0] % group:
        raise ValueError(f"{reward.shape[0]} rewards in groups of {group}: give whole groups, of two answers or more")
    reward = reward.detach().float().unflatten(0, (-1, group))
    apart = reward - reward.mean(1, keepdim=True)
    if scaled:
        apart = apart / reward.std(1, keepdim=True).clamp_min(1e-6)
    equal = reward.amax(1, keepdim=True) == reward.amin(1, keepdim=True)
    return apart.masked_fill(equal, 0).flatten()


def objective(
    logp: Tensor, old: Tensor, advantage: Tensor, *, reference: Tensor | None = None, clip: float = 0.2,
    kl: float = 0.04, real: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The clipped policy objective with a penalty for leaving the reference model, as a loss.

    logp: (B,) or (B, L), log-probabilities of what was sampled, with gradient: the answer's tokens, and the budget
    where it was drawn by the policy; old: those when it was sampled; reference: those of the model before training,
    None = no penalty. advantage: (B,). real: (B, L) bool, False = padding. Answers count alike, whatever their length.
    Source   GRPO, arXiv:2402.03300, eq. 3 and 4.
    """
    if logp.dim() == 1:
        logp, old = logp[:, None], old[:, None]
        reference = None if reference is None else reference[:, None]
    ratio = (logp - old.detach()).exp()
    gain = advantage.detach()[:, None]
    loss = -torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)
    if reference is not None:
        away = reference.detach() - logp
        loss = loss + kl * (away.exp() - away - 1)
    if real is None:
        return loss.mean()
    weight = real.float()
    return ((loss * weight).sum(1) / weight.sum(1).clamp_min(1)).mean()
