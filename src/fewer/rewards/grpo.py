"""The arithmetic of GRPO as plain functions of tensors: sums of rewards, advantages, and the losses of its relatives.

    total = grpo.total(rewards, weights)                                       # (B, K) -> (B,)
    advantages = grpo.advantages(total, group=8)
    loss = grpo.loss(logps, old, advantages, mask, reference=reference, beta=0.04)

The numbers are those of TRL's GRPOTrainer, gradients included; what differs is said where it does. B completions, the
`group` of each prompt side by side; T tokens, padded; K rewards. NaN is a reward that was not given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"]
LOSSES: tuple[LossType, ...] = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
EPS = 1e-4


def total(rewards: Tensor, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """The weighted sum of rewards. A reward that was not given adds nothing; where none was, the sum is NaN.

    rewards: (B, K), NaN = not given; weights: K numbers, None: 1 each. Returns (B,) float32.
    """
    weighted = rewards.float() * _weights(weights, rewards)
    return weighted.nansum(1).masked_fill(rewards.isnan().all(1), torch.nan)


def advantages(rewards: Tensor, group: int, *, scale: Scale = "group", eps: float = EPS) -> Tensor:
    """How far each reward lies from the mean of its group.

    rewards  (B,), NaN = none: left out of means and deviations, and its advantage is 0
    scale    "group": in the group's standard deviations (GRPO). This pulls as hard for a difference of one token among
             right answers as for right against wrong. "batch": in those of the batch. "none": as it is (Dr. GRPO)
    eps      goes on top of the deviation, which is the unbiased one (0 of a single reward)
    Returns  (B,) float32, no gradient; exactly 0 in groups of equal rewards, see `flat`
    Raises   ValueError for a torn group
    Source   DeepSeekMath, arXiv:2402.03300, sec. 4.1; Dr. GRPO, arXiv:2503.20783.
    """
    _check("scale", scale, ("group", "batch", "none"))
    grouped = _grouped(rewards, group)
    apart = (grouped - grouped.nanmean(1, keepdim=True)).masked_fill(_flat(grouped)[:, None], 0)
    if scale == "group":
        apart = apart / (_std(grouped) + eps)
    elif scale == "batch":
        apart = apart / (_std(grouped.reshape(1, -1)) + eps)
    return apart.nan_to_num(nan=0.0).flatten()


def normalised_each(
    rewards: Tensor, group: int, weights: Sequence[float] | Tensor | None = None, *, eps: float = EPS
) -> Tensor:
    """Each reward in its group's standard deviations first, then the weighted sum, in those of the batch.

    rewards: (B, K). Returns (B,). TRL's `multi_objective_aggregation="normalize_then_sum"` (GDPO, arXiv:2601.05242).
    The other way round, `advantages(total(rewards, weights), group)`, is the default here and there: after this one
    every reward counts alike in a group, however little it differs there, and the weights no longer say what a token is
    worth against a right answer.
    """
    each = _grouped(rewards, group)
    each = (each - each.nanmean(1, keepdim=True)) / (_std(each) + eps)
    summed = total(each.flatten(0, 1).masked_fill(rewards.isnan(), torch.nan), weights)
    apart = (summed - summed.nanmean()) / (_std(summed[None])[0] + eps)
    return apart.nan_to_num(nan=0.0)


def flat(rewards: Tensor, group: int) -> Tensor:
    """Which groups teach nothing, their rewards being equal: (B / group,) bool. To be counted, or sampled anew."""
    return _flat(_grouped(rewards, group))


def kl(logps: Tensor, reference: Tensor) -> Tensor:
    """The k3 estimate of the KL divergence from the reference, token by token: exp(d) - d - 1, d = reference - logps.

    Never negative, 0 where both are equal. Same shape, float32; the gradient goes to `logps`.
    Source   Schulman, "Approximating KL divergence", 2020.
    """
    away = reference.detach().float() - logps.float()
    return away.exp() - away - 1


def entropy_mask(entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """The tokens at which the policy was least sure: their entropy reaches the (1 - share) quantile of all real ones.

    entropy: (B, T), >= 0; mask: (B, T), 0 or False = padding. Returns (B, T) bool, False at padding; for
    `loss(learn=...)`. Source: "Beyond the 80/20 rule", arXiv:2506.01939.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} is outside (0, 1]: it is the share of tokens that are learnt from; 1 is all")
    real = mask.bool()
    values = entropy.detach().float()
    if not real.any():
        return torch.zeros_like(real)
    return real & (values >= torch.quantile(values[real], 1 - share))


def loss(
    logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, loss_type: LossType = "dapo",
    level: Literal["token", "sequence"] = "token", clip: tuple[float, float] = (0.2, 0.28), cap: float = 5.0,
    reference: Tensor | None = None, beta: float | Tensor = 0.0, longest: int | None = None,
    tokens: float | Tensor | None = None, learn: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The loss of a batch of completions. Scalar, float32.

    logps       (B, T), log-probabilities of the sampled tokens under the policy, with gradient
    old         (B, T), those when they were sampled. `logps.detach()` on policy: then every ratio is 1, and the
                gradient is that of REINFORCE with a baseline
    advantages  (B,)
    mask        (B, T), 1 or True up to and including the end token. What stands at padding counts nowhere, NaN included
    loss_type   what the sum over the tokens is divided by:
                "grpo"     each completion by its tokens, then by B. Long wrong answers pay less for each token
                "bnpo"     by the tokens of this batch
                "dapo"     by `tokens`: those of all processes and accumulation steps, divided by the number of
                           processes where gradients are averaged over them; None: those of this batch
                "dr_grpo"  by B * longest
                "cispo"    as "dapo", with -min(ratio, cap) * A * logp, no gradient through the ratio, in place of the
                           clipped surrogate: no token is ever without a gradient (arXiv:2506.13585)
    level       "token", or "sequence": one ratio for each completion, the geometric mean of its tokens' (GSPO,
                arXiv:2507.18071)
    clip        how far a ratio may fall below and rise above 1; DAPO's numbers, (0.2, 0.2) is the original
    reference   (B, T), those of the model to stay near; beta: what its `kl` costs, a number or (B,), see `fast.betas`
    learn       (B, T) bool, see `entropy_mask`: other tokens keep their KL term and stay in the divisor, as in TRL
    Raises      ValueError for settings outside their range, and for shapes that disagree
    Source      DeepSeekMath, arXiv:2402.03300, eq. 3; DAPO, arXiv:2503.14476; Dr. GRPO, arXiv:2503.20783.
    """
    _check("loss_type", loss_type, LOSSES)
    _check("level", level, ("token", "sequence"))
    _clipping(clip, cap)
    _shapes(logps, advantages, {"old": old, "mask": mask, "reference": reference, "learn": learn})
    real = mask.bool()
    logps = logps.float().masked_fill(~real, 0)
    apart = logps - old.detach().float().masked_fill(~real, 0)
    if level == "sequence":
        apart = apart.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
    each = _surrogate(logps, apart.exp(), advantages.detach().float()[:, None], loss_type, clip, cap)
    if learn is not None:
        each = each * learn
    each = each + _penalty(logps, reference, real, beta)
    return _mean(each.masked_fill(~real, 0), real, loss_type, longest, tokens)


def _surrogate(
    logps: Tensor, ratio: Tensor, gain: Tensor, loss_type: LossType, clip: tuple[float, float], cap: float
) -> Tensor:
    """(B, T), or (B, 1) where one ratio stands for all tokens of a completion; before padding is left out."""
    if loss_type == "cispo":
        return -ratio.detach().clamp(max=cap) * gain * logps
    return -torch.minimum(ratio * gain, ratio.clamp(1 - clip[0], 1 + clip[1]) * gain)


def _penalty(logps: Tensor, reference: Tensor | None, real: Tensor, beta: float | Tensor) -> Tensor:
    """The KL term, (B, T)."""
    if reference is None:
        if isinstance(beta, Tensor) or beta:
            raise ValueError(f"beta={beta} and no reference: give the reference model's log-probabilities, or beta=0")
        return torch.zeros_like(logps)
    if isinstance(beta, Tensor) and beta.dim():
        if beta.shape != logps.shape[:1]:
            raise ValueError(
                f"beta of shape {tuple(beta.shape)} for {len(logps)} completions: one for each, or a number"
            )
        beta = beta.detach()[:, None]
    return beta * kl(logps, reference.masked_fill(~real, 0))


def _mean(
    each: Tensor, real: Tensor, loss_type: LossType, longest: int | None, tokens: float | Tensor | None
) -> Tensor:
    if loss_type == "grpo":
        return (each.sum(1) / real.sum(1).clamp_min(1)).mean()
    if loss_type == "dr_grpo":
        if longest is None or longest < 1:
            raise ValueError(
                f"longest={longest}: 'dr_grpo' divides by the most tokens a completion may have; give them"
            )
        return each.sum() / (len(each) * longest)
    if loss_type == "bnpo" or tokens is None:
        return each.sum() / real.sum().clamp_min(1)
    return each.sum() / torch.as_tensor(tokens, dtype=each.dtype, device=each.device).clamp_min(1)


def _clipping(clip: tuple[float, float], cap: float) -> None:
    low, high = clip
    if not (0 <= low <= 1 and high >= 0):
        raise ValueError(
            f"clip={clip}: needs how far a ratio may fall below 1, in [0, 1], and rise above it, from 0 up"
        )
    if not cap > 0:
        raise ValueError(f"cap={cap} lets no token count: needs the highest ratio, above 0; the usual one is 5")


def _shapes(logps: Tensor, advantages: Tensor, others: dict[str, Tensor | None]) -> None:
    wrong = {name: tuple(x.shape) for name, x in others.items() if x is not None and x.shape != logps.shape}
    if logps.dim() != 2 or wrong or advantages.shape != logps.shape[:1]:
        raise ValueError(
            f"logps has shape {tuple(logps.shape)}, advantages {tuple(advantages.shape)}; {wrong or 'the others'} must "
            "be as logps, (B, T), and advantages (B,)"
        )


def _check(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}: needs {', '.join(map(repr, known))}")


def _weights(weights: Sequence[float] | Tensor | None, rewards: Tensor) -> Tensor:
    k = rewards.shape[1]
    if weights is None:
        return torch.ones(k, device=rewards.device)
    if len(weights) != k:
        raise ValueError(f"{len(weights)} weights for {k} rewards: give one for each, or None")
    return torch.as_tensor(weights, dtype=torch.float32, device=rewards.device)


def _grouped(rewards: Tensor, group: int) -> Tensor:
    """(groups, group, ...) float32."""
    if group < 1 or len(rewards) % group:
        raise ValueError(f"{len(rewards)} rewards in groups of {group}: give whole groups, of one answer or more")
    return rewards.detach().float().unflatten(0, (-1, group))


def _flat(grouped: Tensor) -> Tensor:
    """(groups,): whether all rewards that were given are equal, to the bit."""
    low = grouped.nan_to_num(nan=torch.inf).amin(1)
    high = grouped.nan_to_num(nan=-torch.inf).amax(1)
    return low >= high


def _std(grouped: Tensor) -> Tensor:
    """The unbiased standard deviation over dim 1, kept, NaN left out; 0 of fewer than two."""
    given = ~grouped.isnan()
    apart = (grouped - grouped.nanmean(1, keepdim=True)).masked_fill(~given, 0)
    return (apart.square().sum(1, keepdim=True) / (given.sum(1, keepdim=True) - 1).clamp_min(1)).sqrt()
