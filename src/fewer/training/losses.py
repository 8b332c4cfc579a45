"""Losses of models that learn to keep fewer tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def ratio(keep: Mapping[int, Tensor], target: Mapping[int, float]) -> Tensor:
    """How far the kept shares are from their targets: the mean over stages and samples of (share - target) squared.

    keep: (B, M) decisions per stage, straight-through; target: the share of the M tokens wanted at that stage.
    Source   DynamicViT, arXiv:2106.02034, eq. 14.
    """
    return torch.stack([(keep[stage].mean(1) - target[stage]).square().mean() for stage in keep]).mean()


def logit_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of the student's class probabilities from the teacher's, averaged over the samples.

    student, teacher: (B, classes) logits. Source: DynamicViT, arXiv:2106.02034, eq. 13.
    """
    return _kl(student, teacher).mean()


def token_kl(student: Tensor, teacher: Tensor, keep: Tensor) -> Tensor:
    """KL divergence between the softmaxes over channels of final tokens, averaged over the tokens still kept.

    student, teacher: (B, M, C) final normed patch tokens; keep: (B, M), > 0 = kept; no gradient goes through it.
    Source   the code of DynamicViT; the paper (eq. 12) has squared differences, see `token_mse`.
    """
    return _over_kept(_kl(student, teacher), keep)


def token_mse(student: Tensor, teacher: Tensor, keep: Tensor) -> Tensor:
    """Squared difference of final tokens, averaged over channels and the tokens still kept. Shapes as in token_kl.

    Source   DynamicViT, arXiv:2106.02034, eq. 12.
    """
    return _over_kept((student.float() - teacher.float()).square().mean(-1), keep)


def flops_target(gflops: Tensor, target: float) -> Tensor:
    """Squared distance of a differentiable cost from its target, both in GFLOPs. Source: DiffRate, arXiv:2305.17997."""
    return (gflops - target).square()


def reinforce(nll: Tensor, reward: Tensor, group: int) -> Tensor:
    """The policy gradient's loss: each trajectory's negative log-likelihood, weighted by how far its reward lies above
    the mean of its group.

    nll: (B * group,) of the actions, with gradient; reward: (B * group,), higher is better, taken as it is; the
    trajectories of one input stand side by side.
    Source   Williams 1992, with the baseline of TR-BERT, arXiv:2105.11618, sec. 3.2.
    """
    reward = reward.detach().unflatten(0, (-1, group))
    above = (reward - reward.mean(1, keepdim=True)).flatten()
    return (above * nll).mean()


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL over the last axis, (...,). float32."""
    p, q = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    return F.kl_div(p, q, reduction="none", log_target=True).sum(-1)


def _over_kept(loss: Tensor, keep: Tensor) -> Tensor:
    """Mean of loss (B, M) where keep > 0; zero where nothing is kept."""
    kept = (keep.detach() > 0).float()
    return (loss * kept).sum() / kept.sum().clamp_min(1)


def ranking(scores: Tensor, wanted: Tensor, pairs: Tensor) -> Tensor:
    """Pairwise logistic loss: scores should be in the order of what is wanted, mean over the pairs.

    scores, wanted: (B, N); pairs: (2, P) long, positions; pairs that are wanted alike count nothing.
    Source   SDTP, arXiv:2504.04514, eq. 7, with a mean in place of the sum.
    """
    i, j = pairs
    sign = (wanted[:, i] - wanted[:, j]).sign()
    apart = (scores[:, i] - scores[:, j]) * sign
    return (F.softplus(-apart) * sign.abs()).sum() / sign.abs().sum().clamp_min(1)
