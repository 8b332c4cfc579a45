"""What CoT-Influx learns from: selections drawn from a policy, and the reward of the prompt they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Drawn", "draw", "reward"]

TRIES = 100  # draws before the likeliest example is kept alone


@dataclass(frozen=True, eq=False)
class Drawn:
    """Selections of one prompt.

    examples: (G, M) bool; tokens: (G, N) bool, those that stay, in the order of the prompt; nll: (G,) with gradient, of
    all that was decided: each example, and each token of those that stay, but for what stays with them anyway.
    """

    examples: Tensor
    tokens: Tensor
    nll: Tensor


def draw(example: Tensor, tokens: Sequence[Tensor], framed: Sequence[Tensor], group: int) -> Drawn:
    """Whole examples first, then tokens of those that stay; at least one example stays.

    example: (M, 2), tokens: M of (n, 2), log-probabilities of leaving and staying; framed: M of (n,) bool, tokens that
    stay with their example. group: G, how many selections.
    """
    p = example[:, 1].exp().detach()
    stays = torch.rand(group, len(p)) < p
    for _ in range(TRIES):
        empty = ~stays.any(-1)
        if not bool(empty.any()):
            break
        stays[empty] = torch.rand(int(empty.sum()), len(p)) < p
    empty = ~stays.any(-1)
    stays[empty, int(p.argmax())] = True
    logp, frame = torch.cat(list(tokens)), torch.cat(list(framed))
    of = torch.repeat_interleave(torch.arange(len(p)), torch.tensor([len(t) for t in tokens]))
    wants = torch.rand(group, len(logp)) < logp[:, 1].exp().detach()
    kept = stays[:, of]
    chosen = torch.where(stays, example[:, 1], example[:, 0]).sum(-1)
    decided = torch.where(wants, logp[:, 1], logp[:, 0]) * (kept & ~frame)
    return Drawn(stays, kept & (wants | frame), -(chosen + decided.sum(-1)))


def reward(loss: Tensor, right: Tensor, tokens: Tensor, limit: int, weight: float = 1.0) -> Tensor:
    """(1 / (1 + loss) + right) * (tokens / limit)^w, with w = weight up to the limit and -weight beyond it.

    loss: nats of the reference answer behind the prompt; right: whether the answer given is; tokens: of the prompt. All
    (B,). Highest where the prompt is as long as it may be, and continuous there.
    Source   CoT-Influx, arXiv:2312.08901, eq. 3. Raises ValueError for a limit under 1.

    >>> reward(torch.tensor([0.0, 0.0]), torch.tensor([True, True]), torch.tensor([50, 200]), 100).tolist()
    [1.0, 1.0]
    """
    if limit < 1:
        raise ValueError(f"limit={limit}: a prompt has one token or more")
    share = tokens.float() / limit
    shaped = torch.where(tokens <= limit, share.pow(weight), share.pow(-weight))
    return (1 / (1 + loss.float()) + right.float()) * shaped
