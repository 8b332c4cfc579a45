"""TPS: what is pruned is squeezed into its most similar kept token. arXiv:2304.10716, sec. 3."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.core import Budget, Hard, KeepRatio, Plan, Reducer, Signals, Site, Soft, Tokens, reducer, select
from fewer.core.learned import Predictor, keep_decision, present, training_policy
from fewer.core.plan import complement, take


@reducer("tps", paper="arXiv:2304.10716", acts="prune+merge", on="vision", training="optional")
@dataclass(frozen=True)
class TPS(Reducer):
    """Token pruning and squeezing: every pruned token p joins the kept token h it is most similar to.

    h becomes (e h + sum_p exp(cos(p, h) / tau) p) / (e + sum_p exp(cos(p, h) / tau)); a kept token that nobody joins
    is unchanged, and protected tokens neither give nor take.

    scorer  "evit": class attention, inside the block (eTPS; needs no training);
            "dynamicvit": trained predictors, before the block (dTPS)
    budget  share of the free tokens that entered the model, to the power of the stage, rounded down
    tau     temperature of the similarities

    Of tokens equally similar to several kept ones, the earliest takes all (the authors' code gives it to each).
    """

    budget: Budget = KeepRatio(0.7, of="start")
    layers: tuple[int, ...] | None = (3, 6, 9)
    scorer: Literal["evit", "dynamicvit"] = "evit"
    tau: float = 1.0

    def __post_init__(self) -> None:
        if self.scorer not in ("evit", "dynamicvit"):
            raise ValueError(f"scorer={self.scorer!r}: tps scores with 'evit' (eTPS) or 'dynamicvit' (dTPS)")
        if self.tau <= 0:
            raise ValueError(f"tau={self.tau}: a temperature must be above 0; the paper's is 1")

    @property
    def site(self) -> Site:
        return Site.MID_BLOCK if self.scorer == "evit" else Site.BEFORE_BLOCK

    def modules(self, width: int, heads: int, stages: int, free: int) -> dict[str, nn.Module]:
        return {} if self.scorer == "evit" else {"predictor": Predictor(width)}

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        x = signals.hidden
        if self.scorer == "evit":
            kept = select.top(signals.saliency, self.budget, tokens, at=signals.at)
            return self.squeeze(kept, x, tokens, signals)
        predictor = signals.module("predictor")
        logp = predictor(tokens.free.of(x), present(tokens))
        signals.at.spend(predictor.flops(len(tokens.free)))
        if not signals.training:
            score = F.pad(logp[..., 0], (tokens.prefix, 0))
            return self.squeeze(select.top(score, self.budget, tokens, at=signals.at), x, tokens, signals)
        before = torch.ones(x.shape[:2], device=x.device) if tokens.policy is None else tokens.policy
        policy = training_policy(signals, tokens, self.budget, keep_decision(logp, predictor.noise(logp)))
        return Plan.mask(policy, self._in_place(x, policy, before - policy, tokens))

    def squeeze(self, kept: Hard, x: Tensor, tokens: Tokens, signals: Signals) -> Hard:
        """A pruning plan with every pruned token joined to its host. x: (B, N, C). Forms pruned x kept similarities."""
        if kept.length is None:
            guest = complement(kept.anchor, tokens.n)
            real = None
        else:
            guest = torch.arange(tokens.n, device=x.device).expand(tokens.batch, -1)
            real = kept.row < 0 if tokens.valid is None else (kept.row < 0) & tokens.valid
        if guest.shape[-1] == 0:
            return kept
        similar = _cosine(take(x, guest), take(x, kept.anchor))
        signals.at.spend(2 * similar.shape[1] * similar.shape[2] * x.shape[-1])
        movable = tokens.movable
        host = None if movable is None else take(movable.expand(tokens.batch, -1), kept.anchor)
        if kept.valid is not None:
            host = kept.valid if host is None else host & kept.valid
        if host is not None:
            similar = similar.masked_fill(~host[:, None], float("-inf"))
        best, to = similar.max(-1)
        weight = (best / self.tau).exp()
        if real is not None:
            to, weight = torch.where(real, to, -1), weight.masked_fill(~real, 0)
        own = torch.full(kept.anchor.shape, math.e, device=x.device)
        total = own.scatter_add(-1, to.clamp(min=0), weight)
        share = weight / total.gather(-1, to.clamp(min=0))
        return replace(kept, extra=guest, to=to, anchor_weight=own / total, extra_weight=share)

    def _in_place(self, x: Tensor, policy: Tensor, gone: Tensor, tokens: Tokens) -> Soft:
        """The same with all rows staying: hosts change where they stand. N x N, as masked attention is.

        policy: (B, N) after the decision; gone: (B, N), 1 for what this stage prunes; both may carry gradient.
        """
        similar = _cosine(x, x)
        host = policy.detach() > 0
        if tokens.movable is not None:
            host = host & tokens.movable
        best, to = similar.masked_fill(~host[:, None], float("-inf")).max(-1)
        weight = (best / self.tau).exp() * gone
        given = torch.zeros_like(similar).scatter(-1, to[..., None], weight[..., None]).transpose(-1, -2)
        own = math.e * torch.eye(tokens.n, device=x.device)
        matrix = (own + given) / (math.e + given.sum(-1, keepdim=True))
        where = torch.arange(tokens.n, device=x.device).expand(tokens.batch, -1)
        return Plan.soft(matrix, position=where)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarities in float32. a: (B, P, C), b: (B, K, C) -> (B, P, K)."""
    return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).transpose(-1, -2)
